"""Plans of `evidence.py`: which come along, what they say, and what is wrong with them, told before a training."""

import evidence_plan
import pytest
import yaml
from evidence_plan import all_methods, read_plan
from evidence_runs import open_runs

from gap_closed_clip.training import load_config


def test_plans_name_what_is_wrong_with_them(plan_file, tmp_path):
    content = yaml.safe_load(plan_file.read_text())
    for change, said in [
        ({"sedes": [0]}, "unknown field 'sedes'.*seeds"),
        ({"methods": ["CLIP (LT)", "our"]}, "no method 'our'.*ours"),
        ({"methods": ["ours"]}, "baseline 'CLIP .LT.' is not among"),
        ({"seeds": []}, "seeds is empty"),
        ({"methods": "CLIP (LT)"}, "methods is 'CLIP .LT.'; give a list, in brackets"),
        ({"config": "small.yaml"}, "config is 'small.yaml'; give a list"),
        ({"seeds": ["one"]}, "seeds holds 'one'; each is to be a whole number"),
        ({"shared": ["max_steps", 2]}, r"shared is \['max_steps', 2\]; give a mapping"),
        ({"shared": {"max_stps": 2}}, "shared: .*max_stps.*max_steps"),
        ({"shared": {"max_steps": "two"}}, "shared: .*max_steps"),
        ({"own": {"CLIP (LT)": {"max_steps": 1}, "our": {"max_steps": 1}}}, "own: nothing trains .*'our'.*'ours'"),
        ({"own": {"CLIP (LT)": {"max_steps": 1}}}, "own has no budget for 'ours'"),
        ({"own": {"CLIP (LT)": 3, "ours": {}}}, "own, CLIP .LT. is 3; give a mapping"),
        ({"grid": {"max_steps": 3}}, "grid, max_steps is 3; give a list"),
        ({"grid": {"max_stps": [3]}}, "grid: .*max_stps"),
        ({"weight_map": {"align_weight": [1]}}, "weight_map: uniformity_weight is left out"),
        ({"weight_map": {"align_weight": [1], "uniformty_weight": [1]}}, "weight_map: unknown .*uniformity_weight"),
        ({"weight_map": {"align_weight": ["a"], "uniformity_weight": [1]}}, "align_weight holds 'a'"),
        ({"robustness": {"methods": ["our"], "num_train_epochs": [1]}}, "robustness: nothing trains .*'our'"),
        ({"robustness": {"methods": ["ours"]}}, "robustness: num_train_epochs is left out"),
        ({"robustness": {"methods": ["ours"], "epochs": [1]}}, "robustness: unknown field 'epochs'"),
        ({"start": ["demo.yaml"], "start_budgets": {"our": {}}}, "start_budgets: nothing trains .*'our'"),
        ({"start_budgets": {"ours": {}}}, "start_budgets are those of a first stage"),
        ({"shared": {"max_steps": 2, "num_train_epochs": 3}}, "num_train_epochs=3 .* after max_steps=2: take"),
        ({"shared": {}, "grid": {"num_train_epochs": [5]}, "words": ["max_steps=4"]}, "=5 would .* max_steps=4"),
        ({"shared": {}, "words": ["max_steps=4"]}, "num_train_epochs=1 .* after max_steps=4"),  # of the robustness
        ({"seeds": [0, 1, 0]}, r"seeds is \[0, 1, 0\]; name each once"),
        ({"seeds": [-1]}, "seeds holds -1; each is to be a whole number from 0"),
        ({"captions": {"seeds": [3, 3]}}, r"captions: seeds is \[3, 3\]; name each once"),
        ({"folds": 3}, "folds is 3; of the num_folds=2"),
        ({"folds": 0}, "folds is 0; of the num_folds=2"),
        ({"num_folds": 1}, "num_folds is 1; cut the training cases into 2"),
        ({"templates": []}, "templates is empty"),
        ({"templates": ["{}", "A scan."]}, "templates holds 'A scan.'; each is a text with {} in it"),
        ({"templates": ["A {organ}."]}, "templates holds 'A {organ}.'"),
    ]:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(ValueError, match=said):
            read_plan(str(tmp_path / "plan.yaml"), [])
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        read_plan("nowhere.yaml", [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"seeds: [7]\nseeds: [8]\n", "plan.yaml is not valid YAML: the key 'seeds' is there twice"),
        (b"title: [a\n", "plan.yaml is not valid YAML"),
        ("title: Röntgen\n".encode("latin-1"), r"plan.yaml is not in UTF-8 \(line 1\)"),
        (b"captions: {without_noise: no}\n", "captions: without_noise is 'no'; give true or false"),
    ],
)
def test_a_plan_is_read_as_a_configuration_is(text, said, tmp_path):
    """Of a key that was there twice the first one counted for nothing."""
    (tmp_path / "plan.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=said):
        read_plan(str(tmp_path / "plan.yaml"), [])


def test_lengths_in_epochs_are_not_cut_by_the_steps_of_the_shared_budget(plan_file):
    plan = read_plan(str(plan_file), [])
    assert plan.shared == {"max_steps": 2}
    assert plan.lasting(7) == {"num_train_epochs": 7}
    assert "max_steps" not in plan.run_config("ours", plan.lasting(7), 0).training


def test_numbers_of_a_plan_may_be_written_as_in_a_configuration(plan_file, tmp_path):
    content = plan_file.read_text().replace("align_weight:\n  - 3", "align_weight:\n  - 1e-3")
    (tmp_path / "plan.yaml").write_text(content)
    assert read_plan(str(tmp_path / "plan.yaml"), []).weight_map["align_weight"] == [0.001]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{about: Mine., source: here, wrds: [align_weight=2]}", "methods.yaml, mine: unknown field 'wrds'.*'words'"),
        ("{about: Mine., source: here, words: align_weight=2}", "methods.yaml, mine: words is 'align_weight=2'; give"),
        ("{about: Mine., source: here, files: [1]}", "methods.yaml, mine: files holds 1; each is to be a text"),
        ("{about: Mine.}", "methods.yaml, mine: source is left out"),
        ("align_weight=2", "methods.yaml, mine holds no mapping but 'align_weight=2'"),
    ],
)
def test_a_method_of_ones_own_is_told_what_is_wrong_with_it(entry, said, tmp_path, monkeypatch):
    known = (evidence_plan.PLANS / "methods.yaml").read_text(encoding="utf-8")
    (tmp_path / "methods.yaml").write_text(f"{known}mine: {entry}\n", encoding="utf-8")
    monkeypatch.setattr(evidence_plan, "PLANS", tmp_path)
    with pytest.raises(ValueError, match=said):
        read_plan("pairs.csv", [])


