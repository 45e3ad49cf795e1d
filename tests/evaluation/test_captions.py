"""Captions written and found, and their metrics, against naive computations."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import captioner_of
from datasets import IterableDataset
from transformers import EvalPrediction

from gap_closed_clip.data import PairCollator
from gap_closed_clip.evaluation import (
    Captions,
    build_caption_metrics,
    check_references,
    embed_pairs,
    evaluate_captioner,
    evaluate_captions,
    generate_captions,
    load_metric,
    nearest_captions,
    score_captions,
)
from gap_closed_clip.evaluation.captions import measure_texts
from gap_closed_clip.training.encoder import train_tokenizer

from .conftest import synthetic


TEXTS = {"coco_bleu_1", "coco_bleu_4", "sacrebleu_4", "rouge_l", "cider_d", "caption_words", "distinct_captions"}


@pytest.fixture
def captioner(tiny_processor):
    model = captioner_of(tiny_processor.tokenizer)
    model.generation_config.max_new_tokens = 7
    return model


def as_stream(pairs):
    return IterableDataset.from_generator(lambda: iter(list(pairs)))


# --- written


def test_a_caption_for_each_image_in_the_order_of_the_pairs(captioner, tiny_processor, pairs):
    """`pairs` are eight of six images, the first and the second twice."""
    found = generate_captions(captioner, tiny_processor, pairs, batch_size=4)
    assert found.image_ids == [f"image {number}" for number in range(6)]
    texts = pairs["caption"]
    assert found.references == [
        [texts[0], texts[3]],
        [texts[1], texts[7]],
        [texts[2]],
        [texts[4]],
        [texts[5]],
        [texts[6]],
    ]
    for row, caption in zip((0, 1, 2, 4, 5, 6), found.captions, strict=True):
        pixels = PairCollator(tiny_processor)([pairs[row]])["pixel_values"]
        tokens = captioner.generate(pixels)
        assert caption == tiny_processor.decode(tokens[0], skip_special_tokens=True)
    assert len(set(found.captions)) > 3


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_and_streams_make_no_difference(captioner, tiny_processor, pairs, batch_size):
    expected = generate_captions(captioner, tiny_processor, pairs)
    assert generate_captions(captioner, tiny_processor, pairs, batch_size=batch_size) == expected
    assert generate_captions(captioner, tiny_processor, as_stream(pairs), batch_size=batch_size) == expected


def test_one_caption_twice_is_one_reference(captioner, tiny_processor, pairs):
    twice = pairs.select([0, 0, 3, 0])
    found = generate_captions(captioner, tiny_processor, twice)
    assert found.references == [[pairs[0]["caption"], pairs[3]["caption"]]]


def test_modes_are_restored_and_dropout_is_off(captioner, tiny_processor, pairs):
    captioner.train()
    captioner.decoder.base_model.embeddings.eval()
    before = {name: module.training for name, module in captioner.named_modules()}
    first = generate_captions(captioner, tiny_processor, pairs)
    assert {name: module.training for name, module in captioner.named_modules()} == before
    assert generate_captions(captioner, tiny_processor, pairs) == first


def test_settings_of_generate_are_handed_on(captioner, tiny_processor, pairs):
    short = generate_captions(captioner, tiny_processor, pairs, max_new_tokens=1)
    assert {len(caption.split()) for caption in short.captions} == {1}
    beams = generate_captions(captioner, tiny_processor, pairs, num_beams=4)
    pixels = PairCollator(tiny_processor)([pairs[0]])["pixel_values"]
    expected = tiny_processor.batch_decode(captioner.generate(pixels, num_beams=4), skip_special_tokens=True)
    assert beams.captions[:1] == expected and captioner.generation_config.num_beams is None


def test_an_image_has_one_caption_whatever_the_generation_config_returns(
    captioner, tiny_processor, pairs, monkeypatch
):
    """The best of the beams; a folder's generation config may ask for all of them, and for their scores."""
    expected = generate_captions(captioner, tiny_processor, pairs, num_beams=3).captions
    several = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    for name, value in several.items():
        monkeypatch.setattr(captioner.generation_config, name, value)
    assert generate_captions(captioner, tiny_processor, pairs).captions == expected
    assert generate_captions(captioner, tiny_processor, pairs, **several).captions == expected


def test_there_has_to_be_an_image(captioner, tiny_processor, pairs):
    for empty in (pairs.select([]), as_stream(pairs.select([]))):
        with pytest.raises(ValueError, match="no pair to write a caption for"):
            generate_captions(captioner, tiny_processor, empty)


