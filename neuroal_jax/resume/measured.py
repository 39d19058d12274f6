"""What runs measured, kept for each other: the outputs of whole walks, in files named by all that they depend on.

`--measured DIR` holds a file for each walk: `LABEL-HASH.measured`, the SHA-256 of what the walk's outputs follow from
(model, tokens, software, device, and what it was asked). A run that would walk so again takes the outputs from there,
bit for bit what it would find itself. Files appear whole or not at all, so runs may share a directory at any time.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.resume.store import Output, bytes_of, read_tree, save_tree

log = logging.getLogger("neuroal_jax")

About = Mapping[str, Any]  # what a walk's outputs depend on, by names for people; as JSON has it


@dataclass
class Measured:
    """The walks in a directory that this run may take, and to which it adds its own.

    Attributes:
        directory: Where they lie; made when the first is kept.
        common: What all walks of this run depend on: the model's content, software, device.
        run: What to call this run in what it keeps.
        check: Raises UserError if the model is no longer what `common` says.
        reused: The walks that this run took: label, file, what they depend on, which run walked, for how many seconds.
    """

    directory: Path
    common: About
    run: str
    check: Callable[[], None]
    reused: list[dict[str, Any]] = field(default_factory=list)

    def find(self, label: str, about: About, num_blocks: int) -> list[Output] | None:
        """The outputs of every block of a walk that a run did before; None if there is none to be had."""
        path, identity = self._place(label, about)
        if not path.is_file():
            return None
        try:
            blocks, kept = read_tree(path)
            if kept["identity"] != identity or blocks.keys() != {str(block) for block in range(num_blocks)}:
                raise ValueError("it is of another walk")
            seconds, run = float(kept["seconds"]), str(kept["run"])
        except Exception as error:  # safetensors, zlib and json raise many kinds for damaged files
            log.info("%s is damaged (%s): measuring anew", path, " ".join(str(error).split())[:200])
            return None
        self.reused.append({"walk": label, "file": path.name, **about, "run": run, "seconds": seconds})
        log.info("%s: as %s measured it (%s)", label, run, path)
        return [blocks[str(block)] for block in range(num_blocks)]

    def keep(self, label: str, about: About, outputs: list[Output], seconds: float) -> None:
        """Keeps a walk for other runs; what cannot be written is only mentioned.

        Raises:
            UserError: If the model changed while it was walked.
        """
        path, identity = self._place(label, about)
        self.check()
        blocks = {str(block): output for block, output in enumerate(outputs)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_tree(path, blocks, identity=identity, run=self.run, seconds=round(seconds, 3))
        except Exception as error:  # as in `resume.state`
            log.info("%s is not kept in %s (%s)", label, self.directory, " ".join(str(error).split())[:200])

    def _place(self, label: str, about: About) -> tuple[Path, dict[str, Any]]:
        """The file of a walk, and its identity as that file tells it."""
        text = json.dumps({"walk": label, **self.common, **about}, sort_keys=True)
        name = f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.measured"
        return self.directory / name, json.loads(text)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays."""
    found = hashlib.sha256()
    for part in bytes_of(arrays):
        found.update(part)
    return found.hexdigest()
