"""Several processes at one plan of `evidence.py`: each trains what no other is training; all find it in one store."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from evidence_store import Busy, Store


WAIT = 0.5  # seconds between two looks at trainings that others are making


def share(calls: Sequence[Callable[[], object]], store: Store, parent: int | None = None) -> None:
    """
    Makes every call, those whose training is being made by another process when it is there.

    Args:
        calls: each takes one training from the store.
        parent: process without which this one stops.
    """
    store.waits = False
    try:
        rest = list(calls)
        while rest:
            busy = []
            for call in rest:
                if parent is not None and os.getppid() != parent:
                    raise KeyboardInterrupt
                try:
                    call()
                except Busy:
                    busy.append(call)
            if len(busy) == len(rest):
                time.sleep(WAIT)
            rest = busy
    finally:
        store.waits = True


@contextmanager
def helpers(number: int, folder: Path) -> Iterator[None]:
    """
    Processes of this command that train beside this one, with an equal part of its threads; what they say beside their
    progress is in `folder`. One that ends early is told of; what it had not finished, the others make.
    """
    threads = max(torch.get_num_threads() // (number + 1), 1)
    torch.set_num_threads(threads)
    script = str(Path(__file__).with_name("evidence.py"))
    command = [sys.executable, script, *sys.argv[1:], "--helper-of", str(os.getpid())]
    logs = [folder / f"helper_{index}.log" for index in range(number)]
    started = []
    try:
        for log in logs:
            with open(log, "wb") as file:
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                started.append(subprocess.Popen(command, stderr=file, env=environment))
        yield
        for process, log in zip(started, logs, strict=True):
            if process.wait():
                print(f"A helper ended early, with code {process.returncode}: see {log}.", flush=True)
    finally:
        for process in started:
            process.kill()
            process.wait()
