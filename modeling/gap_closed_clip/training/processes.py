"""Several processes that train together: whether they have found one another, how long they wait, and which hangs."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from .run_lock import RunLock


# In which launchers say how many processes there are.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Of the time that torch itself waits, so that the process that hangs is named before torch gives up.
SHARE = 0.9
GONE = "gone"
# What torch says where another process is gone or does not answer.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")


def started_processes() -> int:
    """How many processes the launcher has started, by the environment; 1 without one."""
    sizes = [int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()]
    return max(sizes, default=1)


def join_processes(on_cpu: bool, backend: str | None, timeout: float) -> None:
    """
    Makes the process group of several processes on CPUs, which transformers would let wait for half an hour whatever
    `ddp_timeout` says. Without launcher, and on GPUs, where it does as it is told, this does nothing.

    Args:
        timeout: in seconds.
    """
    ours = on_cpu and backend in (None, "gloo") and "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if ours and dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def check_processes(world_size: int) -> None:
    """
    Checks that the processes that were started train together.

    Args:
        world_size: how many do.

    Raises:
        ValueError: each would train alone and write the same files; a launcher started one where several were wanted.
    """
    started = started_processes()
    if world_size == 1 and started > 1:
        raise ValueError(
            f"This is process {os.environ.get('RANK', '?')} of {started}, but they don't train together: each would "
            "train alone and write the same files. On CPUs add use_cpu=true; on GPUs start them with torchrun or "
            "accelerate launch, which set LOCAL_RANK. For one process alone unset WORLD_SIZE."
        )
    simple = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ
    if world_size == 1 and simple:
        raise ValueError(
            "accelerate launch was asked for several processes and has started one, as it does on CPUs. Use `torchrun "
            "--nproc_per_node 2 -m gap_closed_clip_cli train ... use_cpu=true`; or --num_processes 1 for one."
        )


@contextmanager
def held_by_the_first(folder: str, process_index: int) -> Iterator[None]:
    """
    Holds the output folder: the first of several processes has the lock, and all of them end where it can't.

    Raises:
        ValueError, OSError: as `RunLock`, on every process.
    """
    with ExitStack() as stack:
        error: ValueError | OSError | None = None
        if process_index == 0:
            try:
                stack.enter_context(RunLock(folder))
            except (ValueError, OSError) as refused:
                error = refused
        said = [None if error is None else str(error)]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(said)
        if error is not None:
            raise error
        if said[0] is not None:
            raise ValueError(said[0])
        yield


@contextmanager
def losing_no_process() -> Iterator[None]:
    """
    Around whatever several processes do together.

    Raises:
        OSError: another one ended, or did not answer for `ddp_timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        together = dist.is_available() and dist.is_initialized()
        if not together or not (isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)):
            raise
        line = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"Process {dist.get_rank()} of {dist.get_world_size()} has lost another, which ended or did not answer "
            f"in training.ddp_timeout ({line:.200}). What it said itself stands further up. Start all again with "
            "resume_from_checkpoint=auto."
        ) from error


class WatchCallback(TrainerCallback):
    """
    Ends all processes where a step does not: with a line on each about where it stands.

    Args:
        seconds: that a step may take.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._store: Any = None
        self._over = threading.Event()
        self._step = 0
        self._since: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._store = dist.distributed_c10d._get_default_store()
            self._main = threading.get_ident()
            threading.Thread(target=self._watch, name="watch of steps", daemon=True).start()

    def on_step_begin(self, args, state, control, **kwargs):
        if self._store is not None:
            self._step, self._since = state.global_step + 1, time.monotonic()
            self._store.set(f"gap_closed_clip/step/{dist.get_rank()}", str(self._step))

    def on_step_end(self, args, state, control, **kwargs):
        self._since = None

    def on_train_end(self, args, state, control, **kwargs):
        self._over.set()

    def _watch(self) -> None:
        pause = min(self.seconds / 40, 5.0)  # a few of them in the time that torch waits longer
        while not self._over.wait(pause):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds:
                self._end(f"Step {self._step} has not ended within {self.seconds:g} s ({self._steps()}).", 2 * pause)
            if self._asked(lambda: self._store.check(["gap_closed_clip/over"])):
                self._end("Another process waits in vain for this one, or for a third.", 0.0)

    def _end(self, what: str, pause: float) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        print(
            f"Process {rank} of {size} (from 0): {what} It stands at {_place(self._main)}. Training ends; earlier "
            "checkpoints are as they were. A step may take 0.9 times training.ddp_timeout.",
            file=sys.stderr,
            flush=True,
        )
        self._asked(lambda: self._store.set("gap_closed_clip/over", str(rank)))
        time.sleep(pause)  # until the others have seen it
        os._exit(1)

    def _steps(self) -> str:
        """Which process has come how far."""
        size = dist.get_world_size()
        keys = [f"gap_closed_clip/step/{rank}" for rank in range(size)]
        steps = [self._asked(lambda key=key: self._store.check([key]) and self._store.get(key)) for key in keys]
        begun = [int(step) if isinstance(step, bytes) else 0 for step in steps]
        behind = [str(rank) for rank, step in enumerate(begun) if step < max(begun)]
        if behind:
            return f"process {' and '.join(behind)} has not begun it"
        return "all processes have begun it; the one that stands outside torch.distributed hangs"

    def _asked(self, question) -> Any:
        """The store's answer; GONE where its process is, None where it gives none in 10 s."""
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(question())
            except (RuntimeError, ValueError):  # the process that keeps the store is gone
                answers.append(GONE)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(10.0)
        return answers[0] if answers else None


def _place(thread: int) -> str:
    """Where a thread is: file, line and function."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}, in {frame.f_code.co_name}"


__all__ = [
    "SHARE",
    "WatchCallback",
    "check_processes",
    "held_by_the_first",
    "join_processes",
    "losing_no_process",
    "started_processes",
]
