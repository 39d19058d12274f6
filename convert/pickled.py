"""Tensors of PyTorch's pickled files, without running what a pickle can hold."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from neuroal_jax.errors import UserError
from neuroal_jax.machine.memory import is_exhausted

if TYPE_CHECKING:
    import torch

_OLDEST = (2, 6)  # before, weights_only=True could be made to run code (CVE-2025-32434)
_MOST_NAMES = 4  # of one tensor, on average: an encoder-decoder names its embedding four times


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a state dict that `torch.save` wrote, in the CPU's memory or mapped from the file.

    Raises:
        UserError: If the file is damaged, or holds anything but a dict of tensors; if PyTorch is too old to be safe.
    """
    _check_torch()
    import torch

    try:
        mapped = _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)  # noqa: TID251 (runs no code)
    except UserError:
        raise
    except Exception as error:  # PyTorch raises many kinds for damaged files
        if is_exhausted(error):
            raise
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it asks for {forbidden[1]}, which a dict of tensors does not need"
            raise UserError(f"{path} is refused ({reason}): unpickling it could run code") from error
        inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = (inner[1] if inner else str(error).strip().split("\n")[0])[:200] or type(error).__name__
        raise UserError(f"{path} is no complete file of torch.save ({reason}): download it again") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds {_describe(content)}, expected a dict of tensors")
    for name, tensor in content.items():
        if problem := _problem(name, tensor):
            raise UserError(f"{path}: {name!r} is {problem}")
    if sum(tensor.nbytes for tensor in content.values()) > _MOST_NAMES * path.stat().st_size:
        raise UserError(f"{path} names the same numbers again and again: the file is damaged, or made to fill disks")
    return dict(content)


def save_tensors(tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Writes a safetensors file in which every tensor has numbers of its own, row by row."""
    from safetensors.torch import save_file

    apart, seen = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        row_major = tensor.detach().contiguous()
        apart[name] = row_major.clone() if storage in seen else row_major
        seen.add(storage)
    save_file(apart, path, metadata={"format": "pt"})


def _check_torch() -> None:
    """Raises UserError unless there is a PyTorch that unpickles weights without running code."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"PyTorch is not installed ({error}): pip install 'neuroal-jax[eval]'") from error
    version = str(torch.__version__)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < _OLDEST:
        raise UserError(
            f"PyTorch {version} is installed, in which reading a pickled file can run code: install 2.6 or later"
        )


def _check_archive(path: Path) -> bool:
    """Whether a file is of today's format, a zip archive, which can be mapped; before 2020 there was another.

    Raises:
        UserError: If the archive could be read in two ways.
        BadZipFile: If it is damaged, by its checksums too, at which PyTorch does not look.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise UserError(f"{path} holds two files of one name: it is damaged or forged")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} is compressed, which torch.save never does: it is damaged or forged")
        for entry in entries:
            if entry.CRC:  # 0 where PyTorch was told to leave it out
                with archive.open(entry) as content:
                    while content.read(2**20):
                        pass
    return True


def _describe(content: object) -> str:
    if isinstance(content, dict):
        return "an empty dict"
    return f"a {type(content).__name__}"


def _problem(name: object, tensor: object) -> str | None:
    import torch

    if not isinstance(name, str) or name == "__metadata__":
        return "no name of a tensor"
    if isinstance(tensor, dict):
        return "a dict of its own: the file is a training program's; save the state dict of the model alone"
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}, expected a tensor"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_complex():
        return f"a tensor of another kind ({tensor.layout}, {tensor.dtype}), expected plain numbers"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device}: there are no numbers of it"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "larger than the numbers that are stored of it"
    return None
