"""Directories that appear whole or not at all, while other threads of the process work on."""

import os
import threading
import time

from neuroal_jax.files.records import Earlier
from neuroal_jax.files.staging import Shared, staged


def test_results_appear_without_touching_the_umask_of_other_threads(tmp_path, monkeypatch):
    original = os.umask

    def slow_umask(mask):
        before = original(mask)
        time.sleep(0.001)  # time enough for another thread to see it
        return before

    published = threading.Event()
    modes = set()

    def publish(name):
        for number in range(20):
            shared = Shared(("done",), lambda directory: Earlier())
            target = tmp_path / f"{name}{number}"
            with staged(target, overwrite=False, marker="done", flag="--out", shared=shared) as staging:
                (staging / "done").touch(mode=0o600)

    def create():
        number = 0
        while not published.is_set():
            path = tmp_path / f"private{number}"
            path.touch()
            modes.add(path.stat().st_mode & 0o777)
            path.unlink()
            number += 1

    before = original(0o027)
    monkeypatch.setattr(os, "umask", slow_umask)
    try:
        publishers = [threading.Thread(target=publish, args=name) for name in "ab"]
        creator = threading.Thread(target=create)
        for thread in (creator, *publishers):
            thread.start()
        for thread in publishers:
            thread.join()
        published.set()
        creator.join()
    finally:
        after = original(before)
    assert after == 0o027
    assert modes == {0o640}
    results = list(tmp_path.iterdir())
    assert len(results) == 40
    assert {path.stat().st_mode & 0o777 for path in results} == {0o750}
    assert {(path / "done").stat().st_mode & 0o777 for path in results} == {0o640}
    assert all([file.name for file in path.iterdir()] == ["done"] for path in results)
