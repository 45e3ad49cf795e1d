"""Search through the FAISS index of a `datasets.Dataset`: time to build, to load and to search it, memory, and recall.

    python benchmarks/search.py                                   # benchmarks/results/search_*.md
    python benchmarks/search.py --vectors 100000 --queries 50

The vectors are made up: normal, with a standard deviation of 1/sqrt(i) along the i-th axis, and normalised, so that
some directions matter more than others, as they do for embeddings. Queries are more of them, one at a time. *exact*
compares a query with every vector; *approximate* (IVF1024, 32 of its 1,024 lists searched) with a few. Every index is
built in a process of its own, saved, and searched in another one that has loaded it. With --busy times are processor
time on one thread, for a machine on which other programs run. Needs pip install "gap-closed-clip[search]"; nothing is
downloaded.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars, load_from_disk
from measure import RESULTS, PeakMemory, device_slug, header, in_fresh_process, markdown_table, write_report


COLUMN, VECTORS, QUERIES = "embedding", "vectors", "queries.npy"
LISTS, SEARCHED = 1024, 32
TOP = 10
TRAINED_ON = 40 * LISTS  # vectors; FAISS warns of fewer than 39 a list
FACTORIES = {"exact": "Flat", "approximate": f"IVF{LISTS},Flat"}


@dataclass
class Searched:
    """What a process that loaded an index found, and what that took."""

    load_seconds: float
    load_bytes: int | None
    query_seconds: list[float]
    ids: np.ndarray  # (queries, TOP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vectors", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--busy", action="store_true", help="processor time on one thread")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/search_<device>.md")
    args = parser.parse_args()
    rows = [row for number in args.vectors for row in measure(number, args.dim, args.queries, args.busy)]
    columns = ("vectors", "index", "built in s", "MB at most", "MB on the disk", "loaded in s", "MB loaded")
    columns += ("ms a query", "95th percentile", f"of the true {TOP}")
    notes = (
        f"D = {args.dim}, float32; {args.queries} queries one at a time, the median and the 95th percentile of their "
        f"times for {TOP} hits. FAISS {faiss.__version__}, "
        + ("processor time on one thread" if args.busy else f"{faiss.omp_get_max_threads()} thread(s)")
        + ".\n\n"
        "Memory is the growth, at most, of the resident memory of a fresh process, while the index is built (with the "
        "vectors themselves, which are mapped from the disk) and while it is loaded."
    )
    path = args.output or RESULTS / f"search_{device_slug('cpu')}.md"
    write_report(path, header("Search", "cpu"), markdown_table(columns, rows, left=2), notes)
    print(path.read_text(encoding="utf-8"))


def measure(number: int, dim: int, num_queries: int, busy: bool) -> list[list[str]]:
    """The rows of the table for so many vectors."""
    rows, true_ids = [], None
    with tempfile.TemporaryDirectory() as folder:
        expect(in_fresh_process(make_vectors, folder, number, dim, num_queries))
        for name, factory in FACTORIES.items():
            file = Path(folder, f"{name}.faiss")
            seconds, peak = expect(in_fresh_process(build, folder, file, factory, busy))
            searched = expect(in_fresh_process(search, folder, file, busy))
            true_ids = searched.ids if true_ids is None else true_ids
            rows.append([f"{number:,}", name, *figures(seconds, peak, file.stat().st_size, searched, true_ids)])
    return rows


def expect(result: Any) -> Any:
    """The result of a process; stops where it is the words of a failure."""
    if isinstance(result, str):
        raise SystemExit(f"{result}: give fewer --vectors.")
    return result


def figures(seconds: float, peak: int | None, size: int, searched: Searched, true_ids: np.ndarray) -> list[str]:
    found = [len(set(ids) & set(true)) / TOP for ids, true in zip(searched.ids, true_ids, strict=True)]
    times = searched.query_seconds
    return [
        f"{seconds:.1f}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
        f"{size / 1e6:.0f}",
        f"{searched.load_seconds:.1f}",
        "-" if searched.load_bytes is None else f"{searched.load_bytes / 1e6:.0f}",
        f"{1e3 * statistics.median(times):.2f}",
        f"{1e3 * np.percentile(times, 95):.2f}",
        f"{100 * np.mean(found):.1f}%",
    ]


def make_vectors(folder: str, number: int, dim: int, num_queries: int) -> None:
    """Writes unit vectors as a data set on the disk, as a user's embeddings lie there, and queries beside it."""
    rng = np.random.default_rng(0)
    deviations = np.arange(1, dim + 1, dtype=np.float32) ** -0.5

    def draw(count: int) -> np.ndarray:
        return unit(rng.standard_normal((count, dim), dtype=np.float32) * deviations)

    vectors = np.concatenate([draw(min(100_000, number - start)) for start in range(0, number, 100_000)])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
    disable_progress_bars()
    Dataset(pa.table({COLUMN: column})).save_to_disk(f"{folder}/{VECTORS}")
    np.save(f"{folder}/{QUERIES}", draw(num_queries))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timer(busy: bool) -> Callable[[], float]:
    """The clock; on a busy machine that of the processor, and one thread, whose time is then that of the work."""
    if busy:
        faiss.omp_set_num_threads(1)
    return time.process_time if busy else time.perf_counter


def build(folder: str, file: Path, factory: str, busy: bool) -> tuple[float, int | None]:
    """Builds and saves an index; the seconds that building took, and the memory."""
    disable_progress_bars()
    clock = timer(busy)
    dataset = load_from_disk(f"{folder}/{VECTORS}")
    train_size = None if factory == "Flat" else min(TRAINED_ON, len(dataset))
    with PeakMemory("cpu") as memory:
        start = clock()
        dataset.add_faiss_index(
            COLUMN, string_factory=factory, metric_type=faiss.METRIC_INNER_PRODUCT, train_size=train_size
        )
        seconds = clock() - start
    dataset.save_faiss_index(COLUMN, str(file))
    return seconds, memory.bytes


def search(folder: str, file: Path, busy: bool) -> Searched:
    """Loads an index and searches it, a query at a time."""
    clock = timer(busy)
    dataset, queries = load_from_disk(f"{folder}/{VECTORS}"), np.load(f"{folder}/{QUERIES}")
    with PeakMemory("cpu") as memory:
        start = clock()
        dataset.load_faiss_index(COLUMN, str(file))
        load_seconds = clock() - start
    index = dataset.get_index(COLUMN).faiss_index
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = SEARCHED
    dataset.search(COLUMN, queries[0], k=TOP)  # the first one also pays for what is set up once
    times, ids = [], []
    for query in queries:
        start = clock()
        ids.append(dataset.search(COLUMN, query, k=TOP).indices)
        times.append(clock() - start)
    return Searched(load_seconds, memory.bytes, times, np.stack(ids))


if __name__ == "__main__":
    main()
