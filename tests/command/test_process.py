"""How every program's process begins and ends: streams that are closed, full or of few characters; signals."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("default_signals")
ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PROGRAMS = [
    "neuroal_jax.prune",
    "neuroal_jax.report",
    "convert.hf_to_flax",
    "convert.masks_to_torch",
    "convert.to_safetensors",
    "eval.generation",
    "eval.perplexity",
    "eval.sweep",
    "eval.zero_shot",
]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def shell(line, **environment):
    """Runs a line of shell, in which $P is `python -m`; its exit code, stdout and stderr."""
    environment = {**ENVIRONMENT, "P": f"{sys.executable} -m", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_minds_streams_that_are_closed_or_full(program):
    line = "; ".join(
        f"$P {program} {what}; echo $? >&9"
        for what in (
            "--help <&- >&- 2>&-",
            "--help >/dev/full",
            "--bogus 2>/dev/full",
            "--bogus <&- 2>&-",
        )
    )
    code, codes, error = shell(f"exec 9>&1; {line}")
    assert code == 0
    assert codes.split()[-4:] == ["0", "2", "2", "2"]
    assert error == "error: stdout cannot be written (No space left on device)\n"


@pytest.mark.parametrize("program", ["neuroal_jax.prune", "convert.hf_to_flax"])  # help beyond a buffer, and below
def test_a_pipe_that_nobody_reads_ends_a_program_quietly(program):
    assert shell(f"{{ $P {program} --help; echo $? >&2; }} | true") == (0, "", "141\n")


def test_a_file_never_takes_the_number_of_a_closed_stream():
    code, printed, _ = shell(
        "$P neuroal_jax.report nowhere <&- 2>&-; "
        f"{sys.executable} -c 'import os; from neuroal_jax.command import process; process._mend_streams(); "
        'print(os.open("/dev/zero", os.O_RDONLY) > 2)\' <&- 2>&-'
    )
    assert (code, printed) == (0, "True\n")


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path, environment):
    name = os.fsencode(tmp_path) + "/mod\N{LATIN SMALL LETTER E WITH ACUTE}l-".encode() + b"\xff"
    os.mkdir(name)
    environment = {**environment, "NAME": os.fsdecode(name)}
    code, _, error = shell('$P neuroal_jax.prune --model "$NAME" --sparsity 0.5 --dry-run', **environment)
    assert code == 2
    assert error.count("\n") == 1
    assert "has no config.json" in error
    program = "import os; from neuroal_jax.command import process; process._mend_streams(); print(os.environ['NAME'])"
    code, printed, _ = shell(f'{sys.executable} -c "{program}"', **environment)
    assert code == 0
    assert "mod" in printed


@pytest.mark.parametrize(
    ("number", "module"),
    [(signal.SIGTERM, "yaml"), (signal.SIGINT, "numpy"), (signal.SIGTERM, "neuroal_jax.command.program")],
)
def test_a_signal_during_imports_ends_in_one_line(tmp_path, number, module):
    program = (
        "import os, sys\nfrom neuroal_jax.command.process import as_process\n"
        "class Finder:\n    def find_spec(name, path=None, target=None):\n"
        f"        if name == {module!r}:\n            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder)\nas_process('neuroal_jax.prune')"
    )
    options = ["--config", "options.yaml", "--out", str(tmp_path / "out")]
    (tmp_path / "options.yaml").write_text("model: demo\nsparsity: 0.5")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_program_that_is_over_keeps_its_exit_code(moment):
    """Whether a signal comes before or after Python takes down its handlers."""
    program = (
        "import atexit, os, signal\nfrom neuroal_jax.command.process import as_process\n"
        "class Late:\n    kill, pid, number = staticmethod(os.kill), os.getpid(), signal.SIGTERM\n"
        "    def __del__(self):\n        self.kill(self.pid, self.number)\n"
        + ("late = Late()\n" if moment == "after" else "atexit.register(Late().__del__)\n")
        + "as_process('neuroal_jax.report.page')"
    )
    done = subprocess.run([sys.executable, "-c", program, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_every_installed_program_is_one():
    from neuroal_jax.command import process

    for script, place in SCRIPTS.items():
        module, _, name = place.partition(":")
        assert module == process.__name__, script
        assert callable(getattr(process, name))


@pytest.mark.parametrize("kilobytes", [150_000, 300_000, 600_000])
def test_too_small_an_address_space_is_one_line(kilobytes):
    code, _, error = shell(f"ulimit -v {kilobytes}; $P neuroal_jax.prune --model demo --sparsity 0.5 --dry-run")
    assert code == 2
    assert error.startswith("error: out of memory")
    assert error.count("\n") == 1


def test_a_current_directory_that_is_gone_is_named(tmp_path):
    code, _, error = shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; $P neuroal_jax.report .")
    assert (code, error.count("\n")) == (2, 1)
    assert "the current directory" in error
