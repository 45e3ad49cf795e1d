"""Models that open_clip makes and saves: what is read of them embeds as open_clip does, from files and texts on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from gap_closed_clip import GapClosedClipImageProcessor, GapClosedClipProcessor
from gap_closed_clip.conversion import is_open_clip, open_clip_parts


pytest.importorskip("open_clip", reason='pip install -e ".[test]": open_clip makes the models')

from .open_clip_models import (  # noqa: E402
    CAPTIONS,
    KINDS,
    LONG,
    Reference,
    embed_images,
    embed_texts,
    load_reference,
    real_images,
    save_model,
)


WEIGHTS = "open_clip_model.safetensors"
EMBEDDING = "token_embedding.weight"
TOWERS = {
    "ViT-B-32": ("CLIPVisionModel", "CLIPTextModel"),
    "ViT, custom text": ("CLIPVisionModel", "CLIPTextModel"),
    "BiomedCLIP": ("TimmWrapperModel", "BertModel"),
    "EVA-02": ("TimmWrapperModel", "CLIPTextModel"),
    "timm mlp, RoBERTa mean": ("TimmWrapperModel", "RobertaModel"),
    "ConvNeXt, BERT pooler": ("TimmWrapperModel", "BertModel"),
    "SigLIP": ("TimmWrapperModel", "SiglipTextModel"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def reference(request, tmp_path_factory) -> Reference:
    return load_reference(save_model(request.param, tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return save_model("ViT-B-32", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def biomed(tmp_path_factory) -> Path:
    return save_model("BiomedCLIP", tmp_path_factory.mktemp("biomed"))


def copied(folder: Path, target: Path, without: tuple[str, ...] = (), **changes) -> Path:
    """A copy of a model's folder; `changes` are of sections of model_cfg (`vision_cfg`, ...) or `preprocess_cfg`."""
    target = target / "copy"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*without))
    path = target / "open_clip_config.json"
    config = json.loads(path.read_text())
    for section, values in changes.items():
        place = config if section in config else config["model_cfg"]
        place[section] = {**place.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(json.dumps(config))
    return target


def reweighted(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


# What is taken over.


def test_embeddings_are_those_of_open_clip(reference):
    parts, images = open_clip_parts(reference.folder), real_images()
    with torch.no_grad():
        pixels = torch.stack([reference.preprocess(image) for image in images])
        expected = reference.model.encode_image(pixels, normalize=True)
    assert len({tuple(row.tolist()) for row in expected}) == len(images)
    torch.testing.assert_close(embed_images(parts, images), expected, rtol=0, atol=1e-5)
    # Short texts alone are padded less; a long one is cut.
    for texts in (CAPTIONS, [*CAPTIONS, LONG]):
        with torch.no_grad():
            expected = reference.model.encode_text(reference.tokenizer(texts), normalize=True)
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        torch.testing.assert_close(embed_texts(parts, texts), expected, rtol=0, atol=1e-5)


def test_temperature_towers_and_context_length_are_those_of_open_clip(reference):
    parts = open_clip_parts(str(reference.folder))
    text_fields = json.loads((reference.folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    bias = reference.model.logit_bias
    assert parts.logit_scale == reference.model.logit_scale.item()
    assert parts.logit_bias == (0.0 if bias is None else bias.item())
    names = {(type(parts.vision_model).__name__, type(parts.text_model).__name__)}
    assert names <= set(TOWERS.values())
    assert parts.tokenizer.model_max_length == text_fields["context_length"]
    assert not parts.vision_model.training and not parts.text_model.training


def test_the_end_of_a_text_is_the_tokenizers(vit, tmp_path):
    """The highest id marks it, of which CLIP's vocabulary has the end of a text; another vocabulary has others."""
    parts = open_clip_parts(vit)
    assert parts.text_model.config.eos_token_id == parts.tokenizer.eos_token_id == 49407
    folder = copied(vit, tmp_path, text_cfg={"vocab_size": 49500})
    reweighted(folder, lambda weights: weights.update({EMBEDDING: torch.cat([weights[EMBEDDING]] * 2)[:49500]}))
    other, tokens = open_clip_parts(folder).text_model, torch.tensor([[49406, 320, 49450, 49407]])
    outputs = other(tokens)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 2])  # as open_clip's argmax


@pytest.mark.parametrize("kind", list(KINDS))
def test_saved_parts_are_the_same_when_loaded(kind, tmp_path):
    parts = open_clip_parts(save_model(kind, tmp_path))
    assert (type(parts.vision_model).__name__, type(parts.text_model).__name__) == TOWERS[kind]
    images, texts = real_images()[-2:], [*CAPTIONS, LONG]
    expected = embed_images(parts, images), embed_texts(parts, texts)
    parts.vision_model.save_pretrained(tmp_path / "image")
    parts.text_model.save_pretrained(tmp_path / "text")
    parts.vision_model = AutoModel.from_pretrained(tmp_path / "image")
    parts.text_model = type(parts.text_model).from_pretrained(tmp_path / "text")  # AutoModel has no SigLIP text tower
    GapClosedClipProcessor(parts.image_processor, parts.tokenizer).save_pretrained(tmp_path / "processor")
    parts.image_processor = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    parts.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "processor")
    assert type(parts.image_processor) is GapClosedClipImageProcessor
    assert torch.equal(embed_images(parts, images), expected[0])
    assert torch.equal(embed_texts(parts, texts), expected[1])


def test_pixels_are_those_of_open_clip_at_every_rounding(vit):
    preprocess, processor = load_reference(vit).preprocess, open_clip_parts(vit).image_processor
    noise = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for extra in range(9):  # the crop of 32 cuts 0 to 8 pixels off
        for image in (
            Image.fromarray(noise[:32, : 32 + extra]),
            Image.fromarray(noise[: 32 + extra, :32]).convert("L"),
        ):
            pixels = processor(image, return_tensors="pt").pixel_values[0]
            torch.testing.assert_close(pixels, preprocess(image), rtol=0, atol=1e-6)


def test_an_image_smaller_than_the_crop_is_refused():
    processor = GapClosedClipImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match=r"16 x 16 pixels after resizing.*shortest_edge"):
        processor(torch.zeros(3, 20, 20, dtype=torch.uint8))


