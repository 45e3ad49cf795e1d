"""Tiny models of four modalities: image, text, a record and spectrograms."""

import torch
from conftest import tiny_config, tiny_inputs

from gap_closed_clip import GapClosedClipConfig


RECORD = {
    "model_type": "gap_closed_clip_record",
    "num_numbers": 2,
    "categories": [4, 3],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
}
AUDIO = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_mel_bins": 16,
    "max_length": 24,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def modalities_config(**kwargs) -> GapClosedClipConfig:
    """Image, text, a record of two numbers and two categories, and spectrograms."""
    return tiny_config(modalities={"record": {"tower": RECORD}, "audio": {"tower": AUDIO}}, **kwargs)


def modalities_inputs(n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        **tiny_inputs(n, seed),
        "record_numbers": torch.randn(n, 2, generator=generator),
        "record_numbers_mask": torch.rand(n, 2, generator=generator) > 0.3,
        "record_categories": torch.randint(0, 3, (n, 2), generator=generator),
        "audio_input_values": torch.randn(n, 24, 16, generator=generator),
    }
