"""What model and objective are given in another form than theirs: taken where it is clear what is meant, else told."""

import copy
import math

import pytest
import torch
from conftest import IMAGE_SIZE, tiny_config, tiny_inputs
from modalities import AUDIO, RECORD, modalities_inputs
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

from gap_closed_clip import GapClosedClipModel, gap_closed_loss
from gap_closed_clip.model import objective_gap_closed_clip
from gap_closed_clip.model.losses_gap_closed_clip import unit_vectors


# --- pixels


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, IMAGE_SIZE, IMAGE_SIZE), r"shape \(2, 1, 28, 28\), one gray channel, .* pixel_values\.expand\(-1, 3"),
        ((3, IMAGE_SIZE, IMAGE_SIZE), r"shape \(3, 28, 28\): they are a batch, \(B, 3, height, width\)"),
        ((1, IMAGE_SIZE, IMAGE_SIZE), r"shape \(1, 28, 28\): they are a batch"),
        ((IMAGE_SIZE, IMAGE_SIZE), r"shape \(28, 28\): they are a batch"),
    ],
)
def test_pixels_of_another_layout(tiny_model, shape, message):
    for call in (tiny_model.eval(), tiny_model.get_image_features):
        with pytest.raises(ValueError, match=message):
            call(pixel_values=torch.rand(shape))


def test_the_remedy_for_gray_pixels_is_one(tiny_model):
    gray = torch.rand(2, 1, IMAGE_SIZE, IMAGE_SIZE)
    expected = tiny_model.eval()(pixel_values=torch.cat([gray] * 3, 1)).image_embeds
    assert torch.equal(tiny_model(pixel_values=gray.expand(-1, 3, -1, -1)).image_embeds, expected)


def test_a_tower_of_gray_images_takes_them():
    vision = copy.deepcopy(dict(tiny_config().vision_config.to_dict()))
    vision["model_args"]["in_chans"] = 1
    model = GapClosedClipModel(tiny_config(vision_config=vision)).eval()
    assert model(pixel_values=torch.rand(2, 1, IMAGE_SIZE, IMAGE_SIZE)).image_embeds.shape == (2, 32)


CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


@pytest.mark.parametrize("vision", [CONVNEXT, SWIN, VIT], ids=["convnext", "swin", "vit"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03)])
def test_a_model_of_any_dtype_takes_the_float32_of_processors(vision, dtype, atol):
    torch.manual_seed(0)
    config = tiny_config(vision_config=vision, modalities={"record": {"tower": RECORD}, "audio": {"tower": AUDIO}})
    model = GapClosedClipModel(config).eval()
    inputs = modalities_inputs() | {"pixel_values": torch.randn(4, 3, 32, 32)}
    with torch.no_grad():
        expected = model(**inputs).embeds
        found = model.to(dtype)(**inputs).embeds
    assert found.keys() == {"image", "text", "record", "audio"}
    for name, embeds in found.items():
        torch.testing.assert_close(embeds.float(), expected[name], atol=atol, rtol=0)


# --- whether there is a loss


def test_a_loss_that_is_asked_for_and_cannot_be(tiny_model):
    inputs, model = tiny_inputs(4), tiny_model.eval()
    uneven = inputs | {"pixel_values": inputs["pixel_values"][:3]}
    message = "return_loss=True with 3 images and 4 texts: .* Leave return_loss out"
    with pytest.raises(ValueError, match=message):
        model(**uneven, return_loss=True)
    for options in ({}, {"return_loss": None}, {"return_loss": False}):
        output = model(**uneven, **options)
        assert output.loss is None and output.logits_per_image.shape == (3, 4)
    with pytest.raises(ValueError, match="return_loss=True with images alone: .* give both"):
        model(pixel_values=inputs["pixel_values"], return_loss=True)
    with pytest.raises(ValueError, match="return_loss=True with texts alone"):
        model(input_ids=inputs["input_ids"], return_loss=True)
    expected = model(**inputs).loss
    assert torch.equal(model(**inputs, return_loss=True).loss, expected)
    assert model(**inputs, return_loss=False).loss is None
    assert model.train()(**inputs, return_loss=False).loss is None


