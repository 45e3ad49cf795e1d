"""Tiny runs with further modalities: their configuration, and a table of images, captions, records and sounds."""

from pathlib import Path

import numpy as np
from conftest import noise_image
from datasets import Dataset

from gap_closed_clip.training import RunConfig, load_config


RUN = """
model:
  vision:
    architecture: eva02_tiny_patch14_224
    model_args: {img_size: 28, embed_dim: 48, depth: 1, num_heads: 3}
  text: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 64, vocab_size: 300}
  projection_dim: 16
data:
  phantom_train_pairs: 24
  phantom_validation_pairs: 8
  phantom_test_pairs: 12
  phantom_size: 32
training:
  max_steps: 2
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 8
  learning_rate: 1e-3
  logging_steps: 1
  save_strategy: "no"
  final_split: none
  use_cpu: true
  disable_tqdm: true
  report_to: none
"""
# The sections data and training alone, for runs that start from a checkpoint.
WITHOUT_MODEL = RUN[RUN.index("data:") :]
RECORD = "data.modalities={record: [age, sex, organ, finding_size]}"
FRAMES, BINS, RATE = 24, 16, 400
AUDIO = (
    "model.modalities={audio: {tower: {model_type: audio-spectrogram-transformer, hidden_size: 16, num_hidden_layers: "
    f"1, num_attention_heads: 2, intermediate_size: 16, patch_size: 8, max_length: {FRAMES}, num_mel_bins: {BINS}, "
    "frequency_stride: 8, time_stride: 8}}}"
)


def write_table(folder: Path, number: int = 16) -> Path:
    """
    A parquet file of samples: `image`, `caption`, `age`, `sex`, `empty`, `spectrogram` (FRAMES, BINS), `wave` (RATE,)
    and `lateral`, a second image. The third sample lacks the sounds, the fourth its caption, the fifth its image.
    """
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        paths = {name: folder / f"{name}-{index}.png" for name in ("image", "lateral")}
        for place, path in enumerate(paths.values()):
            noise_image(40, seed=2 * index + place).save(path)
        rows.append(
            {
                "image": None if index == 4 else str(paths["image"]),
                "caption": None if index == 3 else f"Radiograph number {index} of a patient.",
                "age": float(generator.integers(20, 80)),
                "sex": "female" if index % 2 else "male",
                "empty": None,
                "spectrogram": None if index == 2 else generator.normal(size=(FRAMES, BINS)).tolist(),
                "wave": None if index == 2 else generator.normal(size=RATE).tolist(),
                "lateral": str(paths["lateral"]),
            }
        )
    Dataset.from_list(rows).to_parquet(str(folder / "samples.parquet"))
    return folder / "samples.parquet"


def tiny_run(folder: Path, *words: str) -> RunConfig:
    """A tiny run into `folder/run`; with a checkpoint among the words, without the section model."""
    path = folder / "run.yaml"
    path.write_text(WITHOUT_MODEL if any("checkpoint=" in word for word in words) else RUN)
    return load_config([path], [f"output_dir={folder / 'run'}", *words])
