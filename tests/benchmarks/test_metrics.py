"""The routes that the benchmark of the metrics compares give the same values."""

import importlib.util
import sys
from pathlib import Path

import pytest


# By its path: `metrics` is also a folder of tests.
spec = importlib.util.spec_from_file_location(
    "benchmark_of_metrics", Path(__file__).parent.parent.parent / "benchmarks" / "metrics.py"
)
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("metric", benchmark.PEERS)
def test_all_routes_measure_the_same(metric):
    case = benchmark.Case(metric, 120, 16)
    expected = benchmark.prepared(case, benchmark.ARRAYS)()
    assert benchmark.prepared(case, benchmark.LISTS)() == expected
    # A probe fitted in float32 may see an item or two of the 120 differently.
    tolerance = 0.02 if metric == "cross_modal_grouping" else 1e-6
    assert benchmark.prepared(case, benchmark.PLAIN)() == pytest.approx(expected, abs=tolerance)
    assert any(0.05 < value < 0.95 for value in expected.values())


def test_a_run_tells_its_cost():
    run = benchmark.measured(benchmark.Case("modality_gap", 200, 16), benchmark.ARRAYS)
    assert 0 < run.wall < 60 and run.cpu >= 0
    assert run.process is None or run.process > run.peak >= 0
    assert run.values["modality_gap"] > 0
