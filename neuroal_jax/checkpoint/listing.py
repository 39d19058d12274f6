"""What the names of a model's files tell, in a directory or on the Hub: which are needed, and in which form."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from neuroal_jax.errors import UserError, shorten


@dataclass(frozen=True)
class WeightFiles:
    """How the weights of a model are named: one file, or shards that an index lists."""

    single: str
    index: str
    shards: str

    def among(self, names: Collection[str]) -> list[str]:
        """Those of some names that are such files."""
        return [name for name in sorted(names) if name in (self.single, self.index) or fnmatchcase(name, self.shards)]


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json", "*-of-*.safetensors")
PICKLED = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

ADAPTER = "adapter_config.json"
PACKED = "neuroal-packed.json"  # beside weights that no program loads before they are unpacked
TEMPLATES = "additional_chat_templates"
# What belongs to a model besides its weights: how it computes, how text becomes tokens, and under which terms it may be
# passed on. A model card is none of it: it describes, and measures, the weights that it was written for.
SIDE_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab*.json", "vocab.txt", "merges.txt", "tokenizer.model*", "*.model", "*.spm", "*.tiktoken"),
    *("bpe.codes", "dict.txt", "emoji.json", "normalizer.json"),
    *("LICENSE*", "LICENCE*", "license*", "NOTICE*", "Notice*", "USE_POLICY*"),
)
# In the Hub's patterns, * stands for / as well.
_IGNORED = (
    *("[!a]*/*", "a[!d]*/*"),  # all folders but the templates': other forms of the model, other models
    *("consolidated*", "adapter_model*"),
    *("*.*-of-*", "*-of-*.*.*"),  # variants: model.fp16-00001-of-00002, model-00001-of-00002.fp16
)
# Other forms that models are passed on in.
_OTHERS = ("*.pt", "*.pth", "*.ckpt", "*.bin", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "consolidated*.safetensors")
_UNPACK = "python -m convert.masks_to_torch unpack --packed {} --out DIR (once installed: neuroal-masks)"
_CONVERT = "python -m convert.to_safetensors --model {} --out DIR (once installed: neuroal-to-safetensors)"


def hub_patterns(weights: WeightFiles, names: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Patterns of the files of a repository to download and of those to leave there.

    Args:
        weights: In which form the weights are wanted.
        names: All files of the repository, as far as known. Of weights that are there in one file and in shards, the
            one file is wanted, as by transformers.
    """
    twice = (weights.index, weights.shards) if weights.single in names else ()
    allowed = [*SIDE_FILES, ADAPTER, weights.single, weights.index, weights.shards]
    return allowed, [*_IGNORED, *twice]


def check_listing(names: Collection[str], weights: WeightFiles, model: str) -> None:
    """Raises UserError if there are no weights of the wanted form among a model's files, saying what to do."""
    refuse_packed(names, model)
    if weights is PICKLED and (found := SAFETENSORS.among(names)):
        raise UserError(f"{model} holds safetensors already ({found[0]}): use it as it is")
    if weights.single in names or weights.index in names:
        return
    if found := weights.among(names):
        raise UserError(f"{model} holds shards ({found[0]}), but not their index {weights.index}: download it too")
    if found := PICKLED.among(names):
        raise UserError(
            f"{model} holds only pickled weights ({found[0]}): unpickling can run code, so they are not read; make "
            f"safetensors of them first: {_CONVERT.format(model)}"
        )
    missing = f"{model} holds no {weights.single} and no {weights.index}"
    accepted = (
        f"accepted are {SAFETENSORS.single} and shards with {SAFETENSORS.index}, and {PICKLED.single} or its shards "
        f"after {_CONVERT.format(model)}"
    )
    if ADAPTER in names:
        raise UserError(f"{missing}, but an adapter: merge it into its model first (merge_and_unload of PEFT)")
    if found := _among(names, _OTHERS):
        raise UserError(f"{missing}, but another form of weights ({shorten(found, 2)}): {accepted}")
    raise UserError(f"{missing}: {accepted}")


def refuse_packed(names: Collection[str], model: str) -> None:
    """Raises UserError if a model's files are those of a packed one."""
    if PACKED in names:
        raise UserError(f"{model} is packed ({PACKED}): unpack it first: {_UNPACK.format(model)}")


def _among(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in sorted(names) if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_side_file(name: str) -> bool:
    """Whether a file, by its path below the model's directory, is one of `SIDE_FILES`."""
    return bool(_among([name], SIDE_FILES))
