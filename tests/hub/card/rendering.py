"""What the tests of the card share: figures, configurations, and the card of a folder with its parts."""

import json
import math
import re
from pathlib import Path

from gap_closed_clip.hub import write_card
from gap_closed_clip.training import load_config


METRICS = {
    "modality_gap": 0.11237,
    "debiased_modality_gap": 0.08461,
    "true_pair_cosine": 0.70449,
    "random_pair_cosine": 0.03012,
    "margin": 0.67437,
    "text_to_image_recall@1": 0.12349,
    "text_to_image_recall@10": 0.41387,
    "image_to_text_recall@10": 0.23349,
    "text_to_image_median_rank": 17.5,
    "v_measure": math.nan,  # not measured
    "num_pairs": 97.0,
}
PHANTOMS = ["model.vision={architecture: eva02_tiny_patch14_224}", "model.text={hidden_size: 48}"]
OF_THE_HUB = [
    "model.vision=timm/eva_giant_patch14_clip_224.laion400m",
    "model.text=google-bert/bert-base-uncased",
    "data.source=eltorio/ROCOv2-radiology",
]


def render(folder: Path, *overrides: str, repo_id=None, license=None, **facts) -> str:
    """The card of a folder that was trained with these overrides; `facts` are those of run.json."""
    if (folder / "config.json").exists():
        load_config([], list(overrides) or PHANTOMS).save(folder / "train_config.yaml")
        (folder / "run.json").write_text(json.dumps(facts))
    write_card(folder, repo_id=repo_id, license=license)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n" not in text
    return text


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
