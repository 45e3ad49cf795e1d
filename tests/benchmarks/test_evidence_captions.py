"""Captions as a task of evidence.py, on a tiny plan: what is written, measured, compared, kept and found again."""

import json
from dataclasses import replace
from pathlib import Path

import comparison
import evidence
import nltk
import numpy as np
import pytest
import torch
import yaml
from evidence_caption_tables import captions_table
from evidence_captions import (
    CEILING,
    IMAGE_TRAINED,
    NEAREST,
    NEAREST_SHIFTED,
    NO_NOISE,
    NO_NOISE_SHIFTED,
    TEXT_ONLY,
    TEXT_SHIFTED,
)
from evidence_compare import caption_comparisons
from evidence_plan import read_plan
from evidence_results import Evidence
from scipy.stats import ttest_rel

from gap_closed_clip.checkpoint import METRICS_FILE, load_captioner, load_checkpoint
from gap_closed_clip.data import load_checked_pairs
from gap_closed_clip.evaluation import (
    Captions,
    embed_pairs,
    evaluate_captions,
    generate_captions,
    modality_means,
    nearest_captions,
    score_captions,
)
from gap_closed_clip.evaluation.statistics import holm
from gap_closed_clip.training import load_config, train

from .conftest import TINY
from .evidence_example import cells


CAPTIONS = {
    "methods": ["CLIP (LT)", "ours"],
    "words": ["max_steps=2", "max_new_tokens=6", "per_device_train_batch_size=8", "use_cpu=true", "disable_tqdm=true"],
    "without_noise": True,
}
PLAN = {
    "title": "Tiny",
    "methods": ["CLIP (LT)", "ours"],
    "seeds": [0],
    "shared": {"max_steps": 2},
    "grid": {},
    "captions": CAPTIONS,
}


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    data = {**TINY["data"], "feature_cache": str(folder / "features"), "cache_images": 32}
    # Weights so large that a decoder which has learned nothing yet writes another caption for each embedding.
    text = {**TINY["model"]["text"], "initializer_range": 0.5}
    content = {**TINY, "model": {**TINY["model"], "text": text}, "data": data}
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**PLAN, "config": [str(folder / "small.yaml")]}))
    return folder / "tiny.yaml"


class Runs:
    """Runs of the command in one folder, what they found, and the trainings that they made."""

    def __init__(self, plan_file):
        self.plan_file, self.trained = plan_file, []

    def __call__(self, stop_after: int | None = None) -> str | None:
        folder, patch = self.plan_file.parent, pytest.MonkeyPatch()
        before = len(self.trained)

        def counted(config):
            if len(self.trained) - before == stop_after:
                raise KeyboardInterrupt
            self.trained.append(Path(config.output_dir).name)
            return train(config)

        patch.setattr(comparison, "train", counted)
        patch.setattr(evidence, "draw_all", lambda *_: {})  # figures of the results, which have tests of their own
        words = [str(self.plan_file), "--output", str(folder / "output"), "--report", str(folder / "report")]
        patch.setattr("sys.argv", ["evidence.py", *words])
        try:
            evidence.main()
        except KeyboardInterrupt:
            return None
        finally:
            patch.undo()
        return (folder / "report" / "evidence_tiny.json").read_text()

    @property
    def models(self):
        return self.plan_file.parent / "output" / "models"


@pytest.fixture(scope="module")
def runs(plan_file):
    return Runs(plan_file)


@pytest.fixture(scope="module")
def results(runs, plan_file):
    """Of a run that was stopped in the second encoder's decoders, and went on."""
    patch = pytest.MonkeyPatch()
    patch.setattr(nltk.data, "path", [])  # no WordNet, which takes seconds to load: METEOR is left out
    for name in ("captions", "projection", "cosine_histograms"):
        patch.setattr(f"gap_closed_clip.evaluation.report.plot_{name}", lambda *_, **__: None)
    assert runs(stop_after=6) is None
    runs.early = json.loads((plan_file.parent / "output" / "evidence_tiny.json").read_text())
    yield runs()
    patch.undo()


def test_a_run_that_was_stopped_trains_nothing_twice_and_says_the_same_again(runs, results, capsys):
    names = ("clip__lt_", "ours")
    encoders = [f"{name}_max_steps_2_seed0" for name in names]
    kinds = ("image", "text", "text_noiseless")
    decoders = [f"captions_{kind}_{name}_seed0" for name in names for kind in kinds]
    scorer = "papers__scheduled_max_steps_2_seed100"
    assert sorted(runs.trained) == sorted([*encoders, *decoders, scorer])
    assert [(runs.models / name / METRICS_FILE).is_file() for name in decoders] == [False] * len(decoders)
    number = len(runs.trained)
    assert runs() == results and len(runs.trained) == number
    assert "METEOR is left out: caption_meteor needs NLTK's WordNet data" in capsys.readouterr().out
    assert (runs.models.parent / "captions.png").stat().st_size > 1000


