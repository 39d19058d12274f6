"""What a program reads is not touched, whatever it is called; one process at a time writes to a place."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neuroal_jax.errors import UserError
from neuroal_jax.files import claims, staging
from neuroal_jax.files.claims import beside, claimed
from neuroal_jax.files.protection import Inputs, lies_in, same_place
from neuroal_jax.files.records import Earlier
from neuroal_jax.files.staging import Shared, staged

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path):
    """A model as the Hub's cache has it: of links to files elsewhere; and beside it a link to it, and a hard link."""
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/blobs/abc").write_text("weights")
    model = tmp_path / "hub/snapshots/1"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").symlink_to("../../blobs/abc")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(model)
    os.link(model / "config.json", tmp_path / "elsewhere/hard")
    (tmp_path / "elsewhere/other").write_text("")
    return model


TOUCHED = {
    "itself": "hub/snapshots/1",
    "a file in it": "hub/snapshots/1/config.json",
    "a link in it": "hub/snapshots/1/model.safetensors",
    "something new in it": "hub/snapshots/1/sub/new/x",
    "above it": "hub/snapshots",
    "above all of it": "hub",
    "what a file of it is a link to": "hub/blobs/abc",
    "above that": "hub/blobs",
    "another name of a file": "elsewhere/hard",
    "through another name": "elsewhere/link/config.json",
    "by a detour": "hub/blobs/../snapshots/1/config.json",
}
FREE = ["elsewhere/other", "elsewhere/link", "elsewhere", "hub/refs", "hub/blobs/new", "new", "hub/snapshots/2"]


@pytest.mark.parametrize("path", TOUCHED.values(), ids=TOUCHED)
def test_nothing_in_above_or_below_an_input_is_replaced(tmp_path, model, path):
    with pytest.raises(UserError, match=f"--out: .* would be replaced, which belongs to --model {model}"):
        Inputs(("--masks", None), ("--model", model)).protect([tmp_path / "new", tmp_path / path], "--out")


@pytest.mark.parametrize("path", FREE)
def test_all_else_is_free(tmp_path, model, path):
    assert Inputs(("--model", model), ("--text", "nowhere")).touched_by(tmp_path / path) is None


def test_an_input_lies_in_what_is_above_it_not_in_what_it_holds(tmp_path, model):
    inputs = Inputs(("--model", model))
    for path in ("hub/snapshots/1", "hub/snapshots", "hub", "hub/blobs"):
        assert inputs.within(tmp_path / path), path
    for path in ("hub/snapshots/1/sub", "hub/snapshots/1/new", "elsewhere", "hub/snapshots/2"):
        assert inputs.within(tmp_path / path) is None, path


def test_a_link_that_leads_to_an_input_is_part_of_the_way(tmp_path, model):
    inputs = Inputs(("--model", tmp_path / "elsewhere/link"))
    for path in ("elsewhere/link", "elsewhere", "hub"):
        assert inputs.touched_by(tmp_path / path), path


def test_places_are_compared_by_inode(tmp_path, model):
    assert same_place(model, tmp_path / "elsewhere/link")
    assert same_place(tmp_path / "elsewhere/hard", model / "config.json")
    assert not same_place(tmp_path / "a", tmp_path / "b")
    assert lies_in(tmp_path / "elsewhere/link/new/x", model)
    assert not lies_in(model.parent, model)


MOUNTED = """
import subprocess, sys
from pathlib import Path
from neuroal_jax.files.protection import Inputs
model, mount = map(Path, sys.argv[1:])
if subprocess.run(["mount", "--bind", model, mount], capture_output=True).returncode:
    sys.exit(3)
sys.exit(not Inputs(("--model", model)).touched_by(mount / "new/x"))
"""


