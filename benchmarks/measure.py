"""What the benchmarks share: steps timed in turn, peak memory, the machine in words, tables."""

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
# Buffers from this size on are given back to the system as soon as they are freed, so that what a process occupies
# is what it holds. By default glibc keeps freed buffers of up to 32 MB.
MMAP_THRESHOLD = "65536"


def clock(device: torch.device | str) -> float:
    """Seconds, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(steps: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T] | str]:
    """
    What every step returns, `repeats` times; the steps take turns: what else the machine does meets them all.

    A step that raises is not called again, and words take the place of its list.
    """
    results: dict[str, list[T] | str] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if isinstance(results[name], str):
                continue
            try:
                results[name].append(step())
            except Exception as error:
                results[name] = failure(error)
            if isinstance(results[name], str):
                free_memory()  # after the except clause, whose traceback keeps the tensors alive
    return results


def failure(error: Exception) -> str:
    # On CPUs torch raises a bare RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}"


def medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column by column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PeakMemory:
    """
    `bytes`: the most memory that was held inside the block, beyond what was held at its beginning.

    On GPUs, what torch allocated. On CPUs, the resident memory of the process, which says something only
    `in_fresh_process`; None where there is no /proc.
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
        Resident bytes now, where the peak begins anew.

        VmHWM is what getrusage calls ru_maxrss, but ru_maxrss can't be reset and begins, in a process just
        started, with the peak of the process that started it.
        """
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what is free and kept would be used again, and not seen
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return _process_status("VmRSS")
        except OSError:
            return None


def memory_words(device: torch.device | str) -> str:
    """What `PeakMemory` measured."""
    if torch.device(device).type == "cuda":
        return "the growth, at most, of what torch had allocated"
    return (
        "the growth, at most, of the resident memory of a fresh process, whose allocator gives freed buffers of "
        "64 kB and more back (`MALLOC_MMAP_THRESHOLD_`; not so where time is taken)"
    )


def megabytes(value: int | str | None) -> str:
    """Of bytes; words stay as they are."""
    return f"{value / 1e6:.4g}" if isinstance(value, int) else value or "-"


def _process_status(field: str) -> int:
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(path: Path, field: str) -> int:
    """In bytes, a field of a file like `VmRSS:   1234 kB`."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE)[1])


def available_memory() -> float:
    """Bytes of main memory that can be had; infinite where nobody says."""
    path = Path("/proc/meminfo")
    return _kibibytes(path, "MemAvailable") if path.is_file() else float("inf")


def in_fresh_process(function: Callable[..., T], *args: Any) -> T | str:
    """
    function(*args) in a process of its own, in which freed buffers go back to the system; words where it fails.

    Args:
        function: of a module's top level; it and its arguments are pickled.
    """
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = MMAP_THRESHOLD  # read when a process starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        return OUT_OF_MEMORY  # it was killed
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
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def device_slug(device: torch.device | str) -> str:
    """`cpu-2-cores`, `nvidia-h100`."""
    if torch.device(device).type == "cpu":
        return f"cpu-{torch.get_num_threads()}-cores"
    name = re.match(r"\D*\S*", torch.cuda.get_device_name())[0]  # to the end of the first word with a digit
    return "-".join(name.lower().split())


def versions(*packages: str) -> str:
    """Of distributions, by name; those not installed are left out."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def header(title: str, device: torch.device | str) -> str:
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    packages = versions("torch", "triton", "timm", "transformers", "open_clip_torch", "memeff")
    return f"# {title}\n\n- `{command}`\n- {machine(device)}\n- {packages}\n- {date.today()}\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned, so that it reads well in a terminal too; the first `left` columns to the left, the rest right."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts), encoding="utf-8")