def test_the_report_without_captions_comes_before_the_decoders(runs, results):
    whole = json.loads(results)
    assert whole.pop("captions") and whole.pop("minutes") >= runs.early.pop("minutes")
    assert runs.early == whole


def written_by_hand(runs, results) -> dict[str, Captions]:
    """Captions with the encoder of ours through the package's own functions."""
    encoder = runs.models / "ours_max_steps_2_seed0"
    config = load_config([runs.models / "captions_text_ours_seed0" / "train_config.yaml"])
    test, train_pairs = (load_checked_pairs(config.data, split) for split in ("test", "train"))
    model, processor = load_checkpoint(encoder)
    limit = config.data.max_caption_tokens
    embeddings, training = (embed_pairs(model, processor, pairs, max_length=limit) for pairs in (test, train_pairs))
    image_mean, text_mean = modality_means(training)
    nearest = nearest_captions(embeddings, training)
    first = [embeddings.image_ids.index(image_id) for image_id in nearest.image_ids]

    def write(kind: str, embeds: np.ndarray) -> Captions:
        model, processor = load_captioner(runs.models / f"captions_{kind}_ours_seed0")
        unit = embeds[first] / np.linalg.norm(embeds[first], axis=1, keepdims=True)
        with torch.inference_mode():
            tokens = model.eval().generate(shared_embeds=torch.tensor(unit))
        return replace(nearest, captions=processor.batch_decode(tokens, skip_special_tokens=True))

    images = embeddings.image_embeds
    from_images = load_captioner(runs.models / "captions_image_ours_seed0")
    return (
        {
            NEAREST: nearest,
            NEAREST_SHIFTED: nearest_captions(embeddings, training, text_mean - image_mean),
            IMAGE_TRAINED: generate_captions(*from_images, test),
            TEXT_ONLY: write("text", images),
            TEXT_SHIFTED: write("text", images + text_mean - image_mean),
            CEILING: write("text", embeddings.text_embeds),
            NO_NOISE: write("text_noiseless", images),
            NO_NOISE_SHIFTED: write("text_noiseless", images + text_mean - image_mean),
        },
        test,
        limit,
    )


def test_the_numbers_are_those_of_the_captions_that_the_models_write(runs, results):
    written, test, limit = written_by_hand(runs, results)
    found = next(run for run in json.loads(results)["captions"]["runs"] if run["method"] == "ours")
    assert list(found["metrics"]) == list(written) and found["budget"] == "shared"
    scorer, processor = load_checkpoint(runs.models / "papers__scheduled_max_steps_2_seed100")
    images = embed_pairs(scorer, processor, test, max_length=limit).by_image()
    for kind, captions in written.items():
        expected = evaluate_captions(captions)
        expected |= score_captions(scorer, processor, captions, images, max_length=limit)
        assert found["metrics"][kind] == pytest.approx(expected, abs=2e-6), kind
    texts = {tuple(captions.captions) for captions in written.values()}
    assert len(texts) == len(written) == 8


def test_decoders_get_the_plans_pairs_and_its_words(runs, results):
    config = load_config([runs.models / "captions_text_noiseless_ours_seed0" / "train_config.yaml"])
    assert config.data.phantom_train_pairs == 24 and config.data.phantom_size == 32
    assert config.data.cache_images is None  # which is the encoders' own
    assert config.captioning.train_on == "text" and config.captioning.noise == 0
    assert config.captioning.max_new_tokens == 6 and config.training["learning_rate"] == 1e-3
    assert Path(config.model.checkpoint).name == "ours_max_steps_2_seed0"


def test_the_table_and_the_page(runs, results):
    content = json.loads(results)
    table = cells(captions_table(Evidence(content), "cider_d, distinct_captions"))
    assert table[0] == ["encoder", "captions", "CIDEr-D ↑", "distinct captions"]
    assert [row[0] for row in table[1:]] == ["CLIP (LT)"] * 8 + ["ours"] * 8
    values = [
        run["metrics"][NEAREST]["cider_d"] for run in content["captions"]["runs"] if run["method"] == "CLIP (LT)"
    ]
    assert table[1][1:3] == [NEAREST, f"{np.mean(values):.3f}"]
    page = (runs.plan_file.parent / "report" / "evidence_tiny.md").read_text()
    assert captions_table(Evidence(content)) in page and "### Captions against those with the encoder of" in page
    assert "with noise of length 1," in page and "one more text-only decoder, without." in page
    with pytest.raises(ValueError, match="no metric of captions 'cider'; there are coco_bleu_1; "):
        captions_table(Evidence(content), "cider")
    del content["captions"]
    assert captions_table(Evidence(content)) == ""


