"""Towers whose weights are saved by other names than those of their layers: resuming, and the best model."""

import copy

import pytest
import torch
from conftest import captioner_of, make_tiny_processor, tiny_config
from modalities import AUDIO
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import configure, tiny  # noqa: F401
from trainers import STEPS, losses, make_pairs, make_trainer
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers.trainer_utils import load_sharded_checkpoint

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.training import train


SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"model_type": "vit", "image_size": 28, "patch_size": 14, **SIZES}
SWIN = {"model_type": "swin", "image_size": 28, "patch_size": 4, "embed_dim": 12, "depths": [1], "num_heads": [2]}
NOMIC = {"model_type": "nomic_bert", "vocab_size": 200, "max_position_embeddings": 64, **SIZES}
TOWERS = {
    "vit": {"vision_config": VIT},
    "dinov3": {"vision_config": VIT | {"model_type": "dinov3_vit"}},
    "swin": {"vision_config": SWIN | {"window_size": 7}},
    "nomic": {"text_config": NOMIC},  # a file has query, key and value in one
    "audio": {"modalities": {"sound": {"tower": AUDIO}}},
}


def unlike(expected: torch.nn.Module, found: torch.nn.Module) -> list[str]:
    state = found.state_dict()
    return [name for name, weight in expected.state_dict().items() if not torch.equal(weight, state[name])]


def renamed(folder, model) -> list[str]:
    """Names in the files of a folder that no layer of the model has."""
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return sorted(set(names) - model.state_dict().keys())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_saved_file_is_read_into_the_layers(tower, sharded, tmp_path):
    model, other = (GapClosedClipModel(tiny_config(**copy.deepcopy(TOWERS[tower]))) for _ in range(2))
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert renamed(tmp_path, model) and unlike(model, other)
    random = torch.get_rng_state()
    if sharded:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        load_sharded_checkpoint(other, tmp_path, strict=False)
    else:
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            other.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert not unlike(model, other)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_captioner_of_such_a_tower(tmp_path):
    tokenizer = make_tiny_processor().tokenizer
    model, other = (captioner_of(tokenizer, vision_config=dict(VIT)) for _ in range(2))
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    model.save_pretrained(tmp_path)
    assert renamed(tmp_path, model)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        other.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=False)  # noqa: SIM118
    assert not unlike(model, other)


def test_names_that_nothing_knows_are_told_of_as_ever():
    model = GapClosedClipModel(tiny_config(vision_config=dict(VIT)))
    state = model.state_dict()
    state["nowhere"] = state.pop("visual_projection.weight")
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["visual_projection.weight"], ["nowhere"])
    with pytest.raises(RuntimeError, match="visual_projection.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("kind", ["vanilla", "ours"])
def test_resuming_ends_where_the_unbroken_run_did(kind, tmp_path):
    end_of_epoch = 8 if kind == "vanilla" else 6
    towers = {"vision_config": VIT, "text_config": NOMIC}
    unbroken = make_trainer(kind, tmp_path, config=copy.deepcopy(towers), save_steps=end_of_epoch)
    unbroken.train()
    checkpoint = tmp_path / f"checkpoint-{end_of_epoch}"
    assert renamed(checkpoint, unbroken.model)
    resumed = make_trainer(kind, tmp_path / "resumed", config=copy.deepcopy(towers))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses(unbroken)) == STEPS and losses(resumed) == losses(unbroken)
    assert not unlike(unbroken.model, resumed.model)


@pytest.mark.parametrize("kind", ["vanilla", "ours"])
def test_the_best_model_is_there_at_the_end(kind, tmp_path):
    # By what is largest, or smallest, in the beginning: the scale, which each step takes down, or the loss.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": kind == "vanilla"}
    trainer = make_trainer(
        *(kind, tmp_path),
        config={"vision_config": dict(VIT)},
        eval_dataset=make_pairs(8, augment=False),
        **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6, **best},
    )
    trainer.train()
    folder = trainer.state.best_model_checkpoint
    assert not folder.endswith("checkpoint-6")  # the largest loss is an early one
    assert not unlike(GapClosedClipModel.from_pretrained(folder), trainer.model)
    assert unlike(GapClosedClipModel.from_pretrained(tmp_path / "checkpoint-6"), trainer.model)


def test_a_run_of_the_command_goes_on_bit_for_bit(configure, tmp_path):
    ViTModel(ViTConfig(**SIZES, image_size=28, patch_size=14)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "vit")
    words = [f"vision={tmp_path / 'vit'}", "eval_strategy=no", "final_split=none", "max_steps=4"]
    train(configure(*words))
    again = [f"output_dir={tmp_path / 'again'}", f"resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}"]
    train(configure(*words, *again))
    expected, found = (GapClosedClipModel.from_pretrained(tmp_path / name) for name in ("run", "again"))
    assert renamed(tmp_path / "run" / "checkpoint-2", expected)
    assert not unlike(expected, found)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    make_trainer("ours", tmp_path, max_steps=5).train()
    path = tmp_path / "checkpoint-5" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if "visual_projection" not in name}  # noqa: SIM118
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="The checkpoint lacks 2 weights of the model, .*visual_projection.bias"):
        make_trainer("ours", tmp_path).train(resume_from_checkpoint=str(path.parent))
