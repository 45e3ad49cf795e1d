"""`training.bf16`: what auto stands for, where bfloat16 (or float16) is wanted in vain, and where it is slow."""

import platform

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging

from ..evaluation.precision import cpu_has_bfloat16


logger = logging.get_logger(__name__)

AUTO = "auto"


def cpu_is_faster_in_bfloat16() -> bool:
    """
    Whether the CPU has units for products of matrices in bfloat16: on x86 those of AMX, on Arm what oneDNN asks for.

    Instructions of AVX-512 alone are no gain: with the casts of autocast the step of a decoder took 1.02 s on a core
    that takes 0.60 s in float32, a product by itself two times as long.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_amx_tile_supported()
    return cpu_has_bfloat16()


def choose_bf16(args: TrainingArguments, on_cpu: bool) -> None:
    """
    Makes `bf16` of the arguments true or false where it is "auto", and warns where it is true on a CPU that has no
    instructions for it.

    Args:
        on_cpu: the training is to run on the CPU, whatever else there is.

    Raises:
        ValueError: bfloat16 is wanted, but there is neither a GPU for it nor the CPU asked for; another text.
    """
    has_gpu = is_torch_bf16_gpu_available() or is_torch_xla_available()
    without_gpu = on_cpu or not (torch.accelerator.is_available() or is_torch_xla_available())
    if args.bf16 == AUTO:
        args.bf16 = cpu_is_faster_in_bfloat16() if without_gpu else has_gpu
        args.use_cpu = args.use_cpu or (args.bf16 and without_gpu)  # else transformers asks for a GPU
    if isinstance(args.bf16, str):
        raise ValueError(f"training.bf16 is {args.bf16!r}: use true, false or {AUTO}.")
    for name in ("bf16", "bf16_full_eval"):  # in the words of a configuration; transformers' own are of its Python
        if getattr(args, name) and not (args.use_cpu or has_gpu):
            raise ValueError(
                f"training.{name} is true, so this configuration needs a GPU that computes in bfloat16, and there "
                f"is none here. On a CPU add {name}=false."
            )
    if (args.bf16 or args.bf16_full_eval) and without_gpu and not cpu_has_bfloat16():
        logger.warning_once(
            "Training in bfloat16 on a CPU that has no instructions for it: a step may take tens of times as long as "
            f"in float32. Use bf16=false, or bf16={AUTO}, which is true only where it serves."
        )


def refuse_fp16(args: TrainingArguments, on_cpu: bool) -> None:
    """
    Checks that there is a GPU where `fp16` is true.

    Args:
        on_cpu: as of `choose_bf16`.

    Raises:
        ValueError: none is used.
    """
    if args.fp16 and (on_cpu or not (torch.accelerator.is_available() or is_torch_xla_available())):
        raise ValueError(
            f"training.fp16 is true, which needs a GPU, and none is used here. Set fp16=false; bf16={AUTO} takes "
            "bfloat16 where the CPU has instructions for it."
        )


__all__ = ["choose_bf16", "refuse_fp16"]
