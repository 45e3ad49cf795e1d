"""A few bad inputs of each area, the same in every run; `python tests/fuzz/run.py` tries as many as one likes."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from .areas import AREAS
from .base import Base
from .oracle import judge, run_case


pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(),
    reason="every case runs in a fork of the process, which CUDA does not allow (CUDA_VISIBLE_DEVICES= hides a GPU)",
)
EXAMPLES = {"settings": 8, "words": 8, "yaml": 6, "folder": 4, "tables": 3, "records": 4, "images": 3, "requests": 10}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return Base.make(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", AREAS)
def test_bad_inputs_are_refused_in_a_line_or_taken(name, base, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    area = AREAS[name]

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(area.inputs(base))
    def run(value) -> None:
        folder = tmp_path_factory.mktemp("case")
        command, words = area.prepare(value, folder, base)
        outcome = run_case(command, words, folder, area.named, area.main)
        assert outcome.good, f"{outcome.kind}: {outcome.message}"

    run()


NAMED = (
    ("training:\n  learning_rate: .nan\n", "training.learning_rate is nan: use a finite number, 0 or more."),
    ("data:\n  source: x\n  source: y\n", "broken.yaml is not valid YAML: the key 'source' is there twice"),
    ("a: &a [1,1]\nb: &b [*a,*a]\nmodel: &c {x: *c}\n", "broken.yaml is not valid YAML: it stands for more than"),
    ("data: {window_center: .nan, window_width: 3}\n", "data.window_center and data.window_width are (nan, 3): use"),
    ("model: {text: {num_hidden_layers: 1000000}}\n", "model.text.num_hidden_layers is 1000000: use a number of"),
    (
        "model: {vision: {architecture: resnet18, model_args: {in_chans: 1}}}\n",
        "model.vision.model_args.in_chans is 1: images have 3 channels here",
    ),
    (
        "model: {vision: {architecture: resnet18, model_args: {checkpoint_path: weights.pth}}}\n",
        "model.vision.model_args.checkpoint_path is 'weights.pth': leave it out.",
    ),
)


@pytest.mark.parametrize(("text", "message"), NAMED)
def test_the_message_names_the_field(text, message, base, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text(text, encoding="utf-8")
    code, _, err = command("train", str(base.config), "broken.yaml")
    assert code == 1 and err.startswith(f"gap-closed-clip train: {message}")


def test_a_file_in_another_encoding_is_named_with_its_line(base, command, tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("data:\n  source: B\u00e4ume\n".encode("latin-1"))
    code, _, err = command("train", str(base.config), str(path))
    assert code == 1
    assert err == f"gap-closed-clip train: {path} is not in UTF-8 (line 2): save it in that encoding.\n"


def test_the_oracle_sees_what_must_not_be():
    said = "gap-closed-clip train: data.source is wrong.\n"
    assert judge("train", 1, said, 1.0, 500, "data").kind == "refused"
    assert judge("train", 0, "", 1.0, 500, "data").kind == "accepted"
    assert judge("train", 1, "gap-closed-clip train: it is wrong.\n", 1.0, 500, r"data\.").kind == "unnamed"
    assert judge("train", 1, "", 1.0, 500, "").kind == judge("train", 1, said[:22], 1.0, 500, "").kind == "silence"
    assert judge("train", 97, "Traceback (most recent call last):\n", 1.0, 500, "").kind == "traceback"
    assert judge("train", -signal.SIGSEGV, "", 1.0, 500, "").kind == "traceback"
    assert judge("train", -signal.SIGKILL, "", 1.0, 500, "").kind == judge("train", 0, "", 11.0, 5, "").kind == "slow"
    assert judge("train", 0, "", 1.0, 2049, "").kind == judge("train", 1, "MemoryError", 1.0, 5, "").kind == "memory"
    assert judge("train", 0, "", 1.0, 3400, "", before=2000).kind == "accepted"
    assert judge("train", 0, "", 1.0, 3401, "", before=2000).kind == "memory"
    assert judge("train", 1, said + "x\n" * 9, 1.0, 500, "data").kind == "verbose"
