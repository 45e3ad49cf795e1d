"""Texts in chunks of similar length against the whole batch padded, which transformers' own tower encodes."""

import pytest
import torch
from conftest import tiny_config

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.model.length_chunks_gap_closed_clip import CHUNK, chunks_by_length


ROWS, LENGTH = 80, 40


def texts(seed: int = 0, longest: int = LENGTH) -> dict[str, torch.Tensor]:
    """Most of them short, padded on the right to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (ROWS,), generator=generator)
    lengths[17] = longest
    attention_mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    input_ids = torch.randint(5, 200, (ROWS, LENGTH), generator=generator) * attention_mask
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": torch.zeros_like(input_ids)}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_and_gradients_are_those_of_the_padded_batch(pooling, monkeypatch):
    config = tiny_config(text_pooling=pooling)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    model = GapClosedClipModel(config).double().train()
    inputs, seen, results = texts(), [], []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].shape), with_kwargs=True
    )
    weights = torch.randn(ROWS, config.text_config.hidden_size, dtype=torch.float64)
    for cuts in (True, False):
        monkeypatch.setattr(model, "_cuts_padding", lambda cuts=cuts: cuts)
        model.zero_grad()
        outputs = model.encode_text(**inputs)
        (outputs.pooler_output * weights).sum().backward()
        hidden = outputs.last_hidden_state * inputs["attention_mask"].unsqueeze(-1)
        results.append([hidden, outputs.pooler_output, *(p.grad.clone() for p in model.text_model.parameters())])
    lengths = inputs["attention_mask"].sum(1).sort().values.tolist()
    expected = [(32, lengths[31]), (32, lengths[63]), (16, LENGTH), (ROWS, LENGTH)]
    assert [tuple(shape) for shape in seen] == expected and lengths[63] < 12
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_only_where_the_tower_trains_and_it_is_worth_it():
    model = GapClosedClipModel(tiny_config()).train()
    assert model._cuts_padding() and not model.eval()._cuts_padding()
    model.train().freeze_towers(text=True)
    assert not model._cuts_padding()  # whose features keep their last bit

    def number(mask: torch.Tensor) -> int:
        return len(chunks_by_length(mask))

    mask = texts()["attention_mask"]
    assert number(mask) == 3
    assert number(mask.flip(1)) == 1  # padded on the left
    assert number(torch.ones(ROWS, LENGTH)) == number(mask[: 2 * CHUNK - 1]) == 1
    rows = torch.cat([part for part, _ in chunks_by_length(mask)])
    assert sorted(rows.tolist()) == list(range(ROWS))
    for part, longest in chunks_by_length(mask):
        assert mask[part].sum(1).max() == longest


def test_more_than_tokens_is_given_for_the_whole_batch():
    model = GapClosedClipModel(tiny_config()).train()
    outputs = model.encode_text(**texts(), output_hidden_states=True)
    assert all(states.shape[:2] == (ROWS, LENGTH) for states in outputs.hidden_states)