# --- found


@pytest.mark.parametrize("shifted", [False, True])
def test_the_nearest_training_caption(shifted):
    """Against a loop over images and captions."""
    train, test = synthetic(n=50, dim=8, gap=0.5, seed=1), synthetic(n=20, dim=8, gap=0.5, seed=2)
    test.image_ids[3] = test.image_ids[1]  # the image of another pair
    test.image_embeds[3] = test.image_embeds[1]
    train.captions = [f"training caption {k}" for k in range(50)]
    shift = train.text_embeds.mean(0) - train.image_embeds.mean(0) if shifted else None
    kept = test.image_embeds.copy()
    found = nearest_captions(test, train, shift)
    assert found.image_ids == [image_id for row, image_id in enumerate(test.image_ids) if row != 3]
    assert found.references[1] == ["caption 1", "caption 3"] and found.references[3] == ["caption 4"]
    for image_id, caption in zip(found.image_ids, found.captions, strict=True):
        image = test.image_embeds[test.image_ids.index(image_id)] + (0 if shift is None else shift)
        cosines = [image @ text / math.sqrt(image @ image) / math.sqrt(text @ text) for text in train.text_embeds]
        assert caption == train.captions[cosines.index(max(cosines))]
    assert (test.image_embeds == kept).all()  # the shift is not left in them


def test_a_sample_without_a_caption_or_an_image_is_nobodys_nearest():
    """With further modalities samples may lack either: zeros would be nearer than captions that point away."""
    train, test = synthetic(n=20, dim=8, gap=0.5, seed=1), synthetic(n=20, dim=8, gap=0.5, seed=2)
    train.text_embeds = -np.abs(train.text_embeds)
    test.image_embeds = np.abs(test.image_embeds)
    whole = nearest_captions(test, train)

    def with_lacking(pairs, **lacking):
        further = {"record": np.ones((len(pairs), 8), np.float32)}
        present = {name: np.arange(len(pairs)) != row for name, row in lacking.items()}
        pairs = dataclasses.replace(pairs, values={}, further=further, present=present)
        return pairs.with_embeds({})

    row = train.captions.index(whole.captions[0])
    train.captions[row] = ""
    others = np.flatnonzero(np.arange(20) != row)
    found = nearest_captions(with_lacking(test, image=3, text=5), with_lacking(train, text=row))
    expected = nearest_captions(test.select(np.setdiff1d(np.arange(20), (3, 5))), train.select(others))
    assert found.captions == expected.captions and "" not in found.captions
    assert found.image_ids == expected.image_ids and found.references == expected.references


def test_the_shift_makes_a_difference():
    train, test = synthetic(n=50, dim=8, gap=0.5, seed=1), synthetic(n=20, dim=8, gap=0.5, seed=2)
    shift = train.text_embeds.mean(0) - train.image_embeds.mean(0)
    assert nearest_captions(test, train, shift).captions != nearest_captions(test, train).captions


# --- measured


CAPTIONS = Captions(
    ["a", "b", "c"],
    ["a mass in the left breast", "a mass in the left breast", "chest radiograph"],
    [["a mass in the right breast", "mass"], ["a mass in the left breast"], ["normal chest radiograph"]],
)


def test_metrics_of_captions():
    found = evaluate_captions(CAPTIONS)
    assert found.keys() >= TEXTS | {"num_images"} and all(isinstance(value, float) for value in found.values())
    assert found["num_images"] == 3 and found["caption_words"] == pytest.approx((6 + 6 + 2) / 3)
    assert found["distinct_captions"] == pytest.approx(2 / 3)
    for name in ("caption_bleu", "caption_rouge_l", "caption_cider"):
        alone = load_metric(name).compute(predictions=CAPTIONS.captions, references=CAPTIONS.references)
        assert {key: found[key] for key in alone} == alone
    # 13 of 14 words are in the references, and the nearest references have 15 together
    assert found["coco_bleu_1"] == pytest.approx(13 / 14 * math.exp(1 - 15 / 14), abs=1e-6)


def test_an_empty_caption_is_measured():
    found = evaluate_captions(Captions(["a"], [""], [["chest radiograph"]]))
    assert found["caption_words"] == 0 and found["rouge_l"] == 0 and found["cider_d"] == 0


