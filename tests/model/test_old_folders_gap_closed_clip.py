"""
Folders of 0.1.0 give what they gave then.

`folders_of_0_1_0.json` holds, of an encoder, an adapter on it and a captioner, the configurations and the names and
shapes of weights that 0.1.0 wrote (torch 2.11, transformers 5.17), and what its code made of them and of `pixels` and
`TOKENS`. The weights themselves follow from names and shapes.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel


FOUND = json.loads(Path(__file__).with_name("folders_of_0_1_0.json").read_text())
TOKENS = {
    "input_ids": torch.tensor([[2, 17, 60, 111, 3], [2, 90, 31, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}


def made_up(shape: list[int], number: int) -> torch.Tensor:
    """Irregular values between -0.5 and 0.5 that depend on no random generator."""
    index = torch.arange(torch.Size(shape).numel())
    values = (index * index * 31 + index * 7919 + number * 104729) % 2003
    return (values / 2003 - 0.5).reshape(shape)


def write_folder(kind: str, folder: Path) -> Path:
    """The folder of an "encoder", an "adapter" or a "captioner", as 0.1.0 wrote it."""
    folder.mkdir()
    written, adapter = FOUND[kind], kind == "adapter"
    (folder / f"{'adapter_' * adapter}config.json").write_text(json.dumps(written["config"]))
    weights = {name: made_up(written["shapes"][name], i) for i, name in enumerate(sorted(written["shapes"]))}
    save_file(weights, folder / f"{'adapter_' * adapter}model.safetensors", metadata={"format": "pt"})
    return folder


def load_whole(model_class: type, folder: Path) -> torch.nn.Module:
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture
def pixels():
    return made_up([2, 3, 28, 28], 0) * 4


@torch.no_grad()
def assert_embeds(model, pixels, written):
    output = model(pixel_values=pixels, **TOKENS)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(getattr(output, name), torch.tensor(written[name]), rtol=0, atol=1e-5)


def test_an_encoder_of_0_1_0_embeds_as_it_did(pixels, tmp_path):
    model = load_whole(GapClosedClipModel, write_folder("encoder", tmp_path / "encoder"))
    assert_embeds(model, pixels, FOUND["encoder"])
    assert model.state_dict().keys() == FOUND["encoder"]["shapes"].keys()


def test_an_adapter_of_0_1_0_embeds_as_it_did(pixels, tmp_path):
    model = load_whole(GapClosedClipModel, write_folder("encoder", tmp_path / "encoder"))
    adapted = PeftModel.from_pretrained(model, write_folder("adapter", tmp_path / "adapter")).eval()
    assert_embeds(adapted, pixels, FOUND["adapter"])


@torch.no_grad()
def test_a_captioner_of_0_1_0_weighs_the_next_words_as_it_did(pixels, tmp_path):
    model = load_whole(GapClosedClipForConditionalGeneration, write_folder("captioner", tmp_path / "captioner"))
    logits = model(pixel_values=pixels, input_ids=TOKENS["input_ids"]).logits[:, 2, :12]
    torch.testing.assert_close(logits, torch.tensor(FOUND["captioner"]["logits"]), rtol=1e-4, atol=1e-4)
