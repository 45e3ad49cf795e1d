"""The cases of the fine-tuning benchmark, and its search for the largest batch."""

import math

import pytest
from finetuning_memory import METHODS, VARIANTS, FineTuning, count, largest_batches
from random_towers import Settings, preset_of


SETTINGS = Settings("eva02_nano", "cpu", 4, 4, "float32", gradient_checkpointing=False)
SHARED = ("visual_projection", "text_projection", "temperature")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says(name):
    training = FineTuning(METHODS[name], SETTINGS, "plain")
    training.start()
    training.step()
    trained = {n for n, p in training.model.named_parameters() if p.requires_grad}
    assert {n for n, p in training.model.named_parameters() if p.grad is not None} == trained
    towers = {n for n in trained if not any(part in n for part in SHARED)}
    if name == "full":
        assert trained == {n for n, _ in training.model.named_parameters()}
    elif METHODS[name].adapters is None:
        assert not towers
    else:
        assert all("lora_" in n for n in towers)
        assert {t for t in ("vision", "text") if any(f"{t}_model" in n for n in towers)} == set(METHODS[name].adapters)
    assert ("pooled_text" in training.batch) == METHODS[name].pooled_text


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_takes_a_step(variant):
    training = FineTuning(METHODS["LoRA"], SETTINGS, variant)
    training.start()
    assert min(training.step()) >= 0
    assert (training.num_parts > 1) == (variant in ("micro-batches", "all three"))
    assert training.settings.gradient_checkpointing == (variant in ("checkpointing", "all three"))
    assert (training.settings.precision == "bfloat16") == (variant in ("bfloat16", "all three"))


def test_count_is_that_of_the_model_that_is_trained():
    for name in ("LoRA", "projections"):
        model = FineTuning(METHODS[name], SETTINGS, "plain").model
        trained, num_parameters, weights = count(METHODS[name], SETTINGS)
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert weights >= 4 * sum(p.numel() for p in model.parameters())
        assert num_parameters == count(METHODS["full"], SETTINGS)[0]


def test_towers_by_name():
    towers = preset_of("eva02_base_patch16_clip_224+minilm")
    assert (towers.architecture, towers.image_size, towers.length) == ("eva02_base_patch16_clip_224", 224, 64)


def test_the_largest_batches():
    measured = []

    def memory_of(batch: int) -> float:
        measured.append(batch)
        return 100 + 10 * batch if batch <= 300 else math.inf  # the device ends there

    found = largest_batches(memory_of, [90, 200, 1000, 10_000], smallest=8, largest=4096)
    assert found[:2] == [0, 8]
    assert 84 <= found[2] <= 90 and 280 <= found[3] <= 300
    assert len(measured) == len(set(measured)) < 20
    assert largest_batches(lambda batch: batch, [1e9], smallest=8, largest=100) == [100]
    assert largest_batches(lambda batch: batch, [70], smallest=8, largest=75) == [64]
