"""bf16: auto, by what trains; where it is wanted in vain, and where it is slow."""

import logging

import pytest
import torch
from transformers.utils.logging import warning_once

from gap_closed_clip.training import load_config, precision


@pytest.fixture
def machine(monkeypatch):
    """Sets what a machine has: a GPU, and instructions for bfloat16 in it and in the CPU, there with AMX."""

    def machine(gpu: bool = False, gpu_bf16: bool = False, cpu_bf16: bool = False, amx: bool | None = None) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: gpu_bf16)
        monkeypatch.setattr(precision, "is_torch_xla_available", lambda: False)
        monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: cpu_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: cpu_bf16 if amx is None else amx)
        monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return machine


class Arguments:
    def __init__(self, bf16: bool | str, use_cpu: bool = False, bf16_full_eval: bool = False):
        self.bf16, self.use_cpu, self.bf16_full_eval = bf16, use_cpu, bf16_full_eval


def chosen(bf16: bool | str, use_cpu: bool = False) -> tuple[bool | str, bool]:
    args = Arguments(bf16, use_cpu)
    precision.choose_bf16(args, on_cpu=use_cpu)
    return args.bf16, args.use_cpu


@pytest.mark.parametrize(
    ("has", "use_cpu", "expected"),
    [
        ({"gpu": True, "gpu_bf16": True, "cpu_bf16": False}, False, (True, False)),
        ({"gpu": True, "gpu_bf16": False, "cpu_bf16": True}, False, (False, False)),  # the GPU trains, in float32
        ({"gpu": True, "gpu_bf16": True, "cpu_bf16": False}, True, (False, True)),
        ({"gpu": True, "gpu_bf16": False, "cpu_bf16": True}, True, (True, True)),
        ({"cpu_bf16": True}, False, (True, True)),  # transformers wants the CPU by name
        ({"cpu_bf16": False}, False, (False, False)),
        ({"cpu_bf16": False}, True, (False, True)),
        ({"cpu_bf16": True, "amx": False}, False, (False, False)),  # AVX-512 alone is slower than float32
        ({"cpu_bf16": True, "amx": False}, True, (False, True)),
    ],
)
def test_auto_is_true_where_what_trains_is_faster(machine, caplog, has, use_cpu, expected):
    machine(**has)
    assert chosen("auto", use_cpu) == expected
    assert not caplog.records


@pytest.mark.parametrize("cpu_bf16", [True, False])
def test_auto_on_arm_is_what_the_cpu_has(machine, monkeypatch, cpu_bf16):
    machine(cpu_bf16=cpu_bf16, amx=False)
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    assert chosen("auto") == (cpu_bf16, cpu_bf16)


@pytest.mark.parametrize("cpu_bf16", [True, False])
def test_auto_in_a_configuration(machine, tmp_path, cpu_bf16):
    machine(cpu_bf16=cpu_bf16)
    config = load_config([], ["bf16=auto", f"output_dir={tmp_path}", "report_to=none"])
    args = config.training_arguments()
    assert args.bf16 is cpu_bf16 and args.mixed_precision == ("bf16" if cpu_bf16 else "no")
    assert config.to_dict()["training"]["bf16"] == "auto"  # what is written beside the model serves other machines


def test_a_cpu_without_instructions_is_warned_of_once(machine, caplog):
    warning_once.cache_clear()  # another test may have been warned of the same
    for cpu_bf16 in (True, False, False):
        machine(cpu_bf16=cpu_bf16)
        with caplog.at_level(logging.WARNING):
            assert chosen(True, use_cpu=True) == (True, True)
        assert len(caplog.records) == (0 if cpu_bf16 else 1)
        assert ("tens of times as long as in float32. Use bf16=false, or bf16=auto" in caplog.text) is not cpu_bf16


def test_bf16_needs_a_gpu_or_the_cpu_by_name(machine):
    machine(cpu_bf16=True)
    with pytest.raises(ValueError, match=r"training\.bf16 is true, .* a GPU .*On a CPU add bf16=false\."):
        chosen(True)
    with pytest.raises(ValueError, match=r"training\.bf16_full_eval is true, .* a GPU "):
        precision.choose_bf16(Arguments(False, bf16_full_eval=True), on_cpu=False)
    assert chosen(True, use_cpu=True) == (True, True)


def test_another_text(machine):
    machine()
    with pytest.raises(ValueError, match=r"training\.bf16 is 'atuo': use true, false or auto\."):
        chosen("atuo")
