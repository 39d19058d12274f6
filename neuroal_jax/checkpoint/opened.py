"""A model on disk, opened: its family and config, every tensor checked against the family's table, read on demand."""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.orbax import OrbaxSource, is_orbax
from neuroal_jax.checkpoint.safetensors import SafetensorsSource
from neuroal_jax.checkpoint.saving import Edit, copy_edited, copy_side_files, write_checkpoint
from neuroal_jax.checkpoint.tensors import (
    ALL,
    BASES,
    FLOAT_DTYPES,
    TensorSource,
    combine,
    digests,
    is_finite,
    is_zero,
    parameter_names,
    pieces,
)
from neuroal_jax.errors import UserError, one_line, shorten
from neuroal_jax.files.reading import SteadyFile, check_steady, parse_json, read_bounded
from neuroal_jax.models import family_of
from neuroal_jax.models.causal_lm import abstract_params
from neuroal_jax.models.family import Family, ParamRule, expand
from neuroal_jax.models.layers import VOCABULARY_PARAMS

log = logging.getLogger("neuroal_jax")

_CONFIG_BYTES = 2**24  # far more than any config.json has


@dataclass(frozen=True)
class BlockWeights:
    """One block's parameters: linears as `W[out, in]`, everything else by its Flax path inside the block."""

    linears: dict[str, np.ndarray]
    rest: dict[str, np.ndarray]


@dataclass(frozen=True)
class ConfigFile:
    """config.json: its content, the SHA-256 of its bytes, and the file, which has to stay."""

    content: Mapping[str, Any]
    sha256: str
    file: SteadyFile


