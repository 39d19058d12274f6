"""What can be known of a release before it is one: builds it into dist/, looks into it, installs it and runs the demo.

make release-check
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

from neuroal_jax.command.program import run_program
from neuroal_jax.errors import UserError, shorten

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# What setuptools and setuptools-scm add to the files of git.
ADDED = re.compile(r"PKG-INFO|setup\.cfg|neuroal_jax\.egg-info/.*|neuroal_jax/_version\.py")
DEMO = "--model demo --sparsity 0.7 --pruner wanda --allocation neuroal --step both --out results --save-model model"
VERIFY = "verify --model model --masks results/masks.safetensors --files-only"


def check() -> None:
    """Does all of it, and says what was done.

    Raises:
        UserError: At the first thing that is wrong.
    """
    with tempfile.TemporaryDirectory() as scratch:
        build(DIST)
        (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
        build(Path(scratch) / "direct", "--wheel")
        (direct,) = (Path(scratch) / "direct").glob("*.whl")
        version = wheel.name.split("-")[1]
        print(f"built {sdist.name} and {wheel.name} in {DIST}", flush=True)
        tags = run("git", "tag", "--points-at", "HEAD").split()
        print(release_of(version, tags, (ROOT / "CHANGELOG.md").read_text()), flush=True)
        same_names(
            files_of_sdist(sdist), run("git", "ls-tree", "-r", "--name-only", "-z", "HEAD").strip("\0").split("\0")
        )
        same_wheels(contents(wheel), contents(direct))
        run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
        print(
            "the sdist holds what git does, the wheel made from it is the checkout's, twine finds nothing", flush=True
        )
        pythons = {python: interpreter(python) for python in supported()}
        for python, program in pythons.items():
            if program is not None:
                try_out(program, wheel, version, Path(scratch) / python)
                print(f"Python {python}: installed, the demo pruned and verified", flush=True)
        if missing := [python for python, program in pythons.items() if program is None]:
            print(f"not found, so not tried: Python {', '.join(missing)}")
        if not any(pythons.values()):
            raise UserError(f"no Python of {', '.join(pythons)} was found: install one")


def run(*command: str, cwd: Path = ROOT) -> str:
    """What a program prints to stdout.

    Raises:
        UserError: If it fails, with the last line that it printed.
    """
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise UserError(f"{shlex.join(command)} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def build(directory: Path, *options: str) -> None:
    """Builds an sdist, and a wheel from it, or what options ask for, into a directory that is emptied first."""
    for before in (directory, ROOT / "build"):  # setuptools puts all that lies in build/ into a wheel
        shutil.rmtree(before, ignore_errors=True)
    run(sys.executable, "-m", "build", *options, "--outdir", str(directory))


def release_of(version: str, tags: Iterable[str], changelog: str) -> str:
    """Which release a commit with these tags is, in a line.

    Raises:
        UserError: If its tag is another version than what was built, or the changelog does not tell of it.
    """
    releases = [tag for tag in tags if re.match(r"v\d", tag)]
    if not releases:
        return f"no tag vX.Y.Z at this commit: version {version} is no release"
    if releases != [f"v{version}"]:
        raise UserError(f"the commit is {', '.join(releases)} but builds version {version}: one tag, no changed files")
    if not re.search(rf"^## \[{re.escape(version)}\]", changelog, re.MULTILINE):
        raise UserError(f"CHANGELOG.md has no section '## [{version}]': give 'Unreleased' that name")
    return f"release {version}"


def files_of_sdist(sdist: Path) -> list[str]:
    """Files in an sdist, as named in its one directory, but those that building adds."""
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()]
    return [name for name in names if not ADDED.fullmatch(name)]


def same_names(found: Collection[str], tracked: Collection[str]) -> None:
    """Raises UserError if an sdist lacks a file of git, or holds another."""
    if lost := sorted({*tracked} - {*found}):
        raise UserError(f"the sdist lacks {shorten(lost)}, which git has: see [tool.setuptools_scm] in pyproject.toml")
    if stray := sorted({*found} - {*tracked}):
        raise UserError(f"the sdist holds {shorten(stray)}, which git does not have: add or remove it")


def contents(wheel: Path) -> dict[str, int]:
    """The checksum of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def same_wheels(from_sdist: dict[str, int], from_checkout: dict[str, int]) -> None:
    """Raises UserError if two wheels do not hold the same."""
    files = sorted({*from_sdist, *from_checkout})
    if different := [name for name in files if from_sdist.get(name) != from_checkout.get(name)]:
        raise UserError(f"wheels of the sdist and of the checkout differ in {shorten(different)}: is it in git?")


def supported() -> list[str]:
    """Versions of Python that the package says it runs on."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    prefix = "Programming Language :: Python :: "
    return [name.removeprefix(prefix) for name in classifiers if re.fullmatch(prefix + r"3\.\d+", name)]


def interpreter(version: str) -> str | None:
    """A Python of a version that can make virtual environments: this one, one on the PATH, or one of pyenv's."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    this = sys.executable if version == f"{sys.version_info.major}.{sys.version_info.minor}" else None
    for program in (this, shutil.which(name), *map(str, sorted(pyenv.glob(f"{version}.*/bin/{name}")))):
        if (
            program
            and subprocess.run([program, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0
        ):
            return program
    return None


def try_out(python: str, wheel: Path, version: str, directory: Path) -> None:
    """Installs a wheel in a virtual environment of its own, and runs its programs where nothing else is.

    Raises:
        UserError: If a program fails, or is of another version.
    """
    environment, elsewhere = directory / "environment", directory / "elsewhere"
    elsewhere.mkdir(parents=True)
    run(python, "-m", "venv", str(environment))
    programs = environment / "bin"
    pip = (str(programs / "pip"), "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    run(*pip, "check")
    prune, masks = str(programs / "neuroal-prune"), str(programs / "neuroal-masks")
    told = run(prune, "--version", cwd=elsewhere).splitlines()[0]
    if told != f"neuroal_jax {version}":
        raise UserError(f"the installed neuroal-prune --version begins with '{told}', expected version {version}")
    run(prune, "--help", cwd=elsewhere)
    run(prune, *DEMO.split(), cwd=elsewhere)
    run(masks, *VERIFY.split(), cwd=elsewhere)
    shutil.rmtree(environment)  # gigabytes


if __name__ == "__main__":
    sys.exit(run_program(check))
