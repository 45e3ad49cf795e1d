"""What holds for every metric module: it loads offline, documents itself, stands alone, and works in two processes."""

import ast
import doctest
import importlib
import multiprocessing
import sys

import evaluate
import pytest

from .conftest import METRICS_FOLDER, random_pairs


GAP_PAPERS = ("2602.20046", "2601.18525")
PAPERS = {
    "modality_gap": GAP_PAPERS,
    "cross_modal_retrieval": GAP_PAPERS,
    "cross_modal_grouping": GAP_PAPERS,
    "caption_bleu": ("papineni2002bleu", "post2018call", "chen2015coco"),
    "caption_rouge_l": ("lin2004rouge", "chen2015coco"),
    "caption_cider": ("vedantam2015cider",),
    "caption_meteor": ("lavie2007meteor", "bird2009natural"),
    "mixed_gallery_search": GAP_PAPERS,
    "clip_score": ("hessel2021clipscore",),
    "space_geometry": ("2005.10242", "2405.18570", "2404.07983", "roy2007effective"),
    "zero_shot_classification": ("radford2021learning", "guo2017calibration"),
}
NAMES = tuple(PAPERS)
OF_CAPTIONS, OF_CLUSTERS, OF_EMBEDDINGS = (
    "_caption_tokens",
    "_clusters",
    "_embeddings",
)  # the files that metrics import and take along


@pytest.mark.parametrize("name", NAMES)
def test_documents_itself(load, name):
    metric = load(name)
    assert metric.name == name
    assert all(paper in metric.citation for paper in PAPERS[name])
    assert len(metric.description) > 200
    for feature in metric.features:
        assert f"{feature}:" in metric.inputs_description


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, monkeypatch):
    monkeypatch.chdir(METRICS_FOLDER)
    result = doctest.testmod(importlib.import_module(f"gap_closed_clip.metrics.{name}"))
    assert result.attempted >= 4 and result.failed == 0


def test_every_metric_is_tested_here():
    files = {path.stem for path in METRICS_FOLDER.glob("*.py")}
    assert files == {*NAMES, OF_CAPTIONS, OF_CLUSTERS, OF_EMBEDDINGS, "__init__"}


@pytest.mark.parametrize("name", [*NAMES, OF_CAPTIONS, OF_CLUSTERS, OF_EMBEDDINGS])
def test_imports_nothing_from_the_package(name):
    tree = ast.parse((METRICS_FOLDER / f"{name}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert not [module for module in modules if module is None or module.startswith("gap_closed_clip")]
    assert all(len(node.names) == 1 for node in imports if isinstance(node, ast.Import))
    relative = [(node.level, node.module) for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    shared = [OF_CAPTIONS if name.startswith("caption_") else OF_EMBEDDINGS]
    if name == "cross_modal_grouping":
        shared = [OF_CLUSTERS, *shared]
    assert relative == ([(1, module) for module in shared] if name in NAMES else [])


@pytest.mark.parametrize(("name", "shared"), [("caption_cider", "tokenize"), ("modality_gap", "unit_pairs")])
def test_the_shared_file_comes_along(load, name, shared):
    module = sys.modules[load(name).__module__]
    assert getattr(module, shared).__module__.startswith("evaluate_modules.")


def _half(rank: int, name: str, inputs: dict[str, list], at_once: bool, cache_dir: str, results) -> None:
    path = str(METRICS_FOLDER / f"{name}.py")
    metric = evaluate.load(path, num_process=2, process_id=rank, experiment_id="two", cache_dir=cache_dir)
    rows = slice(0, 6) if rank == 0 else slice(6, None)
    half = {name: values[rows] for name, values in inputs.items()}
    if not at_once:
        metric.add_batch(**half)
    results.put((rank, metric.compute(**(half if at_once else {}))))


def in_two_processes(
    name: str, inputs: dict[str, list], at_once: bool, cache_dir: str
) -> list[dict[str, float] | None]:
    """What `compute` returns in each of two processes, the first of which has the rows 0 to 5."""
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import everything anew
    results = context.SimpleQueue()
    arguments = (name, inputs, at_once, cache_dir, results)
    processes = [context.Process(target=_half, args=(rank, *arguments), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
    outputs = dict(results.get() for _ in processes)
    return [outputs[rank] for rank in (0, 1)]


@pytest.mark.parametrize("at_once", [False, True], ids=["add_batch", "compute"])
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "no ids"])
def test_two_processes_measure_all_pairs(load, tmp_path, ids, at_once):
    image, text = random_pairs(14, 4)
    inputs = {"image_embeds": image, "text_embeds": text}
    if ids:
        inputs |= {"image_ids": [f"i{n % 11}" for n in range(14)], "caption_ids": [f"c{n % 9}" for n in range(14)]}
    first, second = in_two_processes("cross_modal_retrieval", inputs, at_once, str(tmp_path / "shared"))
    assert second is None
    assert first == load("cross_modal_retrieval").compute(**inputs)


def test_two_processes_without_ids_have_the_folds_of_one(load, tmp_path):
    image, text = random_pairs(14, 4)
    inputs = {"image_embeds": image, "text_embeds": text, "labels": [f"group {n % 3}" for n in range(14)]}
    first, _ = in_two_processes("cross_modal_grouping", inputs, False, str(tmp_path / "shared"))
    assert first == load("cross_modal_grouping").compute(**inputs)
