"""CLIPs of transformers as models of ours: what they embed, how they are saved, loaded, adapted and refused."""

import json
import math
import shutil

import pytest
import torch
from conftest import CAPTIONS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    LlavaConfig,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
)

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor, from_clip
from gap_closed_clip.checkpoint import is_captioner, load_checkpoint
from gap_closed_clip.conversion import is_foreign, transformers_clip
from gap_closed_clip.hub import write_card
from gap_closed_clip.model import tower_kinds_gap_closed_clip
from gap_closed_clip.training import LoraArguments, ModelArguments, build_model_and_processor
from gap_closed_clip.training.arguments import GapClosedTrainingArguments
from gap_closed_clip.training.gradients import without_gradient
from gap_closed_clip.training.lora import add_adapters
from gap_closed_clip.training.trainer import GapClosedClipTrainer

from .clip_models import (
    ENDS,
    KINDS,
    SHAPE,
    SIDE,
    TEXT,
    TEXT_LENGTH,
    VISION,
    embed_by_transformers,
    photo,
    save_source,
)


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    return save_source(request.param, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_source("CLIP", tmp_path_factory.mktemp("clip"))


def embed(model, processor):
    """Image, texts, and their logits by one of our models, through its own processor."""
    inputs = processor(images=photo(), text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval()(**inputs, return_loss=False)
    return outputs.image_embeds, outputs.text_embeds, outputs.logits_per_image


def batch(model, processor, n: int = 4):
    torch.manual_seed(1)
    tokens = processor.tokenizer(CAPTIONS[:n], padding=True, truncation=True, return_tensors="pt")
    return {"pixel_values": torch.randn(n, 3, SIDE, SIDE), **tokens}


def test_nothing_is_lost(source, tmp_path):
    expected = embed_by_transformers(source, photo(), CAPTIONS)
    model, processor = from_clip(source)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = GapClosedClipModel.from_pretrained(tmp_path), GapClosedClipProcessor.from_pretrained(tmp_path)
    for found in (embed(model, processor), embed(*loaded)):
        for part, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
    # Longer texts are cut where the tower ends.
    assert loaded[1].tokenizer.model_max_length == TEXT_LENGTH == model.max_text_length


def test_the_temperature_and_the_bias_are_taken_over(tmp_path):
    model, _ = from_clip(save_source("SigLIP", tmp_path))
    assert model.temperature().item() == pytest.approx(115.58, abs=0.01)  # exp(4.75), above CLIP's cap of 100
    assert model.train().temperature().item() == pytest.approx(115.58, abs=0.01)
    assert model.config.logit_bias == model.logit_bias == -12.5
    goes_on, _ = from_clip(tmp_path, contrastive_loss="sigmoid")
    assert goes_on.temperature.logit_bias.item() == -12.5


def test_fields_of_the_configuration(clip):
    model = GapClosedClipModel.from_clip(clip, align_weight=2.0, learnable_temperature=False)
    assert (model.config.align_weight, model.config.learnable_temperature) == (2.0, False)
    assert model.config.center_projections and not model.visual_centering.running_mean.any()
    assert not model.config.vision_config.name_or_path and str(clip) not in model.config.to_json_string()


def test_all_of_it_trains(source):
    model, processor = from_clip(source)
    model.train()
    model(**batch(model, processor)).loss.backward()
    assert without_gradient(model) == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gradient_checkpointing_gives_the_same_gradients(source):
    model, processor = from_clip(source)
    inputs, gradients = batch(model, processor), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("layers", ["attention", "mlp", "all"])
def test_every_adapter_trains_and_merges_exactly(source, layers):
    model, processor = from_clip(source)
    wrapped = add_adapters(model, LoraArguments(layers=layers), None, None).train()
    wrapped(**batch(model, processor)).loss.backward()
    assert without_gradient(wrapped) == []
    adapted = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}
    per_block = {"attention": 4, "mlp": 2, "all": 6}[layers]
    in_blocks = [name for name in adapted if ".head." not in name]  # SigLIP's pooling has an MLP of its own
    assert len(in_blocks) == per_block * 4  # two blocks in either tower
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    before = embed(wrapped, processor)
    after = embed(wrapped.merge_and_unload(), processor)
    for part, whole in zip(after, before, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


def test_other_image_sizes_are_interpolated(clip):
    model, processor = from_clip(clip)
    with torch.no_grad():
        larger = model(pixel_values=torch.randn(1, 3, 64, 48)).image_embeds
        source = AutoModel.from_pretrained(clip)
        torch.manual_seed(3)
        pixels = torch.randn(1, 3, 64, 48)
        expected = source.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
        found = model(pixel_values=pixels).image_embeds
    assert larger.shape == (1, 16)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-5, atol=1e-6)


# --- as a checkpoint, and its halves as towers


def test_it_loads_as_a_checkpoint(clip):
    model, processor = load_checkpoint(clip)
    torch.testing.assert_close(embed(model, processor), embed_by_transformers(clip, photo(), CAPTIONS))
    assert is_foreign(clip) and not is_captioner(clip)


def test_training_starts_from_it(clip):
    args = ModelArguments(checkpoint=str(clip), freeze_vision=True, train_vision_blocks=1, freeze_text=True)
    args.config = {"align_weight": 1.0, "projection_dim": 16}
    model, _ = build_model_and_processor(args, [])
    trained = {name for name, parameter in model.vision_model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("encoder.layers.1.", "post_layernorm.")) for name in trained)