def test_two_names_by_a_bind_mount_are_one_place(tmp_path, model):
    (tmp_path / "mount").mkdir()
    command = [sys.executable, "-c", MOUNTED, model, tmp_path / "mount"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no right to mount")
    code = subprocess.run(["unshare", "-m", *command], cwd=ROOT).returncode
    if code == 3:
        pytest.skip("no right to mount")
    assert code == 0


# One process at a time.

HOLD = """
import sys, time
from pathlib import Path
from neuroal_jax.files.staging import staged
with staged(Path(sys.argv[1]), overwrite=True, marker="config.json", flag="--out") as new:
    (new / "config.json").write_text("half")
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write(directory, **options):
    with staged(directory, **{"overwrite": False, "marker": "config.json", "flag": "--out", **options}) as new:
        (new / "config.json").write_text("mine")
        (new / "sub").mkdir()
        (new / "sub/part").write_text("mine")


def contents(directory):
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
    (tmp_path / "other-name").symlink_to(tmp_path)
    for name in ("out", "other-name/out"):
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is writing there"):
            write(tmp_path / name)
    write(tmp_path / "out2")
    assert not (tmp_path / "out").exists()


def test_a_killed_process_is_in_nobodys_way_and_leaves_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.neuroal-files.json"}


@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_process_left_in_a_model_s_directory_goes_too(tmp_path, there):
    model, out = tmp_path / "model", tmp_path / "model/out"
    (out if there else model).mkdir(parents=True)
    (model / "config.json").write_text("theirs")
    killed = subprocess.run([sys.executable, "-c", KILLED, out, "1"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(model.rglob("*.partial"))) == 1
    write(out, inputs=Inputs(("--model", model)))
    assert sorted(contents(model)) == [".out.neuroal-files.json", "config.json", "out/config.json", "out/sub/part"]
    assert (model / "config.json").read_text() == "theirs"


def test_an_input_in_what_a_killed_process_left_stays(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out", "1"], cwd=ROOT).returncode
    (left,) = tmp_path.glob("*.partial")
    before = contents(left)
    write(tmp_path / "out", inputs=Inputs(("--model", left / "new")))
    assert contents(left) == before


def test_a_second_thread_is_refused_too(tmp_path):
    with claimed(tmp_path / "x.json", "--out"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), claimed(tmp_path / "x.json", "--out"):
            pass
        with claimed(tmp_path / "y.json", "--out"):
            pass
    with claimed(tmp_path / "x.json", "--out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_has_two_names_has_one_writer(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with claimed(tmp_path / "out", "--out"):
        monkeypatch.setattr(claims, "beside", lambda target, suffix: tmp_path / "as-if-elsewhere.lock")
        with pytest.raises(UserError, match="is writing there"), claimed(tmp_path / "out", "--out"):
            pass


def test_who_lost_its_lock_does_not_publish(tmp_path):
    with (
        pytest.raises(UserError, match="was removed while"),
        staged(tmp_path / "out", overwrite=False, marker="config.json", flag="--out") as new,
    ):
        (new / "config.json").write_text("mine")
        (tmp_path / ".out.lock").unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_called_like_a_lock_stays(tmp_path):
    (tmp_path / ".out.lock").write_text("my diary")
    with pytest.raises(UserError, match=r"\.out\.lock is no lock of this program: move it away"):
        write(tmp_path / "out")
    assert contents(tmp_path) == {".out.lock": "my diary"}


@pytest.mark.parametrize("name", ["a" * 255, "\u6f22" * 85])
def test_names_beside_a_target_are_short_enough_and_its_own(tmp_path, name):
    other = beside(tmp_path / f"{name[:-1]}b", ".lock")
    assert len(os.fsencode(beside(tmp_path / name, ".12345678.partial").name)) < 255
    assert beside(tmp_path / name, ".lock") not in (other, tmp_path / name)
    write(tmp_path / name)
    assert (tmp_path / name / "config.json").exists()


# A model's directory holds one run's files.


def test_an_overwritten_model_leaves_nothing_of_the_earlier_one(tmp_path):
    out = tmp_path / "out"
    with staged(out, overwrite=False, marker="config.json", flag="--out") as new:
        for name in ("config.json", "chat_template.jinja", "adapter_config.json", "old/part"):
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text("old")
    with pytest.raises(UserError, match=r"already holds a result \(config\.json\): pass --overwrite"):
        write(out)
    write(out, overwrite=True)
    assert contents(out) == {"config.json": "mine", "sub/part": "mine"}
    assert not (out / "old").exists()


def foreign(out):
    (out / "notes.txt").write_text("theirs")


def changed(out):
    (out / "sub/part").write_text("fine-tuned")


def linked(out):
    (out / "config.json").unlink()
    (out / "config.json").symlink_to("/etc/hostname")


def unrecorded(out):
    out.with_name(".out.neuroal-files.json").unlink()


def a_forged_record(out):
    record = out.with_name(".out.neuroal-files.json")
    files = {"../precious": {"bytes": 6, "mtime_ns": (out.parent / "precious").stat().st_mtime_ns}}
    record.write_text(json.dumps({"format": "neuroal-files-1", "files": files}))


@pytest.mark.parametrize("change", [foreign, changed, linked, unrecorded, a_forged_record])
def test_what_no_run_wrote_is_not_removed(tmp_path, change):
    (tmp_path / "precious").write_text("theirs")
    write(tmp_path / "out")
    change(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"--out .*/out already holds files that no earlier run is known to have written"
    ):
        write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_an_input_in_the_target_stays_though_a_run_wrote_it(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(UserError, match="belongs to --masks"):
        write(tmp_path / "out", overwrite=True, inputs=Inputs(("--masks", tmp_path / "out/sub/part")))
    assert contents(tmp_path / "out") == {"config.json": "mine", "sub/part": "mine"}


# All of it is published, or nothing.


class Stopped(BaseException):
    """Ends a process as an interrupt does, or, in a child, a kill."""


@pytest.mark.parametrize("moves", range(1, 5))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stopped()], ids=["full", "interrupted"])
def test_publishing_that_fails_leaves_what_was_there(tmp_path, monkeypatch, moves, error):
    write(tmp_path / "out")
    before = contents(tmp_path)
    stop_after(monkeypatch, moves, error)
    with pytest.raises((UserError, Stopped)):
        write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before
    write(tmp_path / "out2")  # no move is left to fail
    assert {path.name for path in tmp_path.iterdir() if "out2" not in path.name} == {"out", ".out.neuroal-files.json"}


def stop_after(monkeypatch, moves, error):
    move, left = staging.Staging._move, [moves]

    def move_and_stop(self, *paths):
        if left[0] > 0:
            left[0] -= 1
            if not left[0]:
                raise error
        move(self, *paths)

    monkeypatch.setattr(staging.Staging, "_move", move_and_stop)


KILLED = """
import os, signal, sys
from pathlib import Path
from neuroal_jax.files import staging
move, left = staging.Staging._move, [int(sys.argv[2])]
def move_or_die(self, *paths):
    left[0] -= 1
    left[0] or os.kill(os.getpid(), signal.SIGKILL)
    move(self, *paths)
staging.Staging._move = move_or_die
staging.Staging._record = lambda self: os.kill(os.getpid(), signal.SIGKILL)
with staging.staged(Path(sys.argv[1]), overwrite=True, marker="config.json", flag="--out") as new:
    (new / "config.json").write_text("new")
    (new / "more").write_text("new")
"""


@pytest.mark.parametrize("moves", range(1, 6))
def test_who_is_killed_while_publishing_leaves_what_was_there_or_all_that_is_new(tmp_path, moves):
    write(tmp_path / "out")
    before = contents(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out", str(moves)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="already holds a result"):
        write(tmp_path / "out")
    assert contents(tmp_path / "out") == (before if moves < 5 else {"config.json": "new", "more": "new"})
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.neuroal-files.json"}
    write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_two_targets_are_published_together_or_not_at_all(tmp_path):
    write(tmp_path / "first")
    before = contents(tmp_path)
    options = {"marker": "config.json", "flag": "--out"}
    with (
        pytest.raises(UserError, match=r"--out \S*/second already holds files"),
        staging.staging(tmp_path / "first", overwrite=True, **options) as first,
        staging.staging(tmp_path / "second", overwrite=False, **options) as second,
    ):
        for new in (first, second):
            (new.path / "config.json").write_text("new")
        (tmp_path / "second").mkdir()
        (tmp_path / "second/config.json").write_text("appeared meanwhile")
        staging.publish([first, second])
    assert contents(tmp_path) == {**before, "second/config.json": "appeared meanwhile"}


# Errors of the system name the file that they come from.


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"--out \S*/out cannot be written \(No space left on device\)"),
        (OSError(5, "Input/output error", "/data/text.txt"), "^/data/text.txt: Input/output error$"),
        (OSError(5, "Input/output error"), r"--out \S*/out was not written \(Input/output error\)"),
    ],
)
def test_an_error_of_the_system_is_blamed_on_its_file(tmp_path, error, message):
    with (
        pytest.raises(UserError, match=message),
        staged(tmp_path / "out", overwrite=False, marker="config.json", flag="--out"),
    ):
        raise error


def test_of_two_targets_the_one_that_cannot_be_written_is_named(tmp_path):
    options = {"overwrite": False, "marker": "config.json"}
    for number, name in enumerate(("first", "second")):
        with (
            pytest.raises(UserError, match=rf"--{name} \S*/{name} cannot be written \(File too large\)"),
            staged(tmp_path / "first", flag="--first", **options) as first,
            staged(tmp_path / "second", flag="--second", **options) as second,
        ):
            raise OSError(27, "File too large", str((first, second)[number] / "config.json"))


def test_other_files_of_a_directory_of_results_stay(tmp_path):
    shared = Shared(("config.json", "sub"), lambda directory: Earlier(frozenset({"config.json"})))
    for name in ("config.json", "notes.txt"):
        (tmp_path / name).write_text("there")
    write(tmp_path, overwrite=True, shared=shared)
    assert contents(tmp_path) == {"config.json": "mine", "sub/part": "mine", "notes.txt": "there"}
    shutil.rmtree(tmp_path / "sub")
    (tmp_path / "sub").write_text("theirs")
    with pytest.raises(UserError, match="sub exists already"):
        write(tmp_path, overwrite=True, shared=shared)
