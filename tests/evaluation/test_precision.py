"""What is computed in where bfloat16 is asked for, and whether the CPU has it."""

import logging

import pytest
import torch
from transformers.utils.logging import warning_once

from gap_closed_clip.evaluation import precision
from gap_closed_clip.evaluation.precision import autocast_dtype, cpu_has_bfloat16


@pytest.mark.parametrize("cpu_bf16", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_cpu_without_instructions_is_warned_of(monkeypatch, caplog, device, cpu_bf16):
    warning_once.cache_clear()
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: cpu_bf16)
    with caplog.at_level(logging.WARNING):
        assert autocast_dtype(False, device) is None
        assert not caplog.records
        assert autocast_dtype(True, torch.device(device)) is torch.bfloat16
    is_slow = device == "cpu" and not cpu_bf16
    assert ("tens of times as long as with bf16=false" in caplog.text) is is_slow


def test_the_cpu_is_asked():
    """Where torch says what the CPU has, this agrees: each instruction set implies the answer of oneDNN."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if found.get("avx512_bf16") or found.get("amx_bf16"):
        assert cpu_has_bfloat16()
    elif found.get("architecture") == "x86_64" and not found.get("avx512_bw") and not found.get("avx_ne_convert"):
        assert not cpu_has_bfloat16()
    else:
        pytest.skip("Torch does not say what this CPU has, or it is neither of the clear cases.")
