"""Who follows a run: what a listener is told, in which thread, what ends the run, and that nothing is shown else."""

import logging
import sys
import threading
from itertools import groupby

import pytest

import neuroal_jax
from neuroal_jax.machine.devices import Devices, one_device
from neuroal_jax.resume import state as states
from neuroal_jax.run import progress
from neuroal_jax.run.progress import Bars, Progress, heard_by, stage
from tests.conftest import RUN

BLOCKS = 3
STAGES = [
    "open model",
    "read texts",
    "dense perplexity",
    "search: block step",
    "search: alignment",
    "search: row step",
    "prune",
    "pruned perplexity",
    "write",
]


def config(model, tokens, out, **options):
    options = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out), **options}
    return neuroal_jax.PruneConfig(**options)


class Heard:
    """A listener that keeps what it is told, and in which threads; it raises an error where it is told to."""

    def __init__(self, stops=lambda now: False, error=None):
        self.told, self.threads, self.stops, self.error = [], set(), stops, error

    def __call__(self, now):
        self.told.append(now)
        self.threads.add(threading.get_ident())
        if self.stops(now):
            raise self.error


@pytest.fixture(scope="module")
def followed(llama, tokens, tmp_path_factory):
    out, heard = tmp_path_factory.mktemp("followed") / "out", Heard()
    return neuroal_jax.prune(config(llama, tokens, out), progress=heard), heard


def test_stages_follow_each_other_and_go_from_nothing_to_all(followed):
    stages = {name: list(told) for name, told in groupby(followed[1].told, key=lambda now: now.stage)}
    assert list(stages) == STAGES
    for name, told in stages.items():
        done, seconds = [now.done for now in told], [now.seconds for now in told]
        assert (done[0], done[-1]) == (0, told[0].total), name
        assert done == sorted(set(done)), name
        assert seconds == sorted(seconds), name
        assert len({(now.total, now.unit) for now in told}) == 1, name
        if told[0].unit != "step":
            assert len(done) > BLOCKS, name  # once a block, at least


def test_it_changes_nothing_and_is_told_by_the_thread_that_called(followed, llama, tokens, tmp_path):
    result, heard = followed
    assert heard.threads == {threading.get_ident()}
    neuroal_jax.prune(config(llama, tokens, tmp_path / "out"))
    assert (tmp_path / "out" / "masks.safetensors").read_bytes() == (result.out / "masks.safetensors").read_bytes()


def test_so_it_is_on_several_devices(llama, tokens, tmp_path, monkeypatch):
    several = Devices(one_device().every * 3)
    monkeypatch.setattr("neuroal_jax.run.settle.own_devices", lambda config: several)
    heard = Heard()
    neuroal_jax.prune(config(llama, tokens, tmp_path / "out", candidate_batch=1, eval="none"), progress=heard)
    assert heard.threads == {threading.get_ident()}
    done = [now.done for now in heard.told if now.stage == "search: row step"]
    assert done[0] == 0
    assert done[-1] == 3 * BLOCKS
    assert len(done) > BLOCKS


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [Stopped("enough"), KeyboardInterrupt(), FileNotFoundError(2, "gone")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["search: row step", "write"])
def test_its_error_ends_the_run_which_can_go_on(followed, llama, tokens, tmp_path, monkeypatch, where, error):
    monkeypatch.setattr(states, "_SHARE", 0)  # a state after every block
    heard = Heard(lambda now: now.stage == where and now.done == now.total, error)
    ours = isinstance(error, OSError)
    with pytest.raises(RuntimeError if ours else type(error), match="the progress callback failed" if ours else None):
        neuroal_jax.prune(config(llama, tokens, tmp_path / "out"), progress=heard)
    assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]
    neuroal_jax.prune(config(llama, tokens, tmp_path / "out", resume=True), progress=(again := Heard()))
    assert len([now for now in again.told if now.stage == "dense perplexity"]) == 3  # nothing, all blocks, and the head
    masks = (tmp_path / "out" / "masks.safetensors").read_bytes()
    assert masks == (followed[0].out / "masks.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_function_shows_and_prints_nothing(llama, tokens, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "Bars", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    before = logging.getLogger("neuroal_jax").level
    neuroal_jax.prune(config(llama, tokens, tmp_path / "out", allocation="uniform"))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("neuroal_jax").handlers == []
    assert logging.getLogger("neuroal_jax").level == before


def test_other_threads_are_heard_of_with_the_next_word_of_the_own():
    heard = Heard()
    with heard_by(heard), stage("walk", 4, "block") as advance:
        for _ in range(2):
            other = threading.Thread(target=advance, args=(1,))
            other.start()
            other.join()
        assert [now.done for now in heard.told] == [0]
        advance(0)
        advance(0)
        advance(2)
    assert [now.done for now in heard.told] == [0, 2, 4]
    with stage("walk", 1, "block") as advance:
        advance(1)
    assert len(heard.told) == 3  # nobody listens any more


def test_bars_are_shown_one_at_a_time_and_taken_away(capsys):
    with pytest.raises(Stopped), Bars() as bars:
        bars(Progress("none", 0, 1, "step", 0.0))
        assert bars._bar is None
        bars(Progress("one", 0, 2, "block", 0.0))
        first = bars._bar
        bars(Progress("one", 2, 2, "block", 0.1))
        assert bars._bar is None
        bars(Progress("two", 0, 20_000, "weight", 0.0))
        second = bars._bar
        bars(Progress("three", 0, 2, "block", 0.0))
        raise Stopped
    assert first.n == 2
    assert second.disable  # closed by the next one
    assert bars._bar is None
    shown = capsys.readouterr().err
    assert "one:" in shown
    assert "0.00/20.0k" in shown
    assert shown.split("\r")[-1].strip() == ""