@pytest.mark.parametrize("name", ["group_ids", "modality_mask"])
def test_a_list_in_the_place_of_a_tensor(tiny_model, name):
    with pytest.raises(ValueError, match=rf"{name} is a list: give a tensor, torch.tensor\({name}\)"):
        gap_closed_loss([torch.eye(3), torch.eye(3)], 14.0, **{name: [0, 1, 2]})


class Exported(torch.nn.Module):
    """What torch.export makes of a whole model: images and texts to their logits and, of pairs, the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids, attention_mask):
        outputs = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return outputs.logits_per_image, outputs.get("loss")


@pytest.mark.parametrize("paired", [True, False])
def test_export_with_batches_of_any_size(tiny_model, paired):
    def inputs(images: int, texts: int) -> tuple[torch.Tensor, ...]:
        tokens = tiny_inputs(texts)
        return tiny_inputs(images)["pixel_values"], tokens["input_ids"], tokens["attention_mask"]

    module, images = Exported(tiny_model.eval()), torch.export.Dim("images", min=2, max=64)
    texts = images if paired else torch.export.Dim("texts", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            module, inputs(4, 4 if paired else 5), dynamic_shapes=[{0: images}, {0: texts}, {0: texts}]
        )
        others = inputs(7, 7 if paired else 3)
        expected, found = module(*others), program.module()(*others)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (found[1] is None) == (expected[1] is None) == (not paired)
    if paired:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


def test_a_plain_trainer_evaluates_the_loss(tiny_model, tmp_path):
    """It asks the signature of forward whether a model without labels has one."""
    rows = tiny_inputs(4)
    dataset = [{name: values[index] for name, values in rows.items()} for index in range(4)]
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4)
    found = Trainer(tiny_model, args, eval_dataset=dataset).evaluate()["eval_loss"]
    assert found == pytest.approx(tiny_model.eval()(**rows).loss.item(), abs=1e-5)


# --- the temperature of another CLIP


@pytest.fixture
def clip_scale() -> torch.Tensor:
    """The scalar that transformers' CLIP keeps."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes, projection_dim=8, logit_scale_init_value=3.25))
    assert clip.logit_scale.shape == ()
    return clip.logit_scale.detach()


def test_a_scale_that_is_a_number_or_a_scalar_loads(clip_scale):
    for value in (3.25, 3, clip_scale, clip_scale.half(), clip_scale[None]):
        model = GapClosedClipModel(tiny_config())
        model.load_state_dict(model.state_dict() | {"temperature.logit_scale": value})
        assert model.logit_scale.shape == (1,) and model.logit_scale.dtype == torch.float32
        assert model.logit_scale.item() == float(value)
        assert model.temperature().item() == pytest.approx(math.exp(float(value)), rel=1e-6)


def test_setting_the_scale(tiny_model, clip_scale):
    for value in (3.25, clip_scale, clip_scale[None]):
        parameter = tiny_model.logit_scale
        tiny_model.logit_scale = 0.0
        tiny_model.logit_scale = value
        assert tiny_model.logit_scale is parameter and parameter.tolist() == [3.25] and parameter.requires_grad
    with pytest.raises(ValueError, match=r"logit_scale has the shape \(2,\): it is one number, the log"):
        tiny_model.logit_scale = torch.ones(2)


def test_a_scalar_in_the_place_of_the_scale_is_saved_to_load_again(tiny_model, clip_scale, tmp_path):
    tiny_model.logit_scale.data = clip_scale
    tiny_model.train()(**tiny_inputs()).loss.backward()
    tiny_model.save_pretrained(tmp_path)
    assert GapClosedClipModel.from_pretrained(tmp_path).logit_scale.tolist() == [3.25]


