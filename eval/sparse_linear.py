"""Linears that leave out the zeros of a pruned model: CSR on a CPU, 2:4 on a GPU. For inference only.

PyTorch's products with CSR matrices come from MKL. With 32-bit indices, and one row taken as a vector, they are quicker
than dense ones from about two thirds of zeros on. The default 64-bit indices, or `F.linear`, lose most of that.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from neuroal_jax.convert.masks_to_torch import SEMI_STRUCTURED_TILE, fits_semi_structured
from torch import nn

from neuroal_jax.errors import UserError
from neuroal_jax.masks.file import in_block


class SparseLinear(nn.Module):
    """A linear whose weight `[out, in]` is a CSR matrix with int32 indices.

    Attributes:
        weight: The matrix; zeros of the dense weight are not stored.
        bias: `[out]`, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(_csr(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The linear's output `[..., out]` of its input `[..., in]`."""
        rows = x.reshape(-1, x.shape[-1])
        product = self.weight @ rows[0] if len(rows) == 1 else (self.weight @ rows.T).T
        product = product.reshape(*x.shape[:-1], len(self.weight))
        return product if self.bias is None else product + self.bias


def _csr(weight: torch.Tensor) -> torch.Tensor:
    """A matrix without its zeros; the indices are as wide as MKL's quick products take them."""
    with _sparse_tensors():
        wide = weight.to_sparse_csr()
        crow, col = wide.crow_indices().int(), wide.col_indices().int()
        return torch.sparse_csr_tensor(crow, col, wide.values(), wide.shape)


@contextmanager
def _sparse_tensors() -> Iterator[None]:
    """Checks the indices of what is made meanwhile, and drops PyTorch's word that this is in beta state."""
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(enable=True):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        yield


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that pruning is about, all those of all blocks, by their names in a model.

    Raises:
        UserError: If there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and in_block(f"{name}.weight")
    }
    if not found:
        raise UserError(f"this {type(model).__name__} has no linears in numbered blocks: there is nothing to compare")
    return found


def with_csr(model: nn.Module) -> nn.Module:
    """A copy of a model, its blocks' linears as `SparseLinear`; all other parameters are the model's own."""
    return with_linears(model, {name: SparseLinear(linear) for name, linear in block_linears(model).items()})


def with_linears(model: nn.Module, linears: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a model with other linears, by name; all other parameters are the model's own."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, linear in linears.items():
        copied.set_submodule(name, linear)
    return copied


def with_own_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose blocks' linears have weights of their own; all other parameters are the model's."""
    own = {id(linear.weight) for linear in block_linears(model).values()}
    return copy.deepcopy(model, {id(each): each for each in model.parameters() if id(each) not in own})


def semi_structured(model: nn.Module) -> nn.Module:
    """A copy of a model on a GPU, its blocks' linears as PyTorch's 2:4 matrices; all else is shared.

    Raises:
        UserError: Naming the first linear whose weight is not 2:4, or not of a shape that there is a kernel for.
    """
    linears = block_linears(model)
    check_semi_structured(linears)
    return with_linears(model, {name: _semi_structured(linear) for name, linear in linears.items()})


def check_semi_structured(linears: Mapping[str, nn.Linear]) -> None:
    """Raises UserError, naming the first linear that has no 2:4 form, and why."""
    for name, linear in linears.items():
        problem = two_of_four_problem(linear.weight)
        if problem:
            raise UserError(f"--backend cuda measures 2:4 models, but {name} {problem}")


def two_of_four_problem(weight: torch.Tensor) -> str:
    """Why a weight `[out, in]` has no 2:4 form that PyTorch multiplies by; empty if it has one."""
    kept = weight != 0
    if fits_semi_structured(kept):
        return ""
    rows, columns = SEMI_STRUCTURED_TILE
    if len(weight) % rows or weight.shape[1] % columns:
        return f"has shape {list(weight.shape)}, expected multiples of {rows} and {columns}"
    groups = kept.reshape(len(weight), -1, 4).sum(dim=-1)  # [out, in / 4]
    return f"keeps more than 2 weights in {int((groups > 2).sum())} of {groups.numel()} groups of 4"


def _semi_structured(linear: nn.Linear) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype", UserWarning)
        weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), linear.bias
    return made


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, as if nothing else shared them: values and indices where they are sparse."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    if tensor.layout == torch.sparse_csr:
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif hasattr(tensor, "__tensor_flatten__"):  # what a 2:4 matrix keeps
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    else:
        parts = [tensor]
    return sum(part.numel() * part.element_size() for part in parts)


def packed_masks(linears: Mapping[str, nn.Linear]) -> dict[str, np.ndarray]:
    """Where the weights of linears are not zero, packed along the input axis."""
    return {name: np.packbits((linear.weight != 0).cpu().numpy(), axis=1) for name, linear in linears.items()}


def count_zeros(linears: Mapping[str, nn.Linear]) -> int:
    """Number of zeros in the weights of linears."""
    weights = [linear.weight for linear in linears.values()]
    return sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