ODD_TEXTS = [
    "A  mass\tof\n3\u00a0cm\u2009(\u2192) in the LEFT lung",
    "\u201cground-glass\u201d, O\u2019Brien\u2019s line, \u2018halo\u2019, \u201ereversed\u201c",
    "&lt; 5 mm &amp;amp; &gt; 3 mm, &quot;bat wing&quot;, O&#39;Brien&nbsp;sign, &amp;lt;",
    "\ufb01brosis, re\ufb02ux, e\ufb00usion, co\ufb03n, ba\ufb04e",
    "5 \u00b5m \u03b1-particles 10\u207b\u00b3 x\u00b2 \u00bd \u00b0C \u00b1 \u2265",
    "na\u00efve cafe\u0301 \u00dcber \u0130stanbul \u1e9e \u8089\u5b50 \U0001fac1",
    "don't we'll T1/T2-weighted_image #3 [arrow]! ... --",
    "a\x07b\x1fc \ufeffd\u200be",
    "",
]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_odd_texts_become_the_same_tokens(vit, clean, tmp_path):
    folder = copied(vit, tmp_path, text_cfg={"tokenizer_kwargs": {"clean": clean}})
    theirs, ours = load_reference(folder).tokenizer, open_clip_parts(folder).tokenizer
    for text in ODD_TEXTS:
        expected = theirs(text)[0]
        tokens = ours(text, padding="max_length", return_tensors="pt", truncation=True)
        length = int(expected.argmax()) + 1  # the end of a text has the highest id
        assert tokens.input_ids[0, :length].tolist() == expected[:length].tolist(), text
        assert int(tokens.attention_mask.sum()) == length


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_odd_texts_become_the_same_tokens_of_a_bert(biomed, clean, tmp_path):
    folder = copied(biomed, tmp_path, text_cfg={"tokenizer_kwargs": {"clean": clean}})
    theirs, ours = load_reference(folder).tokenizer, open_clip_parts(folder).tokenizer
    for text in [*ODD_TEXTS, LONG]:
        tokens = ours(text, padding="max_length", truncation=True)
        assert tokens.input_ids == theirs(text)[0].tolist(), text


def test_decoded_texts_have_no_marks_of_the_ends_of_words(vit):
    tokenizer = open_clip_parts(vit).tokenizer
    decoded = tokenizer.decode(tokenizer("Chest x-ray").input_ids, skip_special_tokens=True)
    assert decoded.split() == ["chest", "x", "-", "ray"]


def test_half_precision_and_older_names_are_read(biomed, tmp_path):
    folder = copied(biomed, tmp_path)

    def older(weights):
        for name in list(weights):
            weights[name] = weights[name].half()
        weights["logit_scale"] = weights["logit_scale"].reshape(1)
        weights["text.transformer.embeddings.position_ids"] = torch.arange(48)[None]
        weights["text.transformer.pooler.dense.weight"] = torch.zeros(48, 48)
        weights["text.transformer.pooler.dense.bias"] = torch.zeros(48)

    reweighted(folder, older)
    half, whole = open_clip_parts(folder), open_clip_parts(biomed)
    assert half.text_model.dtype == half.image_projection[0][0].dtype == torch.float32
    difference = embed_texts(half, CAPTIONS) - embed_texts(whole, CAPTIONS)
    assert 0 < difference.abs().max() < 5e-3
    assert half.logit_scale == pytest.approx(whole.logit_scale, abs=2e-3)