def test_the_halves_of_a_clip_are_towers(clip):
    model, processor = build_model_and_processor(ModelArguments(vision=str(clip), text=str(clip)), [])
    assert (model.config.image_pooling, model.config.text_pooling) == ("pooler", "pooler")
    source = AutoModel.from_pretrained(clip).eval()
    inputs = processor(images=photo(), text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        image = model.eval().encode_image(inputs["pixel_values"]).pooler_output
        text = model.encode_text(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        expected = source.vision_model(inputs["pixel_values"]).pooler_output
        expected_text = source.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(text, expected_text)


# --- what can't be taken over


def test_a_model_of_text_alone(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert model, which has no image tower of its own, so it is no CLIP"):
        from_clip(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "has no image processor: put its preprocessor_config.json there"),
        ("tokenizer.json", "has no tokenizer: put its tokenizer.json"),
        ("model.safetensors", "could not be loaded. Is it a folder"),
    ],
)
def test_a_missing_file(clip, tmp_path, missing, message):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises((OSError, ValueError), match=message):
        from_clip(tmp_path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="holds no model that can be read: .*Name the folder that has it"):
        from_clip(tmp_path)


def test_missing_weights(clip, tmp_path, caplog, capfd):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    weights = load_file(clip / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "visual_projection" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights of a CLIPModel, the first: visual_projection.*Download"):
        from_clip(tmp_path)
    assert not caplog.records and capfd.readouterr().err.count("\n") < 2  # the library's own table has many lines


def test_weights_of_other_shapes(clip, tmp_path, caplog, capfd):
    """Of an image tower that config.json no longer describes, say."""
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"do not fit config.json. The first that has another shape: \w+[\w.*]+\. Download it again, or save"
    with pytest.raises(ValueError, match=message) as info:
        from_clip(tmp_path)
    assert "\n" not in str(info.value) and "above report" not in str(info.value)
    assert not caplog.records and "MISMATCH" not in capfd.readouterr().err


def test_pickled_weights_need_a_yes(clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    weights = load_file(clip / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has pickled weights alone .*allow_pickle=true"):
        from_clip(tmp_path)
    expected = embed_by_transformers(clip, photo(), CAPTIONS)
    torch.testing.assert_close(embed(*load_checkpoint(tmp_path, allow_pickle=True)), expected)


def test_an_adapter_beside_the_weights_is_refused(clip, tmp_path):
    """transformers would load it, and what is saved of that could not be loaded again."""
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(clip), adapter).save_pretrained(tmp_path)
    for load in (
        from_clip,
        load_checkpoint,
        lambda folder: GapClosedClipModel.from_vision_text_pretrained(str(folder), str(clip)),
        lambda folder: GapClosedClipModel.from_vision_text_pretrained(str(clip), str(folder)),
    ):
        with pytest.raises(ValueError, match="a whole model and an adapter beside it, .* Move adapter_config.json"):
            load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    expected = embed_by_transformers(clip, photo(), CAPTIONS)
    torch.testing.assert_close(embed(*load_checkpoint(tmp_path)), expected)


def test_a_model_that_would_embed_otherwise_is_refused(clip, monkeypatch):
    monkeypatch.setattr(transformers_clip, "_layers", lambda projection: [(-projection.weight.detach(), None)])
    for fields in ({}, {"image_pooling": "pooler"}, {"text_pooling": "pooler"}):
        with pytest.raises(ValueError, match="can't be taken over: its image embeddings would differ by"):
            from_clip(clip, **fields)


def test_a_pooling_that_stands_in_for_the_sources_own_is_compared(tmp_path, monkeypatch):
    folder = save_source("CLIPSeg", tmp_path)
    with pytest.raises(ValueError, match="text_pooling is 'cls': in a clipseg_text_model no token but the last"):
        from_clip(folder, text_pooling="cls")
    monkeypatch.setattr(tower_kinds_gap_closed_clip, "END_OF_TEXT", ())  # as of a tower that is not known
    for pooling in ("cls", "mean"):
        with pytest.raises(ValueError, match="its text embeddings would differ by"):
            from_clip(folder, text_pooling=pooling)


def test_the_decoder_of_clipseg_is_left_out(tmp_path):
    """Its CLIP is the reference: transformers before 5.21 does not find it in the whole model."""
    alone = save_source("CLIPSeg", tmp_path / "clip")
    folder = shutil.copytree(alone, tmp_path / "whole")
    whole = CLIPSegForImageSegmentation(CLIPSegConfig.from_pretrained(folder, extract_layers=[0, 1], reduce_dim=8))
    whole.clip.load_state_dict(AutoModel.from_pretrained(alone).state_dict())
    whole.save_pretrained(folder)
    model, processor = from_clip(folder)
    torch.testing.assert_close(embed(model, processor), embed_by_transformers(alone, photo(), CAPTIONS))


def test_naflex_is_refused(tmp_path):
    vision = {**SHAPE, "patch_size": 16, "num_patches": 4}
    Siglip2Model(Siglip2Config(text_config={**ENDS, "projection_size": 32}, vision_config=vision)).save_pretrained(
        tmp_path
    )
    for processor in (Siglip2ImageProcessor(patch_size=16, max_num_patches=4), CLIPImageProcessor()):
        processor.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"siglip2 model of NaFlex.* spatial_shapes\), and can't be taken over"):
            from_clip(tmp_path)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_an_image_processor_of_another_size(kind, tmp_path):
    folder = save_source(kind, tmp_path)
    square = {"height": 48, "width": 48}
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=square).save_pretrained(folder)
    with pytest.raises(
        ValueError,
        match=rf"{tmp_path}: preprocessor_config.json makes images of 48 x 48, and the model takes 32 x 32 .*Put",
    ):
        from_clip(folder)


def test_another_model_with_two_towers(tmp_path):
    LlavaConfig(vision_config={**VISION, "model_type": "clip_vision_model"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llava model, which can't be taken over: it has no vision_model"):
        from_clip(tmp_path)


def test_the_trainer_decays_matrices_and_knows_all_that_trains(source, tmp_path):
    model, processor = from_clip(source)
    args = GapClosedTrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True)
    groups = GapClosedClipTrainer(model=model, args=args, processing_class=processor).create_optimizer().param_groups
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == trained
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed and all(p.ndim > 1 for p in decayed)


def test_a_folder_of_ours_is_no_source(clip, tmp_path):
    from_clip(clip)[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of ours: load it by"):
        from_clip(tmp_path)


def test_the_card_of_what_was_taken_over_claims_no_training(clip, tmp_path):
    model, processor = from_clip(clip)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    card = str(write_card(tmp_path))
    assert "taken over from\n`clip_vision_model + clip_text_model`, whose terms of use apply" in card
    assert "## Objective" not in card and "was trained" not in card.partition("## How to use")[0]
    assert f"images of {SIDE} x {SIDE} pixels" in card


def test_a_tokenizer_that_pads_with_another_token(tmp_path):
    folder = save_source("dual encoder, DINOv2 + XLM-R", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["pad_token_id"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pads with token 0, the xlm-roberta with 1, behind which it numbers"):
        from_clip(folder)


def test_a_field_that_is_not_there(clip):
    with pytest.raises(ValueError, match="has no field 'align_weigth'.*align_weight"):
        from_clip(clip, align_weigth=3.0)
    with pytest.raises(ValueError, match="projection_dim is 16 in this model, and can't be made 8"):
        from_clip(clip, projection_dim=8)
    assert from_clip(clip, image_pooling="mean", projection_dim=16)[0].config.image_pooling == "mean"
    with pytest.raises(ValueError, match="can't be taken over: text_config is that of the model which is taken over"):
        from_clip(clip, text_config={})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(clip, tmp_path, value):
    """They are told of, and not that NaN differs from NaN."""
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    model = CLIPModel.from_pretrained(clip)
    model.text_projection.weight.data[3, 5] = value
    model.save_pretrained(tmp_path)
    for load in (from_clip, load_checkpoint):
        with pytest.raises(ValueError, match="weights that are NaN or infinite, the first in text_projection.weight"):
            load(tmp_path)


def test_a_damaged_file(clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="a safetensors file is "):
        from_clip(tmp_path)