@pytest.mark.parametrize("change", [{"shared": {"max_caption_tokens": 9}}, {"grid": {"text_pooling": ["mean"]}}])
def test_a_budget_can_not_change_what_frozen_towers_gave(change, plan_file, tmp_path):
    content = {**yaml.safe_load(plan_file.read_text()), **change}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="budget has (max_caption_tokens=9|text_pooling=mean), but frozen towers"):
        open_runs(read_plan(str(tmp_path / "plan.yaml"), []), tmp_path)


def test_a_table_of_pairs_is_a_plan_of_its_own(tmp_path):
    for name in ("set #2.csv", "2024", "a: b.csv", "[x].csv"):
        assert read_plan(name, []).run_config("ours", {}, seed=0).data.source == name
    plan = read_plan("some/My pairs.csv", ["label_columns=organ"], seeds=[7])
    assert plan.name == "my_pairs" and plan.seeds == (7,) and plan.words[-1] == "label_columns=organ"
    config = plan.run_config("papers, scheduled", {"num_train_epochs": 3}, seed=7)
    assert config.data.source == "some/My pairs.csv" and config.training["seed"] == 7
    assert config.training["num_train_epochs"] == 3 and not config.model.config["center_projections"]


@pytest.mark.parametrize("name", all_methods())
def test_every_method_is_a_configuration_or_a_transform(name, monkeypatch, tmp_path):
    monkeypatch.setenv("RADIOLOGY_DATA", str(tmp_path))
    plan = read_plan("radiology", [])
    if plan.known_methods[name].post_hoc is None:
        config = plan.run_config(name, plan.shared, seed=0)
        assert config.model.config != load_config(plan.config).model.config or name == "ours"


def test_only_plans_that_come_along_write_into_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.csv").write_text("image,caption\n")
    (tmp_path / "demo.yaml").write_text("model: {}\n")
    of_ours = evidence_plan.PLANS / "demo.yaml"
    assert evidence_plan.plan_of_ours("radiology").name == "radiology.yaml"
    assert evidence_plan.plan_of_ours(str(of_ours)) == of_ours
    for other in ("demo.csv", "demo.yaml", "configs/demo.yaml", "data/demo"):
        assert evidence_plan.plan_of_ours(other) is None


def test_every_plan_that_comes_along_can_be_read():
    for path in evidence_plan.PLANS.glob("*.yaml"):
        if path.stem != "methods":
            assert read_plan(path.stem, []).trained
