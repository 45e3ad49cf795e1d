"""
Tries many bad inputs and writes a table of what came of them.

    python tests/fuzz/run.py --examples 2000 --output outputs/fuzz.md
    python tests/fuzz/run.py --areas tables images --seed 3

The examples are shared out over the areas. Whatever is not good ends up beside the table, with its input.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

import conftest  # noqa: E402, F401  # before the libraries: caches of its own, which go when it ends
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from measure import machine, versions  # noqa: E402

from fuzz.areas import AREAS  # noqa: E402
from fuzz.base import Base  # noqa: E402
from fuzz.oracle import Outcome, run_case  # noqa: E402


COLUMNS = ("refused", "accepted", "traceback", "slow", "memory", "silence", "unnamed", "verbose")


def try_area(name: str, base: Base, examples: int, number: int) -> list[tuple[str, Outcome]]:
    """So many different inputs of an area, each with how it ended."""
    area, tried = AREAS[name], {}

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(area.inputs(base))
    def run(value) -> None:
        told = repr(value)
        if told in tried:
            return
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            command, words = area.prepare(value, Path(folder), base)
            tried[told] = run_case(command, words, Path(folder), area.named, area.main)

    run()
    return list(tried.items())


def table(found: dict[str, list[tuple[str, Outcome]]], command: str) -> str:
    """Command, machine, versions and date, the counts by area, and a few messages of each."""
    header = ["area", "tried", *COLUMNS, "slowest", "most memory"]
    lines = ["# Bad inputs", "", f"- `{command}`", f"- {machine('cpu')}"]
    lines += [f"- {versions('torch', 'transformers', 'hypothesis')}", f"- {time.strftime('%Y-%m-%d')}", ""]
    lines.append(f"| {' | '.join(header)} |")
    lines.append("| --- |" + " ---: |" * (len(header) - 1))
    total: Counter = Counter()
    everything = [outcome for outcomes in found.values() for _, outcome in outcomes]
    for name, outcomes in [*found.items(), ("", [("", outcome) for outcome in everything])]:
        counts = Counter(outcome.kind for _, outcome in outcomes)
        total += counts
        slowest = max(outcome.seconds for _, outcome in outcomes)
        most = max(outcome.megabytes for _, outcome in outcomes)
        title = AREAS[name].title if name else "all"
        cells = [title, len(outcomes), *(counts[kind] for kind in COLUMNS), f"{slowest:.1f} s", f"{most:.0f} MB"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for name, outcomes in found.items():
        said = dict.fromkeys(" ".join(o.message.split())[:300] for _, o in outcomes if o.kind == "refused")
        lines += [f"{AREAS[name].title}:", "", *(f"    {line}" for line in list(said)[:4]), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=700)
    parser.add_argument("--areas", nargs="*", choices=AREAS, default=list(AREAS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/fuzz.md"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz_base_") as folder:
        base = Base.make(Path(folder))
        found = {}
        for name in args.areas:
            start = time.monotonic()
            found[name] = try_area(name, base, -(-args.examples // len(args.areas)), args.seed)
            counts = Counter(outcome.kind for _, outcome in found[name])
            print(f"{name}: {dict(counts)}, {time.monotonic() - start:.0f} s", flush=True)
            _write(args.output, found)
    bad = sum(not outcome.good for each in found.values() for _, outcome in each)
    print(f"{sum(map(len, found.values()))} tried, {bad} not as they should be; the table is {args.output}")
    return int(bool(bad))


def _write(output: Path, found: dict[str, list[tuple[str, Outcome]]]) -> None:
    command = f"python tests/fuzz/run.py {' '.join(sys.argv[1:])}".strip()
    output.write_text(table(found, command), encoding="utf-8")
    bad = [
        f"== {name}: {o.kind}, {o.seconds:.1f} s, {o.megabytes:.0f} MB\n{told[:1500]}\n{o.message}"
        for name, each in found.items()
        for told, o in each
        if not o.good
    ]
    output.with_suffix(".txt").write_text("\n\n".join(bad), encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