@dataclass
class Checkpoint:
    """An opened checkpoint. `open_checkpoint` makes one; opening reads headers, and a head that may be tied."""

    path: Path
    config_file: ConfigFile
    family: Family
    config: Any
    source: TensorSource
    rules: tuple[ParamRule, ...]
    _seen_finite: set[tuple[str, int | None, int | None]] = field(default_factory=set)

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> str:
        """The stored dtype of the first linear, under NumPy's name."""
        return FLOAT_DTYPES[self.source.infos[self.linear_name(0, self.family.linears[0].name)].dtype].name

    def linear_name(self, block: int, linear: str) -> str:
        """The Hugging Face name of a linear's weight."""
        return self.family.tensor_name(self.config, block, linear)

    def prunable(self) -> dict[str, tuple[int, str]]:
        """Block number and linear of every prunable tensor, by Hugging Face name, in walking order."""
        return {
            self.linear_name(block, linear.name): (block, linear.name)
            for block in range(self.num_blocks)
            for linear in self.family.linears
        }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` of each linear of a block (the same in every block)."""
        infos = self.source.infos
        shapes = {linear.name: infos[self.linear_name(0, linear.name)].shape for linear in self.family.linears}
        return {name: (shape[0], shape[1]) for name, shape in shapes.items()}

    def input_widths(self) -> dict[str, int]:
        """Width of each input of a block's linears, by the name under which they read it (the same in every block)."""
        shapes = self.linear_shapes()
        return {linear.reads: shapes[linear.name][1] for linear in self.family.linears}

    @property
    def vocabulary(self) -> int:
        """Number of tokens, as the head has them."""
        return self.head_shape()[0]

    def head_shape(self) -> tuple[int, int]:
        """Tokens of the vocabulary, and the width in which the head looks at them."""
        (name,) = [rule.hf for path, rule in self._rules_of("head") if path == "embedding"]
        shape = self.source.infos[name].shape
        return shape[0], shape[1]

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """One tensor by Hugging Face name, or some rows of it, checked for NaN and infinity the first time.

        Raises:
            UserError: If an element is NaN or infinite.
        """
        array, part = self.source.read(name, rows), (name, rows.start, rows.stop)
        if not self._seen_finite & {part, (name, ALL.start, ALL.stop)}:
            if not is_finite(array):
                raise UserError(f"tensor {name} of {self.path} holds NaN or infinity: the checkpoint is damaged")
            self._seen_finite.add(part)
        return array

    def read_part(self, prefix: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters of `stem` or `head` by their Flax path inside it, in Flax orientation.

        Of those with a row for each token of the vocabulary, which may be large, the rows of `tokens` (ascending ids).
        """
        return {
            path: self._read_rows(rule.hf, tokens) if path in VOCABULARY_PARAMS else rule.across(self.read(rule.hf))
            for path, rule in self._rules_of(prefix)
        }

    def _read_rows(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """Rows of a tensor by ascending number; what lies between them is read a piece at a time."""
        found = []
        for rows in pieces(self.source.infos[name], int(wanted[0]), int(wanted[-1]) + 1):
            first, end = np.searchsorted(wanted, (rows.start, rows.stop))
            found.append(self.read(name, rows)[wanted[first:end] - rows.start])
        return np.concatenate(found)

    def read_block(self, block: int) -> BlockWeights:
        """One block's parameters; the linears keep Hugging Face's orientation."""
        names = {f"{linear.name}.kernel": linear.name for linear in self.family.linears}
        linears, rest = {}, dict(self.family.block_constants(self.config, block))
        for path, rule in self._rules_of("blocks.{block}"):
            array = self.read(rule.hf.format(block=block))
            if path in names:
                linears[names[path]] = array
            else:
                rest[path] = rule.across(array)
        return BlockWeights(linears, rest)

    def _rules_of(self, prefix: str) -> list[tuple[str, ParamRule]]:
        """The rules of one part of the Flax model, each with its path inside it."""
        start = f"{prefix}."
        return [(rule.flax.removeprefix(start), rule) for rule in self.rules if rule.flax.startswith(start)]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of all mapped tensors (`model`) and of the prunable ones, which masks are tied to (`prunable`).

        Reads, and so checks, every tensor, those too that a run may never need.
        """
        found = digests(sorted(expand(self.rules, self.num_blocks)), self.source.infos, self.read)
        prunable = self.prunable()
        return {
            "model": combine(found),
            "prunable": combine({name: digest for name, digest in found.items() if name in prunable}),
        }

    def zeros(self) -> list[dict[str, np.ndarray]]:
        """Where the prunable weights are zero, by block and linear: packed as masks are; no blocks if no weight is.

        Reads every prunable tensor.
        """
        found: list[dict[str, np.ndarray]] = [{} for _ in range(self.num_blocks)]
        for name, (block, linear) in self.prunable().items():
            packed = np.packbits(is_zero(self.read(name)), axis=1)
            # Most linears of most models have none: these share one byte.
            found[block][linear] = packed if packed.any() else np.broadcast_to(np.uint8(0), packed.shape)
        return found if any(packed.any() for block in found for packed in block.values()) else []

    def check_unchanged(self) -> None:
        """Raises UserError if config.json or a file of weights is not what it was when it was opened."""
        check_steady([self.config_file.file, *self.source.steady])

    def save_edited(self, directory: Path, edit: Edit) -> None:
        """Writes a Hugging Face checkpoint whose prunable tensors went through `edit`, with config and tokenizer.

        From safetensors, everything else is copied byte for byte; from Orbax, files are written anew.
        """
        if isinstance(self.source, SafetensorsSource):
            copy_edited(self.source, directory, self.prunable(), edit)
        else:
            write_checkpoint(self.source, directory, self.prunable(), edit)
        copy_side_files(self.path, directory)
        self.check_unchanged()


def open_checkpoint(model: str) -> Checkpoint:
    """Opens a directory (Hugging Face or Orbax), the embedded `demo`, or a model id on the Hugging Face Hub.

    Raises:
        UserError: If there is no such model, or it is one that cannot be read without guessing: unknown
            architecture or config attribute, missing, extra or misshapen tensors, pickled weights.
    """
    path = locate(model)
    config_file = read_config(path)
    family = family_of(config_file.content)
    config = family.parse_config(config_file.content)
    every = family.rules(replace(config, tie_word_embeddings=False))
    source: TensorSource = OrbaxSource(path, every, config) if is_orbax(path) else SafetensorsSource(path)
    source.rename(parameter_names(source.infos, expand(every, config.num_hidden_layers)))
    if config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=_settle_tie(path, source, every))
    _check_tensors(path, family, config, source, every)
    return Checkpoint(path, config_file, family, config, source, family.rules(config))


def read_config(path: Path) -> ConfigFile:
    """config.json of a checkpoint directory."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json: expected a Hugging Face checkpoint directory")
    steady = SteadyFile.at(file)
    try:
        content = read_bounded(file, _CONFIG_BYTES)
        config = parse_json(content.decode())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, expected an object")
    return ConfigFile(config, hashlib.sha256(content).hexdigest(), steady)


def _settle_tie(path: Path, source: TensorSource, rules: tuple[ParamRule, ...]) -> bool:
    """Whether embedding and head are one, where config.json says so.

    As in transformers 5: a file that holds only one of them holds both; two that differ are two.
    """
    embedding, head = (next(r.hf for r in rules if r.flax == f"{part}.embedding") for part in ("stem", "head"))
    if head not in source.infos:
        return True
    if embedding not in source.infos:
        source.rename({head: embedding})
        return True
    info = source.infos[embedding]
    comparable = info == source.infos[head] and info.dtype in FLOAT_DTYPES
    if comparable and all(_same_bits(source.read(embedding, part), source.read(head, part)) for part in pieces(info)):
        return True
    message = "%s: %s and %s differ, so they are not tied (as in transformers), although config.json says so"
    log.warning(message, path, embedding, head)
    return False


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first.reshape(-1).view(np.uint8), second.reshape(-1).view(np.uint8))


def _check_tensors(
    path: Path, family: Family, config: Any, source: TensorSource, untied: tuple[ParamRule, ...]
) -> None:
    """Raises UserError listing every tensor that is missing, extra, misshapen or of an unsupported dtype.

    A tied head may be there too, under the name that it has in the table `untied`.
    """
    try:
        shapes = abstract_params(family, config)
    except Exception as error:  # JAX raises several kinds for sizes beyond its own
        raise UserError(f"{path}: no model has the sizes that its config.json gives ({error})") from error
    expected = expand(family.rules(config), config.num_hidden_layers)
    tied = {rule.hf for rule in untied if rule.flax == "head.embedding"} if config.tie_word_embeddings else set()
    problems = []
    for name, (rule, _) in expected.items():
        info = source.infos.get(name)
        shape = shapes[rule.flax].shape[::-1] if rule.transpose else shapes[rule.flax].shape
        if info is None:
            problems.append(f"{name} is missing")
        elif info.shape != shape:
            problems.append(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    extra = [name for name in source.infos if name not in expected and name not in tied and not family.ignores(name)]
    unused = [name for name in sorted(extra) if family.leaves_out(name) or _is_unused_bias(name, expected)]
    problems += [f"{name} is not a tensor of a {family.name} model" for name in sorted({*extra}.difference(unused))]
    if problems:
        raise UserError(f"{path} does not match its config.json: {shorten(problems)}")
    if unused:
        log.warning(
            "%s", one_line(f"{path}: not used, as in transformers, by what config.json says: {shorten(unused)}")
        )


def _is_unused_bias(name: str, expected: Collection[str]) -> bool:
    """Whether a tensor is the bias of a linear, or norm, that has none in the model."""
    weight = f"{name.removesuffix('.bias')}.weight"
    return name.endswith(".bias") and any(base + weight in expected for base in ("", *BASES))
