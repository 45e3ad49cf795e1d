"""Captions are learned by heart, from images and from text; what the Trainer generates is what the model writes."""

import copy
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from captioners import caption_config, train_encoder, train_pairs
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.utils import logging as transformers_logging

from gap_closed_clip.checkpoint import load_captioner
from gap_closed_clip.data import CaptionCollator, PairCollator, load_pairs
from gap_closed_clip.evaluation import build_caption_metrics, generate_captions
from gap_closed_clip.training import CaptioningArguments, GapClosedCaptionTrainer, GapClosedTrainingArguments, train
from gap_closed_clip.training.arguments import ModelArguments
from gap_closed_clip.training.captioning import build_captioner


BY_HEART = ["phantom_train_pairs=8", "augment=false", "label_smoothing=0", "learning_rate=4e-3", "num_beams=1"]
BY_HEART += ["eval_strategy=no", "save_strategy=no", "warmup_steps=10", "logging_steps=20"]
BY_HEART += ["max_caption_tokens=90", "max_new_tokens=89"]  # none is cut


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return train_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def captioner(encoder):
    """A new captioner of two beams, and its processor."""
    torch.manual_seed(0)
    args = CaptioningArguments(max_new_tokens=12, num_beams=2)
    return build_captioner(args, ModelArguments(checkpoint=str(encoder)), None)


# --- it learns


def test_eight_captions_are_learned_by_heart_from_images(encoder, tmp_path):
    config = caption_config(encoder, tmp_path / "run", *BY_HEART, "max_steps=100", "final_split=train")
    result = train(config)
    pairs = train_pairs(config)
    expected = dict(zip(pairs["image_id"], [caption.lower() for caption in pairs["caption"]], strict=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "captions.jsonl").read_text().splitlines()]
    assert len(expected) == 8 and len(set(expected.values())) > 5
    assert {row["image_id"]: row["captions"]["run"] for row in rows} == expected
    assert result.metrics["coco_bleu_4"] == pytest.approx(1) and result.metrics["rouge_l"] == pytest.approx(1)


def test_a_decoder_of_text_writes_captions_from_their_own_embeddings(encoder, tmp_path):
    words = ["train_on=text", "noise=0.3", "max_steps=120", "final_split=none"]
    config = caption_config(encoder, tmp_path / "run", *BY_HEART, *words)
    train(config)
    model, processor = load_captioner(tmp_path / "run")
    captions = sorted(set(train_pairs(config)["caption"]))
    with torch.no_grad():
        embeds = model.gap_closed_clip(**PairCollator(processor).tokenize(captions)).text_embeds
    written = processor.batch_decode(model.generate(shared_embeds=embeds), skip_special_tokens=True)
    assert written == [caption.lower() for caption in captions] and len(captions) > 5
    # ... and not from anything else
    other = processor.batch_decode(model.generate(shared_embeds=embeds.roll(1, 0)), skip_special_tokens=True)
    assert other == [*written[-1:], *written[:-1]]


# --- what the Trainer generates


@pytest.fixture
def said(caplog):
    """Warnings, of Python and of transformers."""
    transformers_logging.enable_propagation()
    with warnings.catch_warnings(record=True) as found, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in found] + caplog.messages
    transformers_logging.disable_propagation()


def make_trainer(captioner, encoder, tmp_path, pairs, compute_metrics):
    model, processor = captioner
    args = GapClosedTrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2,
        per_device_train_batch_size=8, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1,
        predict_with_generate=True, save_strategy="no",
    )  # fmt: skip
    return GapClosedCaptionTrainer(
        model=model, args=args, train_dataset=train_pairs(caption_config(encoder, tmp_path / "run")),
        eval_dataset=pairs, data_collator=CaptionCollator(PairCollator(processor)), processing_class=processor,
        compute_metrics=compute_metrics,
    )  # fmt: skip


