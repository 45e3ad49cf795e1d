"""That ours and the peer write as much with decoders of one shape, and that the report tells it."""

from dataclasses import replace

import caption_speed
import pytest
import torch
from caption_speed import BUILDERS, OURS, PEER, Settings, Writing, demo_towers, measure
from random_towers import PRESETS


SETTINGS = Settings(PRESETS["eva02_nano"], "cpu", tokens=3, precision="float32")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_towers_and_decoders_are_of_one_shape():
    ours, peer = (build(SETTINGS).eval() for build in BUILDERS.values())
    assert count(ours.decoder) == count(peer.decoder)
    assert count(ours.gap_closed_clip.vision_model) == count(peer.encoder)
    images = SETTINGS.images(2)
    patches = peer.encoder(images).last_hidden_state
    memory, _ = ours.encode(images)
    assert memory.shape == (2, patches.shape[1] + 4, patches.shape[2])


@pytest.mark.parametrize("name", BUILDERS)
def test_captions_are_of_one_length(name, monkeypatch):
    """... also where the end token is the likeliest."""
    writing = Writing(name, SETTINGS)
    head = writing.model.decoder.cls.predictions.bias
    end = writing.model.generation_config.eos_token_id
    with torch.no_grad():
        head[end] = 100.0
    for use_cache in (True, False):
        tokens = writing.write(SETTINGS.images(2), use_cache)
        assert tokens.shape == (2, 4) and not (tokens[:, 1:-1] == end).any()
    assert writing.agreement(SETTINGS.images(2)) == 1.0
    monkeypatch.setattr(Writing, "write", lambda self, images, use_cache: torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="other lengths"):
        writing.agreement(SETTINGS.images(2))


def test_captions_that_differ_without_a_cache_are_seen(monkeypatch):
    writing = Writing(PEER, SETTINGS)
    found = {True: torch.zeros(2, 4), False: torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]])}
    monkeypatch.setattr(writing, "write", lambda images, use_cache: found[use_cache])
    assert writing.agreement(SETTINGS.images(2)) == 0.5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows(precision):
    rows = measure(replace(SETTINGS, precision=precision), batches=[1, 2], repeats=2)
    assert [row[:3] for row in rows] == [
        [name, cache, batch] for batch in "12" for name in (OURS, PEER) for cache in ("cache", "no cache")
    ]
    for _, _, batch, rate, milliseconds, relative, _ in rows:
        assert float(rate) == pytest.approx(1000 * int(batch) / float(milliseconds), rel=0.01)
        assert float(relative) > 0
    assert [row[5] for row in rows if row[:2] == [OURS, "cache"]] == ["1.00", "1.00"]
    if precision == "float32":
        assert all(row[-1] == "100%" for row in rows)


def test_the_report(monkeypatch, tmp_path, capsys):
    words = ["--device=cpu", "--tokens=2", "--batches=1", "--repeats=1", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["caption_speed.py", *words])
    assert caption_speed.main() == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("caption_speed_cpu-") and path.name.endswith("-cores.md")
    report = path.read_text()
    assert report.strip() == capsys.readouterr().out.strip()
    assert "embed_dim=192" in report and "2 new tokens" in report and report.count("\n| ours ") == 2
    assert demo_towers().text["hidden_size"] == 192