@pytest.mark.parametrize("tiled", [False, True])
def test_the_objective_takes_a_number_for_the_scale(tiled):
    torch.manual_seed(0)
    embeddings = [unit_vectors(torch.randn(5, 8)) for _ in range(2)]
    expected = gap_closed_loss(embeddings, torch.tensor(14.0), tiled=tiled)
    for scale in (14, 14.0, torch.tensor([14.0]), torch.tensor(14.0, dtype=torch.float64)):
        for found, value in zip(gap_closed_loss(embeddings, scale, tiled=tiled), expected, strict=True):
            assert found.shape == () and found.dtype == torch.float32
            torch.testing.assert_close(found, value)
    doubles = gap_closed_loss([z.double() for z in embeddings], 14.1, tiled=tiled)
    reference = gap_closed_loss([z.double() for z in embeddings], torch.tensor(14.1, dtype=torch.float64), tiled=tiled)
    assert doubles.loss == reference.loss


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, "logit_scale is 0.0: it is 1 / temperature, a number above 0"),
        (-2, "logit_scale is -2: "),
        (math.nan, "logit_scale is nan: "),
        (math.inf, "logit_scale is inf: "),
        (torch.ones(2), r"logit_scale has the shape \(2,\): it is one number"),
    ],
)
def test_a_scale_that_is_none(scale, message):
    with pytest.raises(ValueError, match=message):
        gap_closed_loss([torch.eye(3), torch.eye(3)], scale)


# --- texts


def on_the_left(inputs):
    """The same texts, with their padding before them."""
    lengths = inputs["attention_mask"].sum(1)
    return {name: torch.stack([row.roll(9 - int(n)) for row, n in zip(value, lengths, strict=True)])
            for name, value in inputs.items()}  # fmt: skip


@pytest.mark.parametrize("text", ["bert", "clip_text_model", "siglip_text_model"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_padding_on_the_left_changes_no_embedding(text, pooling):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    config = {"model_type": text, **sizes, "vocab_size": 200, "max_position_embeddings": 64, "eos_token_id": 199}
    if text != "bert" and pooling != "pooler":
        pytest.skip(f"a {text} is pooled by itself")
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(text_config=config, text_pooling=pooling)).eval()
    inputs = {name: value for name, value in tiny_inputs().items() if name != "pixel_values"}
    inputs["token_type_ids"] = torch.arange(9).expand(4, -1) % 2
    with torch.no_grad():
        expected = model(**inputs).text_embeds
        torch.testing.assert_close(model(**on_the_left(inputs)).text_embeds, expected)
    assert (expected - expected[:1]).abs().max() > 0.01


def test_features_of_images_and_of_texts_of_a_whole_batch(tiny_model):
    inputs = tiny_inputs()
    with torch.no_grad():
        outputs = tiny_model.eval()(**inputs)
        images, texts = tiny_model.get_image_features(**inputs), tiny_model.get_text_features(**inputs)
    torch.testing.assert_close(unit_vectors(images.pooler_output), outputs.image_embeds)
    torch.testing.assert_close(unit_vectors(texts.pooler_output), outputs.text_embeds)


# --- batches of one, configurations changed on loading


def test_a_training_batch_of_one_pair_is_told_of_and_leaves_the_running_mean(monkeypatch):
    told = []
    monkeypatch.setattr(objective_gap_closed_clip.logger, "warning_once", told.append)
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(center_projections=True)).train()
    model(**tiny_inputs())
    mean = model.visual_centering.running_mean.clone()
    assert not told
    output = model(**tiny_inputs(1))
    assert len(told) == 1 and "A training batch has one pair" in told[0]
    assert torch.equal(model.visual_centering.running_mean, mean) and model.visual_centering.num_batches_tracked == 1
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(1))  # and not a row of zeros
    output.loss.backward()
    assert model.visual_projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrastive_loss": "sigmod"}, "contrastive_loss is 'sigmod'"),
        ({"text_pooling": "nope"}, "text_pooling is 'nope'"),
        ({"align_weight": -1.0}, "align_weight is -1.0"),
        ({"align_weight": "abc"}, "align_weight"),
        ({"anchor": "texts"}, "anchor is 'texts'"),
        ({"max_logit_scale": -1.0}, "max_logit_scale is -1.0"),
    ],
)
def test_a_field_changed_on_loading_is_checked(tiny_model, tmp_path, change, message):
    tiny_model.save_pretrained(tmp_path)
    assert GapClosedClipModel.from_pretrained(tmp_path, align_weight=2.5).config.align_weight == 2.5
    with pytest.raises(ValueError, match=message):
        GapClosedClipModel.from_pretrained(tmp_path, **change)