@pytest.mark.parametrize("known", [True, False])
def test_a_berts_configuration_out_of_reach(known, tmp_path, monkeypatch):
    """Of a BERT-base it is read off the weights; of others, whose heads may be more or fewer, it is not."""
    folder = save_model("BiomedCLIP", tmp_path, hidden_size=768 if known else 384)
    expected = embed_texts(open_clip_parts(folder), CAPTIONS)
    shutil.rmtree(tmp_path / "bert")
    if known:
        assert torch.equal(embed_texts(open_clip_parts(folder), CAPTIONS), expected)
        reweighted(folder, lambda weights: one_type(weights))  # as in a RoBERTa
    with pytest.raises(OSError, match="text_cfg.hf_model_name: the configuration of .* Put its config.json into a"):
        open_clip_parts(folder)


def one_type(weights) -> None:
    name = "text.transformer.embeddings.token_type_embeddings.weight"
    weights[name] = weights[name][:1].clone()


def test_pickled_weights_are_read_where_they_are_allowed_alone(tmp_path):
    folder = save_model("ViT-B-32", tmp_path, safe=False)
    assert (folder / "open_clip_pytorch_model.bin").is_file() and not (folder / WEIGHTS).exists()
    with pytest.raises(ValueError, match="pickled weights alone .*allow_pickle=true"):
        open_clip_parts(folder)
    parts, reference = open_clip_parts(folder, allow_pickle=True), load_reference(folder)
    with torch.no_grad():
        expected = reference.model.encode_text(reference.tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(embed_texts(parts, CAPTIONS), expected, rtol=0, atol=1e-5)


def test_pickled_code_is_not_run(vit, tmp_path):
    folder = copied(vit, tmp_path, without=("*.safetensors",))
    torch.save({"logit_scale": Touch(tmp_path / "touched")}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="can't be read as weights alone"):
        open_clip_parts(folder, allow_pickle=True)
    assert not (tmp_path / "touched").exists()


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_which_names_are_of_open_clip(vit, tmp_path):
    assert is_open_clip(vit) and is_open_clip(f"local-dir:{vit}")
    assert not is_open_clip(tmp_path) and not is_open_clip("hf-hub:nobody/nothing") and not is_open_clip("a b/c/d")
    assert torch.equal(
        embed_texts(open_clip_parts(f"local-dir:{vit}"), CAPTIONS), embed_texts(open_clip_parts(vit), CAPTIONS)
    )


# What is refused, in one line with the remedy.

REFUSED = [
    ("vit", {"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool is True.*only False"),
    ("vit", {"vision_cfg": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre"),
    ("vit", {"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type is 'avg'"),
    ("vit", {"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value"),
    ("vit", {"vision_cfg": {"layers": [3, 4, 6, 3]}}, "vision_cfg.layers is .*ResNets"),
    ("vit", {"vision_cfg": {"image_size": [32, 64]}}, "resize_mode is 'shortest' for images of 32 x 64"),
    ("vit", {"vision_cfg": {"patch_sise": 8}}, "vision_cfg has an unknown field 'patch_sise'.*patch_size"),
    ("vit", {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "vision_cfg.act_kwargs"),
    ("vit", {"vision_cfg": {"norm_kwargs": {"bias": False}}}, "vision_cfg.norm_kwargs"),
    ("vit", {"text_cfg": {"pool_type": "first"}}, "text_cfg.pool_type is 'first'"),
    ("vit", {"text_cfg": {"pool_type": "eos", "eos_id": 2}}, "text_cfg.pool_type is 'eos'"),
    ("vit", {"text_cfg": {"no_causal_mask": True}}, "text_cfg.no_causal_mask"),
    ("vit", {"text_cfg": {"embed_cls": True}}, "text_cfg.embed_cls"),
    ("vit", {"text_cfg": {"qk_norm": True}}, "text_cfg.qk_norm"),
    ("vit", {"text_cfg": {"tokenizer_kwargs": {"reduction_mask": "random"}}}, "tokenizer_kwargs.reduction_mask"),
    ("vit", {"text_cfg": {"tokenizer_kwargs": {"clean": "none"}}}, "tokenizer_kwargs.clean is 'none'"),
    ("vit", {"preprocess_cfg": {"resize_mode": "longest"}}, "preprocess_cfg.resize_mode is 'longest'.*squash"),
    ("vit", {"preprocess_cfg": {"interpolation": "nearest"}}, "preprocess_cfg.interpolation is 'nearest'"),
    ("vit", {"preprocess_cfg": {"mode": "L"}}, "preprocess_cfg.mode"),
    ("vit", {"multimodal_cfg": {}}, "CoCa"),
    ("vit", {"quick_gello": True}, "model_cfg has an unknown field 'quick_gello'.*quick_gelu"),
    ("vit", {"vision_cfg": {"layers": 3}}, "image tower's weights lack: encoder.layers.2"),
    ("vit", {"text_cfg": {"layers": 1}}, "text tower's weights have besides .*encoder.layers.1"),
    ("vit", {"text_cfg": {"context_length": 32}}, "text tower's weights do not fit its model_cfg.*77"),
    ("biomed", {"vision_cfg": {"timm_pool": "rot_attn"}}, "vision_cfg.timm_pool is 'rot_attn'"),
    ("biomed", {"vision_cfg": {"timm_model_name": "test_vitt"}}, "timm_model_name 'test_vitt'"),
    ("biomed", {"vision_cfg": {"timm_model_name": "test_vit2"}}, "image tower's weights"),
    ("biomed", {"vision_cfg": {"timm_pool": "token", "timm_proj": "none"}}, "vision_cfg.timm_proj is 'none'"),
    ("biomed", {"text_cfg": {"hf_pooler_type": "max_pooler"}}, "hf_pooler_type can't be taken over: 'max_pooler'"),
    ("biomed", {"text_cfg": {"tokenizer_mode": "clips"}}, "text_cfg.tokenizer_mode is 'clips'"),
    ("biomed", {"text_cfg": {"tokenizer_kwargs": {"strip_sep_token": True}}}, "tokenizer_kwargs.strip_sep_token"),
]


@pytest.mark.parametrize("kind, changes, words", REFUSED, ids=[str(row[1]) for row in REFUSED])
def test_what_has_no_counterpart_is_refused(kind, changes, words, request, tmp_path):
    folder = copied(request.getfixturevalue(kind), tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as info:
        open_clip_parts(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "without, words",
    [
        ("open_clip_config.json", "has no open_clip_config.json"),
        (
            "*.safetensors",
            "has no weights: there is neither open_clip_model.safetensors nor open_clip_pytorch.*Download",
        ),
        ("*token*", "holds no tokenizer, and openai/clip-vit-large-patch14 is out of reach.*save_pretrained"),
    ],
)
def test_what_is_missing_is_named(vit, without, words, tmp_path):
    shutil.copytree(vit, tmp_path / "copy", ignore=shutil.ignore_patterns(without))
    with pytest.raises(OSError, match=words) as info:
        open_clip_parts(tmp_path / "copy")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("tower, prefixes", [("image", ("visual.",)), ("text", ("text.", "transformer."))])
def test_a_missing_tower_is_named(vit, tower, prefixes, tmp_path):
    folder = copied(vit, tmp_path)
    weights = load_file(folder / WEIGHTS)
    save_file({name: w for name, w in weights.items() if not name.startswith(prefixes)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"has no weights of the {tower} tower .*download it again"):
        open_clip_parts(folder)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("open_clip_config.json", b"{", "open_clip_config.json is damaged"),
        ("open_clip_config.json", b'{"embed_dim": 8}', "model_cfg lacks embed_dim, text_cfg, vision_cfg"),
        (WEIGHTS, b"no weights", "open_clip_model.safetensors is damaged"),
    ],
)
def test_a_damaged_file_is_named(vit, name, content, words, tmp_path):
    folder = copied(vit, tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as info:
        open_clip_parts(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("visual.ln_pre.weight", "image tower's weights lack: pre_layrnorm.weight"),
        ("ln_final.bias", "text tower's weights lack: final_layer_norm.bias"),
        ("logit_scale", "has no logit_scale among its weights"),
    ],
)
def test_a_missing_weight_is_named(vit, name, words, tmp_path):
    folder = copied(vit, tmp_path)
    reweighted(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=words):
        open_clip_parts(folder)


def test_a_weight_of_unknown_use_is_named(biomed, tmp_path):
    folder = copied(biomed, tmp_path)
    reweighted(folder, lambda weights: weights.update({"gate.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="weights of unknown use: gate.weight"):
        open_clip_parts(folder)


def test_a_hub_id_out_of_reach():
    with pytest.raises(OSError, match="nobody/nothing has no open_clip_config.json, or the Hub is out of reach"):
        open_clip_parts("hf-hub:nobody/nothing")
