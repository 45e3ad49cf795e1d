"""`gap-closed-clip eval` as a user calls it, in this process."""

import errno
import json
import shutil
from functools import partial

import evaluate as hf_evaluate
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gap_closed_clip.evaluation import read_metrics


@pytest.fixture
def evaluate(command, monkeypatch, tmp_path):
    """evaluate("outputs/demo", ...) -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return partial(command, "eval")


@pytest.fixture
def models(tiny_model, tiny_processor, tmp_path):
    """Two equal models in outputs/clip and outputs/demo; the second knows its data."""
    for name in ("clip", "demo"):
        tiny_model.save_pretrained(tmp_path / "outputs" / name)
        tiny_processor.save_pretrained(tmp_path / "outputs" / name)
    data = {"source": "phantoms", "phantom_test_pairs": 12, "phantom_train_pairs": 10, "phantom_size": 32}
    config = yaml.safe_dump({"data": data, "training": {"final_split": "test"}})
    (tmp_path / "outputs" / "demo" / "train_config.yaml").write_text(config)
    return ["outputs/clip", "outputs/demo"]


def test_table_and_files(evaluate, models, tmp_path):
    code, out, err = evaluate(*models, "num_workers=0", "output=report")
    assert code == 0, err
    assert "12 pairs, split 'test' of 'phantoms'" in out
    assert "| metric " in out and " clip " in out and " demo " in out
    results = read_metrics(tmp_path / "report" / "metrics.json")
    assert results["clip"] == results["demo"] and results["demo"]["num_pairs"] == 12
    content = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert content["split"] == "test" and content["data"]["source"] == "phantoms"
    assert content["data"]["phantom_test_pairs"] == 12
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"metrics.md", "projection.png", "cosines.png"}


def test_data_from_the_command_line(evaluate, models):
    words = ("split=validation", "data.phantom_validation_pairs=7", "num_workers=0", "centering=true", "bf16=true")
    code, out, err = evaluate(models[1], *words)
    assert code == 0, err
    assert "7 pairs, split 'validation'" in out
    assert " demo, centered " in out


def test_models_of_one_name_are_told_apart(evaluate, models, tmp_path):
    shutil.copytree(tmp_path / "outputs" / "demo", tmp_path / "other" / "demo")
    code, out, err = evaluate("outputs/demo", "other/demo", "num_workers=0")
    assert code == 0, err
    assert " outputs/demo " in out and " other/demo " in out


def test_several_sources(evaluate, models, tmp_path):
    """Tables of all and of each; the pairs of a source are those that it has by itself."""
    sources = "[{name: a, source: phantoms}, {name: b, source: phantoms, phantom_seed: 1, phantom_test_pairs: 9}]"
    words = (f"data.source={sources}", "num_workers=0", "output=report")
    code, out, err = evaluate(*models, *words, "centering=true")
    assert code == 0, err
    assert "21 pairs, split 'test' of 'a', 'b'" in out
    headings = [line for line in out.splitlines() if line.startswith("###")]
    assert headings == ["### all in one gallery", "### a", "### b", "### mean of the sources"]
    together = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [source["name"] for source in together["data"]["source"]] == ["a", "b"]
    code, out, err = evaluate(models[1], "data.phantom_seed=1", "data.phantom_test_pairs=9", *words[1:])
    assert code == 0, err
    alone = read_metrics(tmp_path / "report" / "metrics.json")["demo"]
    found = together["sources"]["b"]["demo"]
    assert together["sources"]["b"]["demo, centered"]["margin"] != found["margin"]
    assert found == pytest.approx(
        {name: found[name] if found[name] is None else v for name, v in alone.items()}, abs=1e-5
    )


def test_real_pairs(evaluate, models, radiology_data):
    words = ("split=validation", "data.source=$RADIOLOGY_DATA/medpix2", "data.label_columns=[location_category]")
    code, out, err = evaluate(models[0], *words, "num_workers=0", "output=report")
    assert code == 0, err
    assert "189 pairs, split 'validation' of '$RADIOLOGY_DATA/medpix2'" in out
    found = read_metrics("report/metrics.json")["clip"]
    # 127 distinct captions: an untrained model's median rank is far from both ends of the gallery.
    assert 20 < found["image_to_text_median_rank"] < 110
    assert 0 <= found["v_measure"] < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outputs/demo", "splt=test"], "There is no setting 'splt'. Did you mean 'split'?"),
        (["outputs/demo", "data.sorce=phantoms"], "Did you mean 'data.source'?"),
        (["outputs/demo", "batch_size=many"], "batch_size is 'many'; it must be of type int."),
        (["split=test"], "No model is named"),
        (["outputs/clip"], "outputs/clip has no train_config.yaml, so say what to evaluate on"),
        (["./outputs/dem"], "There is no model folder outputs/dem"),
        (["outputs/demo", "split=tst"], "There is no split 'tst'"),
        (["outputs/demoo"], "There is no folder outputs/demoo. Did you mean outputs/demo?"),
        (["outputs/demoo", "data.source=phantoms"], "There is no folder outputs/demoo. Did you mean outputs/demo?"),
        (["outputs/demo", "spilt=test"], "There is no setting 'spilt'. Did you mean 'split'?\n"),
        (["outputs/demo", "zzz=1"], "There is no setting 'zzz'. The settings are: split, output, batch_size"),
        (["outputs/demo", "batch_size=0"], "batch_size is 0; it must be at least 1."),
        (["outputs/demo", "num_workers=-1"], "num_workers is -1; it must be at least 0."),
        (["outputs/demo", "--split", "test"], "There is no option --split: write split=test."),
        (["outputs/demo", "output=outputs/demo/config.json/eval"], "output outputs/demo/config.json/eval can't be w"),
        (["outputs/demo", "data.source=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_input_is_one_line(evaluate, models, words, message):
    code, out, err = evaluate(*words)
    assert code == 1 and out == ""
    assert err.startswith("gap-closed-clip eval: ") and message in err
    assert "Traceback" not in err


def test_a_model_whose_embeddings_have_no_direction_is_named(evaluate, models, tmp_path):
    """The message was of a row alone, and the first of several models may be the one."""
    file = tmp_path / "outputs" / "clip" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})
    code, _, err = evaluate(*models[::-1], "num_workers=0")
    assert code == 1 and "outputs/clip: its weights (*.safetensors) are damaged, or its space has collapsed: " in err


def test_an_interruption_is_one_line(evaluate, models, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gap_closed_clip.evaluation.compare.load_checkpoint", interrupt)
    code, out, err = evaluate("outputs/demo", "num_workers=0")
    assert code == 130 and err.endswith(
        "\ngap-closed-clip eval: interrupted. No complete report was written to outputs/eval.\n"
    )


@pytest.mark.parametrize("name", ["eval", "center"])
def test_a_locked_cache_of_metrics_is_found_before_the_towers_run(command, models, monkeypatch, tmp_path, name):
    """`evaluate` writes there whenever it loads a metric: all embeddings were lost, or the table of `center`."""
    cache = hf_evaluate.config.HF_MODULES_CACHE

    def locked(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", f"{cache}/modality_gap.lock")

    monkeypatch.setattr(hf_evaluate, "load", locked)
    for module in ("evaluation.compare", "commands.center"):
        monkeypatch.setattr(f"gap_closed_clip.{module}.load_checkpoint", lambda *_, **__: pytest.fail("It loaded."))
    monkeypatch.chdir(tmp_path)
    code, out, err = command(name, "outputs/demo", "num_workers=0")
    assert code == 1 and out == ""
    assert f"{cache}/modality_gap.lock: permission denied. Make it writable. Or set HF_HOME" in err


def test_a_bad_model_is_found_before_the_first_is_evaluated(evaluate, models, tmp_path):
    path = tmp_path / "outputs" / "demo" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    code, out, err = evaluate(*models)
    assert code == 1 and out == ""
    assert (
        err.startswith("gap-closed-clip eval: outputs/demo is damaged: model.safetensors is truncated")
        and err.count("\n") == 1
    )
