"""`gap-closed-clip center` as a user calls it, in this process."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import captioner_of
from conversion.clip_models import save_source
from PIL import Image
from transformers import AutoModel, AutoProcessor

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.commands import center as command_module
from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.evaluation import embed_pairs, evaluate_embeddings, read_metrics
from gap_closed_clip.evaluation.post_hoc import METHODS, fit
from gap_closed_clip.hub.facts import read_evaluation
from gap_closed_clip.training import fit_post_hoc, load_config, train
from gap_closed_clip.training.seen_pairs import count_seen


DATA = {
    "source": "phantoms",
    "phantom_train_pairs": 40,
    "phantom_validation_pairs": 16,
    "phantom_test_pairs": 12,
    "phantom_size": 32,
}
QUICK = "num_workers=0"


@pytest.fixture
def center_and_draw(command, monkeypatch, tmp_path):
    """center_and_draw("outputs/clip", ...) -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return partial(command, "center")


@pytest.fixture
def center(center_and_draw, monkeypatch):
    """The same without figures, which take longer than all else that the command does here."""
    for figure in ("plot_projection", "plot_cosine_histograms"):
        monkeypatch.setattr(f"gap_closed_clip.evaluation.report.{figure}", lambda *_: None)
    return center_and_draw


@pytest.fixture
def model(tiny_model, tiny_processor, tmp_path) -> str:
    """outputs/clip, which knows its data."""
    folder = tmp_path / "outputs" / "clip"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    (folder / "train_config.yaml").write_text(yaml.safe_dump({"data": DATA}))
    (folder / "run.json").write_text('{"num_train_pairs": 40, "device": "CPU", "num_processes": 1}\n')
    return "outputs/clip"


def embeddings(folder: str, split: str):
    return embed_pairs(*load_checkpoint(folder), load_pairs(DataArguments(**DATA), split))


@pytest.mark.parametrize("method", METHODS)
def test_an_ordinary_folder_and_the_table(center, model, method):
    code, out, err = center(model, f"method={method}", QUICK)
    assert code == 0, err
    assert "16 pairs, split 'validation' of 'phantoms'; fitted on 40 pairs, split 'train'" in out
    new = f"outputs/clip-{method}"
    assert f" clip | clip-{method} |" in " ".join(out.split()) and f"The model is in {new}." in out
    results = read_metrics(f"{new}/metrics.json")
    before, after = (embeddings(folder, "validation") for folder in (model, new))
    # What the table says is what the saved folder gives.
    for found, expected in ((before, results["clip"]), (after, results[f"clip-{method}"])):
        measured = evaluate_embeddings(found)
        for name in ("modality_gap", "true_pair_cosine", "margin", "recall@10"):
            assert measured[name] == pytest.approx(expected[name], abs=2e-4), name
    assert {"v_measure", "other_kind_share@10", "debiased_modality_gap"} <= set(results["clip"])
    if method != "centering":  # of which test_close_gap.py has the projections
        train_pairs = embeddings(model, "train")
        by_hand = fit(method, train_pairs.image_embeds, train_pairs.text_embeds).apply(before)
        np.testing.assert_allclose(after.image_embeds, by_hand.image_embeds, atol=1e-4)
    assert AutoModel.from_pretrained(new).config.embedding_map == (None if method == "centering" else method)
    assert AutoProcessor.from_pretrained(new).tokenizer is not None
    assert not load_config([f"{new}/train_config.yaml"]).model.config  # how it was trained goes along
    evaluation = read_evaluation(Path(new))
    assert evaluation["name"] == f"clip-{method}" and not evaluation["stale"]
    assert evaluation["settings"] == {"method": method, "fitted_on": "train"}
    # It goes on being a model of every command.
    code, out, err = center(new, "output=again", QUICK)
    assert code == (0 if method == "centering" else 1)
    assert code == 0 or "already has a map" in err


