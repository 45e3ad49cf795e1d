"""What the benchmarks share: steps that take turns, peak memory, a description of the machine, tables."""

import ctypes
import gc
import importlib.util
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch


T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
OUT_OF_MEMORY = "out of memory"
# Freed buffers of this many bytes and more go back to the system at once, so that the memory a process occupies is the
# memory it uses. By default glibc keeps freed buffers of up to 32 MB.
MMAP_THRESHOLD = "65536"


def clock(device: torch.device | str) -> float:
    """The time in seconds, after the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(steps: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T] | str]:
    """
    What each step returns, called `repeats` times. Steps take turns, so that other load on the machine meets them all.

    A step that raises is not called again; its result is then the failure in words.
    """
    results: dict[str, list[T] | str] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if not isinstance(results[name], str):
                result = attempt(step)
                results[name] = result if isinstance(result, str) else [*results[name], result]
    return results


def attempt(step: Callable[[], T]) -> T | str:
    """What a step returns or, if it raises, the failure in words."""
    try:
        return step()
    except Exception as error:
        words = failure(error)
    free_memory()  # not in the except clause, where the traceback still keeps the tensors alive
    return words


def failure(error: Exception) -> str:
    """An exception in words for a table; one that is not about memory is also printed."""
    # On CPUs torch raises a bare RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}"


def medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """The median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PeakMemory:
    """
    A context manager. Its `bytes` are the most memory in use at any time inside the block, less that at its beginning.

    On GPUs this is the memory that torch allocated. On CPUs it is the resident memory of the process, which tells
    something only `in_fresh_process`; it is None on systems without /proc.
    """

    def __init__(self, device: torch.device | str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        free_memory()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = self._reset_resident_peak()
        return self

    def __exit__(self, *_) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif self._before is not None:
            self.bytes = max(_process_status("VmHWM") - self._before, 0)

    @staticmethod
    def _reset_resident_peak() -> int | None:
        """
        Resets the peak to the resident memory, and returns that in bytes; None if the system can't.

        The peak is read from VmHWM. getrusage's ru_maxrss is the same number, but it can't be reset and starts, in a
        new process, from the peak of the process that started it.
        """
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # free memory that the process kept would be used first, and the peak miss it
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return _process_status("VmRSS")
        except OSError:
            return None


def memory_words(device: torch.device | str) -> str:
    """What `PeakMemory` measures, in words."""
    if torch.device(device).type == "cuda":
        return "the growth, at most, of what torch had allocated"
    return (
        "the growth, at most, of the resident memory of a fresh process, whose allocator gives freed buffers of "
        "64 kB and more back (`MALLOC_MMAP_THRESHOLD_`; not so where time is taken)"
    )


def megabytes(value: int | str | None) -> str:
    """A number of bytes in MB (10^6 bytes); words stay as they are."""
    return f"{value / 1e6:.4g}" if isinstance(value, int) else value or "-"


def _process_status(field: str) -> int:
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    """The bytes that a file in /proc gives for a field, as in `VmRSS:   1234 kB`."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)[1])


def available_memory() -> float:
    """Bytes of main memory that are available; infinite on systems without /proc."""
    path = Path("/proc/meminfo")
    return _kibibytes(path, "MemAvailable") if path.is_file() else float("inf")


def in_fresh_process(function: Callable[..., T], *args: Any) -> T | str:
    """
    Runs function(*args) in a process of its own, which gives freed buffers back to the system; returns its result or,
    if it fails, the failure in words.

    Args:
        function: defined at the top level of a module, since it is pickled, as are its arguments.
    """
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = MMAP_THRESHOLD  # read when a process starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        return OUT_OF_MEMORY  # the system killed the process
    except Exception as error:
        return failure(error)
    finally:
        if before is None:
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def machine(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def device_slug(device: torch.device | str) -> str:
    """The device as a part of a file's name: `cpu-2-cores`, `nvidia-h100`."""
    if torch.device(device).type == "cpu":
        return f"cpu-{torch.get_num_threads()}-cores"
    name = re.match(r"\D*\S*", torch.cuda.get_device_name())[0]  # to the end of the first word with a digit
    return "-".join(name.lower().split())


def versions(*packages: str) -> str:
    """Names and versions of those of the packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def command_line() -> str:
    """The command that this script was started with."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def header(title: str, device: torch.device | str) -> str:
    """The head of a report: title, command, machine, versions and date."""
    packages = versions("torch", "triton", "timm", "transformers", "open_clip_torch", "memeff")
    return f"# {title}\n\n- `{command_line()}`\n- {machine(device)}\n- {packages}\n- {date.today()}\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """
    A Markdown table, padded so that it reads well in a terminal too. The first `left` columns are aligned to the left,
    the others to the right.
    """
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def write_report(path: Path, *parts: str) -> None:
    """Writes the parts of a report, with an empty line between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts), encoding="utf-8")