def test_chinese_captions_as_a_bert_writes_them_are_their_references():
    """Spaces around each character are the tokenizer's; what a caption is compared with has none."""
    texts = ["胸部CT增强扫描，见3cm结节。", "腹部CT平扫未见异常。", "头颅MR平扫。"]
    tokenizer = train_tokenizer(texts, 200)
    written = tokenizer.batch_decode(tokenizer(texts).input_ids, skip_special_tokens=True)
    assert written[2] == "头 颅 mr 平 扫 。"
    metrics = measure_texts(written, [[text] for text in texts])
    assert all(metrics[name] == pytest.approx(1) for name in ("coco_bleu_4", "sacrebleu_4", "rouge_l"))
    assert metrics["cider_d"] > 5


def test_metrics_inside_the_trainer(tiny_processor, pairs):
    """One row a pair, padded with -100; an image counts once, by its first row, against all of its captions."""
    texts = ["chest radiograph", "a nodule", "brain", "chest radiograph", "mass", "ct", "ct of the abdomen", "left"]
    tokens = tiny_processor.tokenizer(texts, padding=True)["input_ids"]
    tokens = np.array([[*row, -100, -100] for row in tokens])
    found = build_caption_metrics(pairs, tiny_processor)(EvalPrediction(predictions=tokens, label_ids=tokens))
    caption = pairs["caption"]
    first, second = [caption[0], caption[3]], [caption[1], caption[7]]
    references = [first, second, [caption[2]], [caption[4]], [caption[5]], [caption[6]]]
    texts = [texts[row] for row in (0, 1, 2, 4, 5, 6)]  # rows 3 and 7 show the images of 0 and 1 again
    expected = evaluate_captions(Captions(list("abcdef"), texts, references))
    del expected["num_images"]
    expected |= {"mean_rouge_l": expected["rouge_l"], "mean_cider_d": expected["cider_d"]}  # of the only source
    assert found == expected
    with pytest.raises(ValueError, match="built for 8 pairs but got 5 predictions"):
        build_caption_metrics(pairs, tiny_processor)(EvalPrediction(predictions=tokens[:5], label_ids=tokens[:5]))


def test_clip_scores_against_the_formula(tiny_model, tiny_processor, pairs):
    for module in tiny_model.text_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(8)  # so that texts differ
    tiny_model.train()
    captions = Captions(["image 0", "image 3"], ["a stone", "brain"], [[pairs[0]["caption"], "mass"], ["brain"]])
    images = embed_pairs(tiny_model, tiny_processor, pairs).by_image()
    found = score_captions(tiny_model, tiny_processor, captions, images, batch_size=2)
    assert tiny_model.training
    tiny_model.eval()

    def embed(text):
        with torch.no_grad():
            return tiny_model(**tiny_processor(text=text, return_tensors="pt")).text_embeds[0].double().numpy()

    plain, with_references, cosines = [], [], []
    for image_id, caption, references in zip(captions.image_ids, captions.captions, captions.references, strict=True):
        score = 2.5 * max(images[image_id] @ embed(caption), 0)
        cosines.append(max(embed(caption) @ embed(text) for text in references))
        nearest = max(cosines[-1], 0)
        plain.append(score)
        with_references.append(2 * score * nearest / (score + nearest) if score and nearest else 0)
    assert found["clip_score"] == pytest.approx(np.mean(plain), abs=1e-5)
    assert found["ref_clip_score"] == pytest.approx(np.mean(with_references), abs=1e-5)
    assert found["caption_reference_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert cosines[1] == pytest.approx(1) and cosines[0] < 0.99


def test_evaluation_of_a_captioner(captioner, tiny_processor, pairs):
    found, captions = evaluate_captioner(captioner, tiny_processor, pairs, batch_size=3)
    assert captions == generate_captions(captioner, tiny_processor, pairs)
    encoder = captioner.gap_closed_clip
    images = embed_pairs(encoder, tiny_processor, pairs).by_image()
    expected = evaluate_captions(captions) | score_captions(encoder, tiny_processor, captions, images)
    assert found.keys() == expected.keys() and found == pytest.approx(expected, abs=1e-5)
    unscored, _ = evaluate_captioner(captioner, tiny_processor, pairs, score=False, num_beams=2)
    assert unscored.keys() == evaluate_captions(captions).keys()


def test_an_image_without_a_word_is_named(pairs):
    check_references(pairs, "test")
    captions = [
        "..." if image_id == pairs["image_id"][2] else caption
        for image_id, caption in zip(pairs["image_id"], pairs["caption"], strict=True)
    ]
    wordless = pairs.remove_columns("caption").add_column("caption", captions)
    with pytest.raises(ValueError, match=f"Split 'test': the caption of image '{pairs['image_id'][2]}' is '...'"):
        check_references(wordless, "test")
