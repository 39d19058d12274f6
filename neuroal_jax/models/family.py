"""What a model family tells the rest of the engine: plain data, no forward pass, no JAX.

A family's linears are listed once, in the order in which PyTorch's `named_modules` visits them. Each says which input
it reads and which input its output rows become, so that the statistics, the allocations and the pruners never look
at positions or names. A tensor that is several linears in one is one linear of several parts: it reads one input, and
so has one mask, one share of the budget and one entry everywhere; its rows become different inputs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

Shapes = Mapping[str, tuple[int, int]]  # (out, in) of each linear of a block


@dataclass(frozen=True)
class Rows:
    """Output rows of a linear that become one input; how many they are follows from its width.

    Attributes:
        feeds: Name of the input that these rows become, in its order (NeuroAL's row step).
        feeds_next_block: Whether `feeds` lives in the following block instead of this one.
        grouped: Whether they are k/v heads that several query heads of `feeds` may share.
        selects: Whether they only weigh what other rows pass on: queries and keys, or the activated half of a gate.
    """

    feeds: str
    feeds_next_block: bool = False
    grouped: bool = False
    selects: bool = False


# The parts of the usual fused linears, in their order.
QKV = (
    Rows("attention_output", selects=True),
    Rows("attention_output", grouped=True, selects=True),
    Rows("attention_output", grouped=True),
)
GATE_UP = (Rows("mlp_hidden", selects=True), Rows("mlp_hidden"))


@dataclass(frozen=True)
class LinearSpec:
    """One prunable linear of a block.

    Attributes:
        name: Module path inside the block, the same in Hugging Face and in Flax (`self_attn.q_proj`).
        reads: Name of the block input that this linear multiplies; several linears may share one.
        feeds: What all its output rows become, see `Rows`, as for the next three; without parts of its own.
        feeds_next_block: See `Rows`.
        grouped: See `Rows`.
        selects: See `Rows`.
        fused: Its parts, if it is several linears in one tensor: what stands in `Rows` is theirs then.
        interleaved: Whether the parts follow each other within every k/v head's share of the rows, not as wholes.
        in_mlp: Whether it belongs to the MLP, whose masks DSnoT leaves alone.
    """

    name: str
    reads: str
    feeds: str = ""
    feeds_next_block: bool = False
    grouped: bool = False
    selects: bool = False
    fused: tuple[Rows, ...] = ()
    interleaved: bool = False
    in_mlp: bool = False

    @property
    def parts(self) -> tuple[Rows, ...]:
        """Its output rows by what they become, in order: one part, unless it is several linears in one."""
        return self.fused or (Rows(self.feeds, self.feeds_next_block, self.grouped, self.selects),)


@dataclass(frozen=True)
class ParamRule:
    """One tensor's names on both sides; `{block}` stands for the block number.

    Attributes:
        hf: Hugging Face name, e.g. `model.layers.{block}.mlp.up_proj.weight`.
        flax: Path in the Flax model, e.g. `blocks.{block}.mlp.up_proj.kernel`.
        transpose: Whether the two differ by a 2-D transpose (`[out, in]` against `[in, out]`).
        tied: Whether the tensor is a second use of one that another rule already owns.
    """

    hf: str
    flax: str
    transpose: bool = False
    tied: bool = False

    def across(self, array: Any) -> Any:
        """An array of one side as the other side has it."""
        return array.T if self.transpose else array


def by_input(linears: Sequence[LinearSpec]) -> dict[str, list[str]]:
    """The linears that read each input; no input depends on linears of a later one, however a family lists them."""
    found: dict[str, list[str]] = {}
    depends = TopologicalSorter[str]()
    for linear in linears:
        found.setdefault(linear.reads, []).append(linear.name)
        depends.add(linear.reads)
        for part in linear.parts:
            if not part.feeds_next_block:
                depends.add(part.feeds, linear.reads)
    return {name: found[name] for name in depends.static_order()}


@dataclass(frozen=True)
class Family:
    """A family of models: how to read its config, build its modules and name its tensors.

    Attributes:
        name: Hugging Face `model_type`.
        architectures: Values of config.json's `architectures` that this family implements.
        parse_config: Maps config.json to the family's frozen config; raises UserError.
        linears: The prunable linears of a block, in `named_modules` order.
        rules: The table of all tensors for a config.
        stem: Builds the module from tokens to the first block's input: `stem(config, rngs)`.
        block: Builds one decoder block: `block(config, rngs)`.
        head: Builds the module from the last block's output to logits: `head(config, rngs)`; it is
            `logits(features(x))`, and says by what features change logits (`slopes`), see `layers.NormHead`.
        block_constants: Values that differ from block to block and are in no checkpoint, by Flax path in the block.
        bos_every_window: Whether a window must start with the tokenizer's BOS to be read as intended.
        reference_uniform: Linears whose rows the released code leaves at their block's sparsity.
        ignored: Patterns of tensors that some checkpoints carry and the forward pass recomputes or never reads; the
            tables of rotary positions and of causal masks, under whatever name, by default.
        unused: Patterns of tensors of another task's head, which transformers leaves out with a warning.
    """

    name: str
    architectures: tuple[str, ...]
    parse_config: Callable[[Mapping[str, Any]], Any]
    linears: tuple[LinearSpec, ...]
    rules: Callable[[Any], tuple[ParamRule, ...]]
    stem: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., Any]
    block_constants: Callable[[Any, int], dict[str, Any]] = field(default=lambda config, block: {})
    bos_every_window: bool = False
    reference_uniform: tuple[str, ...] = ()
    ignored: tuple[str, ...] = (
        *(r"(.*\.)?rotary_emb\.\w+", r"(.*\.)?inv_freq", r"(.*\.)?position_ids"),
        *(r"(.*\.)?((self_)?attn|attention)\.(masked_)?bias", r"(model\.)?decoder\.version"),
    )
    unused: tuple[str, ...] = (
        r"((model|pretrained_model)\.)?"
        r"(classifier|medusa_head|pooler|qa_outputs|regression_head|reward_head|score|summary|v_head|value_head)\..+",
        r"(lm_head|embed_out)\.bias",
    )

    def ignores(self, hf_name: str) -> bool:
        """Whether a tensor of this name may be present and is not needed."""
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)

    def leaves_out(self, hf_name: str) -> bool:
        """Whether a tensor of this name, if the model has none of it, is a head of another task."""
        return any(re.fullmatch(pattern, hf_name) for pattern in self.unused)

    def tensor_name(self, config: Any, block: int, linear: str) -> str:
        """The Hugging Face name of a linear's weight in block `block`."""
        wanted = f"blocks.{{block}}.{linear}.kernel"
        rule = next(rule for rule in self.rules(config) if rule.flax == wanted)
        return rule.hf.format(block=block)


def linear_rules(hf_prefix: str, names: list[str], *, bias: bool) -> tuple[ParamRule, ...]:
    """Rules for the weights, and with `bias` the biases, of linears inside a block.

    Args:
        hf_prefix: Hugging Face prefix of a block, with `{block}`: `model.layers.{block}.`.
        names: Module paths inside the block.
        bias: Whether the linears have biases.
    """
    weights = [
        ParamRule(f"{hf_prefix}{name}.weight", f"blocks.{{block}}.{name}.kernel", transpose=True) for name in names
    ]
    biases = [ParamRule(f"{hf_prefix}{name}.bias", f"blocks.{{block}}.{name}.bias") for name in names if bias]
    return (*weights, *biases)


def expand(rules: tuple[ParamRule, ...], num_blocks: int) -> dict[str, tuple[ParamRule, int]]:
    """Every Hugging Face tensor name that a table expects, with its rule and block number; tied uses excluded."""
    names = {}
    for rule in rules:
        if not rule.tied:
            for block in range(num_blocks) if "{block}" in rule.hf else (0,):
                names[rule.hf.format(block=block)] = (rule, block)
    return names