def test_evaluation_in_training_sees_the_captions_that_the_model_writes(captioner, encoder, tmp_path, said):
    model, processor = captioner
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(8)  # so that images get captions of their own before it is trained
    pairs = load_pairs(caption_config(encoder, tmp_path / "run").data, "validation")
    before = copy.deepcopy(model.generation_config)
    seen, written = [], []
    metrics = build_caption_metrics(pairs, processor)

    def compute_metrics(prediction):
        tokens = np.where(prediction.predictions < 0, processor.tokenizer.pad_token_id, prediction.predictions)
        seen.append(processor.batch_decode(tokens, skip_special_tokens=True))
        captions = generate_captions(model, processor, pairs, batch_size=3)
        by_image = dict(zip(captions.image_ids, captions.captions, strict=True))
        written.append([by_image[image_id] for image_id in pairs["image_id"]])
        return metrics(prediction)

    trainer = make_trainer(captioner, encoder, tmp_path, pairs, compute_metrics)
    trainer.train()
    assert len(seen) == 2 and seen == written and seen[0] != seen[1] and len(set(seen[0])) > 4
    assert model.generation_config == before and before.num_beams == 2 and before.max_length is None
    assert trainer.state.log_history[1]["eval_distinct_captions"] == len(set(seen[0])) / 10
    model.save_pretrained(tmp_path / "saved")
    assert "max_length" not in json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert [message for message in said() if "max_length" in message or "max_new_tokens" in message] == []


def test_a_pair_has_one_caption_whatever_the_generation_config_returns(captioner, encoder, tmp_path):
    model, processor = captioner
    pairs = load_pairs(caption_config(encoder, tmp_path / "run").data, "validation")
    trainer = make_trainer(captioner, encoder, tmp_path, pairs, build_caption_metrics(pairs, processor))
    expected = trainer.evaluate()
    model.generation_config.update(num_return_sequences=2, return_dict_in_generate=True)
    found = trainer.evaluate()
    assert all(found[name] == expected[name] for name in ("eval_coco_bleu_1", "eval_cider_d", "eval_caption_words"))
    assert model.generation_config.num_return_sequences == 2


def test_the_loss_of_evaluation_is_that_of_the_images(captioner, encoder, tmp_path):
    """Unsmoothed, and the last, smaller batch counts."""
    model, processor = captioner
    pairs = load_pairs(caption_config(encoder, tmp_path / "run").data, "validation")
    trainer = make_trainer(captioner, encoder, tmp_path, pairs, None)
    found = trainer.evaluate()["eval_loss"]
    model.eval()
    losses = []
    for start in range(0, len(pairs), 4):
        rows = [pairs[row] for row in range(start, min(start + 4, len(pairs)))]
        batch = PairCollator(processor)(rows)
        with torch.no_grad():
            logits = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        mask = batch["attention_mask"][:, 1:].bool()
        losses.append((-picked[mask].mean().item(), len(rows)))
    assert [n for _, n in losses] == [4, 4, 2]
    values, weights = zip(*losses, strict=True)
    assert found == pytest.approx(np.average(values, weights=weights), abs=1e-5)


def test_training_makes_no_logits_unless_somebody_asks_for_them(captioner, encoder, tmp_path):
    model, processor = captioner
    config = caption_config(encoder, tmp_path / "run")
    pairs = train_pairs(config)
    trainer = make_trainer(captioner, encoder, tmp_path, pairs, None)
    inputs = CaptionCollator(PairCollator(processor))([pairs[row] for row in range(4)])
    model.eval()  # without dropout and smoothing
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits is None))
    loss = trainer.compute_loss(model, dict(inputs))
    same, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    handle.remove()
    assert seen == [True, False] and outputs["logits"].shape[:2] == inputs["labels"].shape
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=0)


def test_plain_transformers_trains_it_as_well(captioner, encoder, tmp_path):
    model, processor = captioner
    config = caption_config(encoder, tmp_path / "run")
    pairs = train_pairs(config)
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "plain"), remove_unused_columns=False, per_device_train_batch_size=8, max_steps=9, use_cpu=True,
        learning_rate=2e-3, report_to="none", disable_tqdm=True, logging_steps=3, predict_with_generate=True,
        save_steps=9,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=pairs, eval_dataset=pairs.select(range(5)), processing_class=processor,
        data_collator=CaptionCollator(PairCollator(processor, config.data.augmentation(), 48)),
        compute_metrics=build_caption_metrics(pairs.select(range(5)), processor),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0] - 0.1
    assert trainer.evaluate()["eval_caption_words"] >= 0
    load_captioner(Path(args.output_dir) / "checkpoint-9")