@pytest.mark.parametrize("method", ["centering", "whitening"])
def test_a_model_that_is_stored_in_half_precision(center, model, tmp_path, method):
    """It becomes the very model that the same weights in float32 become, and the table is of that one."""
    half, full = (shutil.copytree(tmp_path / model, tmp_path / "outputs" / name) for name in ("half", "full"))
    encoder = GapClosedClipModel.from_pretrained(model).bfloat16()
    encoder.save_pretrained(half)
    encoder.float().save_pretrained(full)
    assert load_checkpoint(half)[0].dtype == torch.bfloat16
    found = {}
    for name in ("half", "full"):
        code, _, err = center(f"outputs/{name}", f"method={method}", QUICK)
        assert code == 0, err
        found[name] = embeddings(f"outputs/{name}-{method}", "validation")
    np.testing.assert_allclose(found["half"].image_embeds, found["full"].image_embeds, atol=1e-5)
    np.testing.assert_allclose(found["half"].text_embeds, found["full"].text_embeds, atol=1e-5)
    results = read_metrics(f"outputs/half-{method}/metrics.json")[f"half-{method}"]
    measured = evaluate_embeddings(found["half"], grouping=False)
    for name in ("modality_gap", "true_pair_cosine", "margin"):
        assert measured[name] == pytest.approx(results[name], abs=2e-4), name


def test_two_folders_of_one_name(center, model):
    code, out, err = center(model, "output=others/clip", QUICK)
    assert code == 0, err
    assert list(read_metrics("others/clip/metrics.json")) == ["clip, before", "clip"]


def test_all_methods_side_by_side(center_and_draw, model, tmp_path):
    code, out, err = center_and_draw(model, "method=all", QUICK)
    assert code == 0, err
    header = next(line for line in out.splitlines() if line.startswith("| metric"))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["clip", *METHODS]
    saved = {path.name for path in (tmp_path / "outputs" / "clip-all").iterdir()}
    assert saved == {"metrics.json", "metrics.md", "projection.png", "cosines.png"}
    code, out, err = center_and_draw(model, "method=all", "save=true", "output=everything", QUICK)
    assert code == 0, err
    assert "The models are in everything/centering, everything/mean_shift" in out
    results = read_metrics("everything/metrics.json")
    for method in METHODS:
        measured = evaluate_embeddings(embeddings(f"everything/{method}", "validation"))
        assert measured["modality_gap"] == pytest.approx(results[method]["modality_gap"], abs=2e-4)


def test_it_says_where_recall_fell(center, model, monkeypatch):
    code, out, err = center(model, QUICK)
    results = list(read_metrics("outputs/clip-centering/metrics.json").values())
    fell = results[1]["recall@10"] < results[0]["recall@10"] - 0.005
    assert ("R@10 (mean of both directions) fell" in out) == fell

    def worse(embeddings, **settings):  # the second evaluation finds less
        found = evaluate_embeddings(embeddings)
        return found | {"recall@10": 0.102 if np.isclose(found["margin"], results[0]["margin"]) else 0.047}

    monkeypatch.setattr("gap_closed_clip.commands.center.evaluate_embeddings", worse)
    code, out, err = center(model, QUICK, "overwrite=true")
    assert "clip-centering: R@10 (mean of both directions) fell from 10.2% to 4.7%." in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["split=validation"], "split and eval_split are both 'validation'"),
        (["data.validation_split=null"], "'phantoms' has no validation split"),
        (["data.source=one.csv", "data.image_root=."], "'one.csv' has no split 'validation'"),
    ],
)
def test_pairs_that_it_was_fitted_on_are_told(center, model, tmp_path, words, reason):
    random = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(5):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,Chest radiograph number {number}.")
    (tmp_path / "one.csv").write_text("\n".join(lines))
    code, out, err = center(model, *words, QUICK)
    assert code == 0, err
    assert "Warning: fitted and evaluated on the same pairs, where a gap is closed by construction: " + reason in out
    assert " clip-centering (fitted on these pairs) |" in out
    assert "clip-centering (fitted on these pairs)" in read_metrics("outputs/clip-centering/metrics.json")
    # And whoever evaluates the new model on them later is told, as of pairs that a model was trained on.
    if words == ["split=validation"]:
        data = DataArguments(**DATA)
        # A map of it is of embeddings that these pairs have centered; other means take the place of theirs.
        for method in ("mean_shift", "centering"):
            assert center("outputs/clip-centering", f"method={method}", QUICK)[0] == 0
        found = {"": 16, "-mean_shift": 16, "-centering": 0}
        for folder, seen in (
            (model, 0),
            *((f"outputs/clip-centering{name}", number) for name, number in found.items()),
        ):
            assert count_seen(load_pairs(data, "validation"), data, "validation", folder) == seen


def test_pairs_that_the_model_was_trained_on_are_told(center, model, tmp_path):
    lines = ["image,caption"]
    for index in range(30):
        Image.new("L", (32, 32), 8 * index).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,scan number {index}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    Path(model, "train_config.yaml").write_text(yaml.safe_dump({"data": {"source": "pairs.csv", "folds": 5}}))
    code, out, err = center(model, QUICK, "data.fold=2")
    assert code == 0, err
    assert "Warning: 6 of these pairs of 'pairs.csv' are pairs that clip was trained on" in out
    settings = json.loads(Path("outputs/clip-centering/metrics.json").read_text())["settings"]
    assert settings["seen_pairs"] == {"clip": 6, "clip-centering": 6}
    code, out, _ = center(model, QUICK, "output=held_out")
    assert code == 0 and "trained on" not in out
    assert "seen_pairs" not in Path("held_out/metrics.json").read_text()


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "dual encoder, ViT + BERT"])
@pytest.mark.parametrize("method", ["centering", "procrustes"])
def test_a_clip_of_another_library(center, tmp_path, kind, method):
    """Its folder stays as it is; the new one is an ordinary one of ours."""
    save_source(kind, tmp_path / "theirs")
    code, out, err = center(
        "theirs", f"method={method}", *(f"data.{name}={value}" for name, value in DATA.items()), QUICK
    )
    assert code == 0, err
    new = f"theirs-{method}"
    results = read_metrics(f"{new}/metrics.json")
    measured = evaluate_embeddings(embeddings(new, "validation"))
    assert measured["modality_gap"] == pytest.approx(results[new]["modality_gap"], abs=2e-4)
    assert AutoModel.from_pretrained(new).config.model_type == "gap_closed_clip"
    assert results["theirs"]["debiased_modality_gap"] > 2 * results[new]["debiased_modality_gap"]


def test_adapters_are_merged(center, model, tmp_path):
    words = [f"model.checkpoint={model}", "output_dir=outputs/lora", "max_steps=1", "use_cpu=true"]
    words += ["per_device_train_batch_size=8", "report_to=none", "save_strategy=no", "final_split=none"]
    words += ["lora.rank=2", *(f"data.{name}={value}" for name, value in DATA.items())]
    train(load_config([], words))
    code, out, err = center("outputs/lora", "method=mean_shift", QUICK)
    assert code == 0, err
    found = AutoModel.from_pretrained("outputs/lora-mean_shift")
    assert found.config.embedding_map == "mean_shift" and not (tmp_path / "outputs/lora-mean_shift/base").exists()
    # Into the folder of an adapter, which transformers would load instead of the model there.
    words = ["method=procrustes", "output=outputs/lora", QUICK]
    code, _, err = center(model, *words)
    assert code == 1 and "output outputs/lora holds a model: name another folder, or add overwrite=true" in err
    assert center(model, *words, "overwrite=true")[0] == 0
    assert AutoModel.from_pretrained("outputs/lora").config.embedding_map == "procrustes"


@pytest.mark.parametrize("method", ["whitening", "centering"])
def test_training_goes_on(center, model, method):
    assert center(model, f"method={method}", QUICK)[0] == 0
    new = f"outputs/clip-{method}"
    words = [f"model.checkpoint={new}", "output_dir=outputs/more", "max_steps=2", "use_cpu=true", "report_to=none"]
    words += ["per_device_train_batch_size=8", "save_strategy=no", "final_split=validation", "learning_rate=0.001"]
    result = train(load_config([], [*words, *(f"data.{name}={value}" for name, value in DATA.items())]))
    first, second = load_checkpoint(new)[0], load_checkpoint("outputs/more")[0]
    measured = evaluate_embeddings(embeddings("outputs/more", "validation"))
    assert result.metrics["modality_gap"] == pytest.approx(measured["modality_gap"], abs=1e-4)
    assert not np.array_equal(first.visual_projection.weight.detach(), second.visual_projection.weight.detach())
    if method == "whitening":
        assert np.array_equal(first.visual_map.weight, second.visual_map.weight)
    else:
        assert second.config.center_projections and measured["debiased_modality_gap"] < 0.9


def test_a_captioner_is_refused(center, model, tiny_processor):
    captioner_of(tiny_processor.tokenizer).save_pretrained("outputs/captioner")
    tiny_processor.save_pretrained("outputs/captioner")
    code, out, err = center("outputs/captioner", "data.source=phantoms")
    assert code == 1 and "outputs/captioner is a captioner, and its decoder knows the space as it is" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outputs/clip", "method=whiten"], "There is no method 'whiten': did you mean 'whitening'?"),
        (["outputs/clip", "methd=all"], "There is no setting 'methd'. Did you mean 'method'?"),
        (["outputs/clip", "outputs/clip"], "2 models are named: give one"),
        (["method=all"], "0 models are named: give one"),
        (["outputs/clop"], "There is no folder outputs/clop. Did you mean outputs/clip?"),
        (["outputs/clip", "output=outputs/clip"], "output outputs/clip is the model's folder, or around it"),
        (["outputs/clip", "output=outputs"], "output outputs is the model's folder, or around it"),
        (["outputs/clip", "output=outputs/other"], "output outputs/other holds a model: name another folder, or add"),
        (["outputs/clip", "batch_size=0"], "batch_size is 0; it must be at least 1."),
        (["outputs/clip", "eval_split=tst"], "There is no split 'tst'"),
        (["outputs/clip", "data.validation_split=null", "eval_split=validation"], "has no validation split"),
        (["outputs/clip", "--method", "all"], "There is no option --method: write method=all."),
    ],
)
def test_bad_input_is_one_line(center, model, words, message):
    shutil.copytree(model, "outputs/other")
    code, out, err = center(*words)
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith("gap-closed-clip center: ") and message in line
    assert "Traceback" not in err


def test_without_its_data_it_asks(center, model, tmp_path):
    (tmp_path / model / "train_config.yaml").unlink()
    code, out, err = center(model)
    assert code == 1 and "has no train_config.yaml, so say what to evaluate on: data.source=" in err
    code, out, err = center(model, *(f"data.{name}={value}" for name, value in DATA.items()), QUICK)
    assert code == 0, err
    content = json.loads((tmp_path / "outputs/clip-centering/metrics.json").read_text())
    assert content["data"]["phantom_train_pairs"] == 40 and content["split"] == "validation"


def test_an_interruption_is_one_line(center, model, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gap_closed_clip.commands.center.embed_pairs", interrupt)
    code, out, err = center(model, QUICK)
    assert code == 130 and err.splitlines()[-1] == (
        "gap-closed-clip center: interrupted. outputs/clip-centering may be incomplete; outputs/clip is as it was."
    )


def test_overwriting_replaces_the_model_and_nothing_else(center, model, tmp_path, monkeypatch):
    folder = tmp_path / "outputs" / "clip-centering"
    assert center(model, QUICK)[0] == 0
    (folder / "notes.txt").write_text("precious")
    (folder / "other").mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"a part of another model")
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(GapClosedClipModel, "save_pretrained", full_disk)
        code, _, err = center(model, "method=mean_shift", "output=outputs/clip-centering", "overwrite=true", QUICK)
    assert code == 1 and "could not be written to outputs/clip-centering" in err and "Traceback" not in err
    assert (folder / "model.safetensors").read_bytes() == before
    code, _, err = center(model, "method=mean_shift", "output=outputs/clip-centering", "overwrite=true", QUICK)
    assert code == 0, err
    assert load_checkpoint(folder)[0].config.embedding_map == "mean_shift"
    assert (folder / "notes.txt").read_text() == "precious" and (folder / "other").is_dir()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(folder.glob("tmp*"))


def test_overwriting_leaves_nothing_of_how_another_model_was_trained(center, model, tmp_path):
    folder = tmp_path / "outputs" / "clip-centering"
    assert center(model, QUICK)[0] == 0
    assert (folder / "train_config.yaml").is_file() and (folder / "run.json").is_file()
    stranger = shutil.copytree(tmp_path / model, tmp_path / "outputs" / "stranger")
    for name in ("train_config.yaml", "run.json"):
        (stranger / name).unlink()
    pairs = [f"data.{name}={value}" for name, value in DATA.items()]
    code, _, err = center("outputs/stranger", "output=outputs/clip-centering", "overwrite=true", QUICK, *pairs)
    assert code == 0, err
    assert not (folder / "train_config.yaml").exists() and not (folder / "run.json").exists()


def test_a_method_that_cannot_be_fitted_is_left_out(center, model, monkeypatch):
    def fit_all_but_one(method, features):
        if method == "whitening":
            raise ValueError("the captions are all alike.")
        return fit_post_hoc(method, features)

    monkeypatch.setattr(command_module, "fit_post_hoc", fit_all_but_one)
    code, out, err = center(model, "method=all", QUICK)
    assert code == 0, err
    assert "whitening is left out: the captions are all alike." in out and "procrustes" in out
