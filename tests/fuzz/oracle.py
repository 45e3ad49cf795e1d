"""
What a user sees of a command that is given one bad input: judged by its exit code, what it prints, time and memory.

Every case runs in a fork of this process, which has everything imported: it can hang, crash or eat memory, and nothing
of it stays.
"""

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gap_closed_clip_cli


SECONDS, MEGABYTES = 10.0, 2048
# A fork begins with what this process has, of which pytest and earlier tests may hold much: so much may a case add.
OWN_MEGABYTES = 1400
KILLED_AFTER = 4 * SECONDS  # by the clock, which tells that something waits
MORE_MEMORY = 3 * 2**30  # that a case may ask for beyond what the process has: a machine must survive what is tried
MOST_LINES, MOST_LETTERS = 8, 3000  # of a message: a line, or a line and a short list
Main = Callable[[str, list[str]], int]  # a command and its words -> exit code
GOOD = ("accepted", "refused")
CRASHED = 97


@dataclass
class Outcome:
    """
    How a command ended.

    Args:
        kind: "accepted" (exit code 0), "refused" (exit code 1, and a message), or what must not be: "traceback",
            "slow", "memory", "silence" (exit code 1 without a message), "unnamed" (a message without the field, the
            row or the file), "verbose".
        message: what was printed about the error; of a traceback its end.
        seconds, megabytes: what it took: seconds of the processor, so that other processes do not count, and the
            memory of the whole process, with torch in it.
    """

    kind: str
    message: str
    seconds: float
    megabytes: float

    @property
    def good(self) -> bool:
        return self.kind in GOOD


def run_case(command: str, words: list[str], folder: Path, named: str = "", main: Main | None = None) -> Outcome:
    """
    Runs a command in `folder`, in a process of its own, and judges it.

    Args:
        named: a regular expression of what an error message has to name.
        main: what runs it; by default `gap-closed-clip`.
    """
    (folder / "out").touch()
    (folder / "err").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    before = _resident_megabytes()
    child = os.fork()
    if child == 0:
        _be_the_command(main or gap_closed_clip_cli.main, command, words, folder)
    code, usage = _wait(child, start)
    seconds = usage.ru_utime + usage.ru_stime
    megabytes = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    printed = (folder / "err").read_text(encoding="utf-8", errors="replace")
    return judge(command, code, printed, seconds, megabytes, named, before)


def judge(
    command: str, code: int, printed: str, seconds: float, megabytes: float, named: str, before: float = 0
) -> Outcome:
    """
    What an exit code, the error output, the time and the memory amount to.

    Args:
        code: negative if a signal ended the process.
        before: megabytes that the process began with.
    """
    start = printed.find(f"gap-closed-clip {command}: ")
    message = printed[start:].strip() if start >= 0 else ""
    out_of_memory = any(words in printed for words in ("MemoryError", "DefaultCPUAllocator", "Cannot allocate memory"))
    if megabytes > max(MEGABYTES, before + OWN_MEGABYTES) or out_of_memory:
        kind, message = "memory", message or printed[-600:]
    elif code == -signal.SIGKILL or seconds > SECONDS:
        kind, message = "slow", message or printed[-600:]
    elif code == 0:
        kind = "accepted"
    elif code != 1 or "Traceback (most recent call last)" in printed:
        kind, message = "traceback", printed[-1500:]
    elif not message.removeprefix(f"gap-closed-clip {command}:").strip():
        kind = "silence"
    elif message.count("\n") >= MOST_LINES or len(message) > MOST_LETTERS:
        kind = "verbose"
    elif not re.search(named, message.removeprefix(f"gap-closed-clip {command}: ")):
        kind = "unnamed"
    else:
        kind = "refused"
    return Outcome(kind, message, seconds, megabytes)


def _resident_megabytes() -> float:
    """Of this process, on Linux; elsewhere 0."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _be_the_command(main: Main, command: str, words: list[str], folder: Path) -> None:
    """The child: never returns."""
    code = CRASHED
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        os.chdir(folder)
        if sys.platform == "linux":
            occupied = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (occupied + MORE_MEMORY,) * 2)
        code = main(command, words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, start: float) -> tuple[int, resource.struct_rusage]:
    while time.monotonic() - start < KILLED_AFTER:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage
