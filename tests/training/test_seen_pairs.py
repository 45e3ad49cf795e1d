"""Pairs of an evaluation that the model was trained on: counted by hand, and told on screen, in metrics and card."""

import json
import logging

import pytest
import yaml
from datasets import Dataset
from PIL import Image
from tiny_run import configure, tiny  # noqa: F401

from gap_closed_clip.commands import evaluate
from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.hub.card import write_card
from gap_closed_clip.training import load_config, train
from gap_closed_clip.training.seen_pairs import count_seen, note_fitted, shared_cases


@pytest.fixture
def source(tmp_path):
    """30 pairs of 10 cases."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = ["image,caption,case"]
    for index in range(30):
        Image.new("L", (32, 32), 8 * index).save(folder / f"{index}.png")
        lines.append(f"{index}.png,scan number {index},P{index // 3}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


@pytest.fixture
def trained(tmp_path):
    """A folder whose train_config.yaml has such sections."""

    def make(name: str, checkpoint: str | None = None, **data) -> str:
        (tmp_path / name).mkdir()
        model = {"vision": "timm/x", "text": "y/z"} if checkpoint is None else {"checkpoint": checkpoint}
        (tmp_path / name / "train_config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
        return str(tmp_path / name)

    return make


def count(source, model, split="validation", **data) -> int:
    data = DataArguments(source=str(source), **data)
    return count_seen(load_pairs(data, split), data, split, model)


def held_out(source, **data) -> set[str]:
    return set(load_pairs(DataArguments(source=str(source), **data), "validation")["image_id"])


def test_folds_of_a_cross_validation(source, trained):
    cut = {"folds": 5, "fold_column": "case"}
    model = trained("model", source=str(source), fold=1, **cut)
    assert count(source, model, fold=1, **cut) == 0
    assert count(source, model, fold=2, **cut) == 6  # all of them
    assert count(source, model, split="train", fold=2, **cut) == 0  # which is said elsewhere
    other = held_out(source, folds=4)
    assert count(source, model, folds=4) == len(other - held_out(source, fold=1, **cut)) > 0


def test_pairs_that_a_gap_was_closed_by(source, trained, tmp_path):
    """`center model split=...` notes its pairs in the folder; a training that starts there leads to them, too."""
    cut = {"folds": 5, "fold_column": "case"}
    base = trained("base", source=str(source), **cut)
    further = trained("further", checkpoint=base, source=str(source), **cut)
    assert count(source, base, **cut) == count(source, further, **cut) == 0
    data = [f"data.source={source}", "data.folds=5", "data.fold_column=case"]
    for split, seen in (("train", 0), ("validation", 6)):
        note_fitted(tmp_path / "base", load_config([], [*data, "data.feature_cache=here"]), split)
        assert "here" not in (tmp_path / "base" / "fitted_on.yaml").read_text()
        assert count(source, base, **cut) == count(source, further, **cut) == seen
    phantoms = {"source": "phantoms", "phantom_validation_pairs": 7, "phantom_size": 32}
    drawn = trained("drawn", **phantoms)
    words = [f"data.{name}={value}" for name, value in phantoms.items()]
    note_fitted(tmp_path / "drawn", load_config([], words), "validation")
    for seed, seen in ((0, 7), (1, 0)):
        given = DataArguments(phantom_seed=seed, **phantoms)
        assert count_seen(load_pairs(given, "validation"), given, "validation", drawn) == seen


def test_a_map_of_a_model_that_was_centered_on_other_pairs(source, trained, tmp_path):
    """Its embeddings are still centered by those."""
    cut = {"folds": 5, "fold_column": "case"}
    centered, mapped = (trained(name, source=str(source), **cut) for name in ("centered", "mapped"))
    config = load_config([], [f"data.source={source}", "data.folds=5", "data.fold_column=case"])
    note_fitted(tmp_path / "centered", config, "validation")
    for origin, seen in ((None, 0), (centered, 6)):
        note_fitted(tmp_path / "mapped", config, "train", origin)
        assert count(source, mapped, **cut) == seen


def test_the_model_that_training_started_from(source, trained):
    cut = {"folds": 5, "fold_column": "case"}
    base = trained("base", source=str(source), **cut)
    adapter = trained("adapter", checkpoint=base, source="phantoms")
    assert count(source, adapter, **cut) == 0
    assert count(source, adapter, fold=3, **cut) == 6
    (source.parent.parent / "base" / "train_config.yaml").write_text("model: [")  # nothing is known
    assert count(source, adapter, fold=3, **cut) == 0


def test_of_several_sources_the_one_that_they_have_in_common(source, trained, tmp_path):
    model = trained("model", source=str(source), folds=5)
    other = tmp_path / "other" / "pairs.csv"
    other.parent.mkdir()
    other.write_text("image,caption\n" + "".join(f"{source.parent}/{i}.png,other {i}\n" for i in range(30)))
    both = [{"name": "first", "source": str(source)}, {"name": "second", "source": str(other)}]
    data = DataArguments(source=both, folds=5, fold=1)
    pairs = load_pairs(data, "validation")
    assert count_seen(pairs, data, "validation", model) == pairs["source"].count("first") == 6
    assert count(other, model, folds=5, fold=1) == 0  # ids of another source say nothing
    assert count(source, str(tmp_path / "nothing"), folds=5) == 0


def test_a_folder_and_the_tables_in_it(source, trained):
    cut = {"folds": 5, "fold": 1}
    model = trained("model", source=str(source.parent), folds=5)
    assert count(source, model, **cut) == 6
    assert count(source, model, folds=5) == 0
    model = trained("of_file", source=str(source), folds=5)
    assert count(source.parent, model, **cut) == 6
    lines = source.read_text().splitlines()
    few = source.with_name("others.csv")  # a table of its own: all of its rows are in the other, too
    few.write_text("\n".join([lines[0], *lines[5:15]]))
    model = trained("of_others", source=str(few))
    seen = count(source, model, folds=5)
    expected = {line.split(",")[0] for line in lines[5:15]} & held_out(source, folds=5)
    assert seen == len(expected) > 0


@pytest.fixture
def leaking(tmp_path):
    """24 training, 6 validation and 4 test pairs; 3 and 2 of the latter show images of training pairs."""
    lines = ["file,name,caption,split"]
    for index in range(32):
        split = "train" if index < 24 else "val" if index < 30 else "test"
        image = {27: 3, 28: 3, 29: 5, 30: 7, 31: 7}.get(index, index)
        Image.new("L", (32, 32), 8 * image).save(tmp_path / f"{image}.png")
        lines.append(f"{image}.png,name {image},scan number {index},{split}")
    for index in (40, 41):
        Image.new("L", (32, 32), 255).save(tmp_path / f"{index}.png")
        name = f"name {index - 40}"  # that of another image in training
        lines.append(f"{index}.png,{name},scan number {index},test")
    (tmp_path / "leaking.csv").write_text("\n".join(lines))
    return tmp_path / "leaking.csv"


@pytest.mark.parametrize("ids", [None, "name"])
def test_splits_of_a_table_that_share_images(leaking, trained, ids):
    columns = {"image_column": "file", "image_id_column": ids}
    model = trained("model", source=str(leaking), **columns)
    assert count(leaking, model, **columns) == 3
    assert count(leaking, model, split="test", **columns) == 2  # not those of equal names
    assert count(leaking, model, split="train", **columns) == 0
    cut = {"folds": 4, **columns}
    model = trained("of_folds", source=str(leaking), **cut)
    assert count(leaking, model, **cut) == 0
    training = set(load_pairs(DataArguments(source=str(leaking), **cut), "train")["image_id"])
    seven = load_pairs(DataArguments(source=str(leaking), **columns), "test")["image_id"][0]
    assert count(leaking, model, split="test", **cut) == 2 * (seven in training)


@pytest.mark.parametrize("cache", ["null", "16"])
def test_a_run_tells_of_images_that_its_own_splits_share(leaking, configure, tmp_path, caplog, monkeypatch, cache):  # noqa: F811
    monkeypatch.setattr(logging.getLogger("gap_closed_clip"), "propagate", True)
    words = [f"data.source={leaking}", "image_column=file", "image_id_column=name", f"cache_images={cache}"]
    words += ["eval_strategy=no", "max_steps=1", "save_strategy=no"]
    with caplog.at_level(logging.WARNING):
        train(configure(*words, "final_split=validation"))
    assert f"3 of the 6 pairs of split 'validation' of '{leaking}' have an image that is among the" in caplog.text
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert settings == {"seen_pairs": {"run": 3}}
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # what a model has seen and what a split shares are counted once
        train(configure(*words, "final_split=test", f"checkpoint={tmp_path / 'run'}", f"output_dir={tmp_path / 'on'}"))
    assert "2 of the 4 pairs of split 'test'" in caplog.text
    assert json.loads((tmp_path / "on" / "metrics.json").read_text())["settings"] == {"seen_pairs": {"on": 2}}


def test_a_run_tells_of_cases_that_its_own_splits_share(configure, tmp_path, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(logging.getLogger("gap_closed_clip"), "propagate", True)
    splits = ["train"] * 24 + ["val"] * 6
    cases = [f"P{index}" for index in range(24)] + ["P3", " P5 ", "P50", "P51", "", ""]
    lines = ["image,caption,case,split"]
    for index, (split, case) in enumerate(zip(splits, cases, strict=True)):
        Image.new("L", (32, 32), 8 * index).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,scan number {index},{case},{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    words = [f"data.source={tmp_path / 'pairs.csv'}", "eval_strategy=no", "max_steps=1", "save_strategy=no"]
    told = "2 of the 6 pairs of split 'validation' of '{}' are of a case (data.fold_column) that training pairs are of"
    with caplog.at_level(logging.WARNING):
        train(configure(*words, "final_split=validation", "fold_column=case"))
    assert told.format(tmp_path / "pairs.csv") in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # no column of cases is named, and folds keep cases together
        train(configure(*words, "final_split=validation", f"output_dir={tmp_path / 'second'}"))
        folds = ["folds=4", "fold_column=case", "split_column=null", f"output_dir={tmp_path / 'third'}"]
        train(configure(*words, "final_split=validation", *folds))
    assert "of a case" not in caplog.text


def test_equal_cases_of_two_sources_are_two(source):
    pairs = {"source": ["a", "b", "b"], "case": ["1", "1", "2"]}
    training = Dataset.from_dict({"source": ["a", "b"], "case": ["1", "2"]})
    entries = [{"name": name, "source": str(source), "fold_column": "case"} for name in ("a", "b")]
    data, one = DataArguments(source=entries), DataArguments(source=str(source), fold_column="case")
    assert shared_cases(Dataset.from_dict(pairs), training, data) == {0, 2}
    assert shared_cases(Dataset.from_dict({"case": [1.0, None, 2.0]}), Dataset.from_dict({"case": [1]}), one) == {0}


def test_it_is_told(source, configure, tmp_path, capsys, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(logging.getLogger("gap_closed_clip"), "propagate", True)
    words = [f"data.source={source}", "data.folds=5", "final_split=validation", "max_steps=1", "save_strategy=no"]
    words.append("eval_strategy=no")
    base = tmp_path / "base"
    train(configure(*words, "fold_column=case", f"output_dir={base}"))
    assert "seen_pairs" not in (base / "metrics.json").read_text()
    config = configure(*words, "fold_column=null", "fold=2", f"checkpoint={base}")
    seen = len(held_out(source, folds=5, fold=2) - held_out(source, folds=5, fold_column="case"))
    with caplog.at_level(logging.WARNING):
        train(config)
    told = f"{seen} of these pairs of '{source}' are pairs that"
    assert told in caplog.text
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert settings == {"seen_pairs": {"run": seen}}
    write_card(tmp_path / "run", repo_id="owner/name")
    assert f"**{seen} of these pairs have images that it was trained on**" in (
        tmp_path / "run" / "README.md"
    ).read_text(encoding="utf-8")
    evaluate.run(evaluate.parse([str(base), f"output={tmp_path / 'eval'}", "data.fold=2"]))
    assert f"6 of these pairs of '{source}' are pairs that base was trained on" in capsys.readouterr().out