def test_captions_are_compared_image_by_image_or_seed_by_seed_and_corrected_over_all():
    rng, runs = np.random.default_rng(0), []
    kinds = {NEAREST: 0.0, TEXT_ONLY: 0.4}
    for method in ("CLIP (LT)", "ours", "SigLIP"):
        for seed in (2, 0, 1):
            scores = {kind: (rng.random(60) + gain * (method == "ours")).tolist() for kind, gain in kinds.items()}
            metrics = {kind: {"cider_d": np.mean(each), "rouge_l": rng.random()} for kind, each in scores.items()}
            runs.append({"method": method, "budget": "own", "seed": seed, "metrics": metrics, "cider_d": scores})
    found = caption_comparisons(runs, "CLIP (LT)", np.arange(60) // 2)
    assert len(found) == 2 * 2 * 2 and {each["metric"] for each in found} == {"cider_d", "rouge_l"}
    for metric in ("cider_d", "rouge_l"):
        each = [entry for entry in found if entry["metric"] == metric]
        p = [entry["p"] for entry in each]
        assert [entry["p_holm"] for entry in each] == pytest.approx(holm(p), abs=2e-6)
    by_key = {(each["metric"], each["scope"], each["method"]): each for each in found}
    of_ours = by_key["cider_d", TEXT_ONLY, "ours"]
    assert of_ours["groups"] == 30 and of_ours["p_holm"] < 0.05 and of_ours["test"] == "bootstrap over cases and seeds"
    means = [np.mean([run["metrics"][TEXT_ONLY]["cider_d"] for run in runs[k : k + 3]]) for k in (0, 3)]
    assert of_ours["difference"] == pytest.approx(means[1] - means[0], abs=1e-6)
    values = [[run["metrics"][NEAREST]["rouge_l"] for run in runs[k : k + 3]] for k in (0, 6)]
    of_siglip = by_key["rouge_l", NEAREST, "SigLIP"]
    assert of_siglip["p"] == pytest.approx(ttest_rel(*values).pvalue, abs=1e-6) and of_siglip["groups"] is None
    assert caption_comparisons(runs[3:], "CLIP (LT)", np.arange(60)) == []  # without the baseline


def test_wrong_fields_are_told_before_any_training(plan_file, tmp_path):
    content = yaml.safe_load(plan_file.read_text())
    for change, said in [
        ({"word": []}, "captions: unknown field 'word': did you mean 'words'"),
        ({"methods": ["our"]}, "trains no method 'our': did you mean 'ours'"),
        ({"methods": ["CLIP, mean shift"]}, "trains no method 'CLIP, mean shift'"),
        ({"methods": "ours"}, "methods is 'ours'; give a list"),
        ({"seeds": [0, "one"]}, "captions: seeds are whole numbers"),
        (
            {"scorer": "paper, scheduled"},
            "scorer: nothing trains 'paper, scheduled': did you mean 'papers, scheduled'",
        ),
        ({"words": ["num_layer=3"]}, "captions: .*unknown key 'num_layer': did you mean"),
        ({"words": ["mean_shift=true"]}, "captions: captioning.mean_shift corrects"),
        ({"words": ["encoders=joint"]}, "captions: captioning.train_on is text and captioning.encoders is joint"),
        ({"config": ["captioner.yaml"]}, "captions: There is no config file .*captioner.yaml"),
    ]:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**content, "captions": {**CAPTIONS, **change}}))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_plan(str(tmp_path / "plan.yaml"), [])
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**content, "captions": True}))
    with pytest.raises(ValueError, match="captions holds no mapping but True"):
        read_plan(str(tmp_path / "plan.yaml"), [])


def test_the_command_line_takes_fewer_methods_and_other_seeds(plan_file):
    plan = read_plan(str(plan_file), [], seeds=[7], methods=["CLIP (LT)", "SigLIP"])
    assert plan.captions.methods == ("CLIP (LT)",) and plan.captions.seeds == (7,)
    content = yaml.safe_load(plan_file.read_text())
    del content["captions"]["methods"]
    plan_file.with_name("all.yaml").write_text(yaml.safe_dump(content))
    assert read_plan(str(plan_file.with_name("all.yaml")), [], methods=["CLIP (LT)"]).captions.methods == ()
