"""Several processes at one plan: none makes what another is making, and none is left behind."""

import os
import sys
from functools import partial
from threading import Event, Thread

import comparison
import evidence_workers
import pytest
from evidence_store import Busy, Store
from evidence_workers import helpers, share

from gap_closed_clip.training import load_config


@pytest.fixture
def b_in_progress(tmp_path):
    """An event that ends what another user of the folder is making, "b"."""
    started, ends = Event(), Event()

    def slowly(_):
        started.set()
        assert ends.wait(60)
        return {"made by": "another"}

    thread = Thread(target=Store(tmp_path).get, args=("b", {"name": "b"}, slowly))
    thread.start()
    assert started.wait(60)
    yield ends
    ends.set()
    thread.join()


def test_what_another_is_making_is_taken_when_it_is_there(tmp_path, b_in_progress):
    store, made, found = Store(tmp_path), [], {}

    def compute(name, _):
        made.append(name)
        if name == "c":
            b_in_progress.set()
        return {"made by": "this one"}

    def call(name):
        found[name] = store.get(name, {"name": name}, partial(compute, name))["result"]["made by"]

    share([partial(call, name) for name in "abc"], store)
    assert made == ["a", "c"]
    assert list(found.items()) == [("a", "this one"), ("c", "this one"), ("b", "another")]
    call("a")
    assert len(store.there) == 3 and store.new == 2 and store.waits


def test_a_store_that_does_not_wait_says_so(tmp_path, b_in_progress):
    store = Store(tmp_path)
    store.waits = False
    with pytest.raises(Busy, match="b"):
        store.get("b", {"name": "b"}, lambda _: pytest.fail("made twice"))
    assert not store.there


def test_progress_counts_what_another_has_made_in_the_meantime(tmp_path, b_in_progress, capsys):
    store = Store(tmp_path, workers=2)
    store.total, store.waits = 3, False
    store.get("a", {"name": "a"}, lambda _: {})
    with pytest.raises(Busy, match="b"):
        store.get("b", {"name": "b"}, lambda _: pytest.fail("made twice"))
    b_in_progress.set()
    Store(tmp_path).get("b", {"name": "b"}, lambda _: pytest.fail("made twice"))
    store.get("c", {"name": "c"}, lambda _: {})
    own = [line for line in capsys.readouterr().out.splitlines() if "/3]" in line]
    assert [line.split(" (")[0] for line in own] == ["[1/3] a", "[3/3] c"] and "about 0 minutes" in own[-1]


def test_what_failed_is_made_by_the_next(tmp_path):
    def fails(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        Store(tmp_path).get("a", {}, fails)
    assert Store(tmp_path).get("a", {}, lambda _: {"value": 1})["result"] == {"value": 1}


def test_a_helper_stops_without_its_parent(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        share([lambda: pytest.fail("went on")], Store(tmp_path), parent=os.getppid() + 1)


@pytest.fixture
def started(monkeypatch):
    """started(code) -> the list of the helpers, which run this code instead."""
    processes = []
    popen = evidence_workers.subprocess.Popen

    def started(code: str) -> list:
        def start(_, **kwargs):
            processes.append(popen([sys.executable, "-c", code], **kwargs))
            return processes[-1]

        monkeypatch.setattr(evidence_workers.subprocess, "Popen", start)
        return processes

    return started


def test_a_helper_that_ends_early_is_told_of(tmp_path, started, capsys):
    started("import sys; sys.exit('no memory')")
    with helpers(2, tmp_path):
        pass
    assert f"A helper ended early, with code 1: see {tmp_path / 'helper_1.log'}." in capsys.readouterr().out
    assert (tmp_path / "helper_0.log").read_text() == "no memory\n"


def test_no_helper_is_left_behind(tmp_path, started):
    processes = started("import time; time.sleep(600)")
    with pytest.raises(ZeroDivisionError), helpers(2, tmp_path):
        1 / 0  # noqa: B018
    assert [process.poll() is not None for process in processes] == [True, True]


def test_threads_are_shared(tmp_path, started, monkeypatch, capsys):
    counts = []
    monkeypatch.setattr(evidence_workers.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(evidence_workers.torch, "set_num_threads", counts.append)
    started("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '2')")
    with helpers(3, tmp_path):
        pass
    assert counts == [2] and capsys.readouterr().out == ""


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    inside, waiting, ends, trained, found = Event(), Event(), Event(), [], []

    def train(_):
        inside.set()
        assert ends.wait(60)
        trained.append(True)

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison, "is_done", lambda config, folder: bool(trained))
    monkeypatch.setattr(comparison, "read_metrics", lambda path: {"test": {"recall@10": 1.0}})
    monkeypatch.setattr(comparison, "print", lambda *_, **kwargs: waiting.set(), raising=False)
    config = load_config([])
    threads = [Thread(target=lambda: found.append(comparison.run_once(config, tmp_path / "folder"))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert waiting.wait(60)
    ends.set()
    for thread in threads:
        thread.join()
    assert trained == [True] and found == [{"recall@10": 1.0}] * 2
