"""What trains inside the towers: all, nothing or the last blocks, whether batch statistics move, and at which rate."""

import re
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer

from ..model.encoding_gap_closed_clip import GapClosedClipTowers
from ..model.towers_gap_closed_clip import batch_norms
from .arguments import ModelArguments


def release_towers(model: GapClosedClipTowers, args: ModelArguments) -> None:
    """
    Switches the gradients of both towers on or off, as the `model:` section says. What is not trained stays as it is:
    a whole tower, and any BatchNorm, in eval mode.

    Args:
        model: changed in place.
        args: `freeze_vision`, `freeze_text`, `train_vision_blocks`, `train_text_blocks`, `freeze_batch_norm`; the
            last one is of published towers and checkpoints alone, since statistics that never were can't be kept.

    Raises:
        ValueError: more blocks than the tower has, or a tower whose blocks are not known.
    """
    model.vision_model.requires_grad_(not args.freeze_vision)
    model.text_model.requires_grad_(not args.freeze_text)
    if args.train_vision_blocks is not None:
        _train_last("train_vision_blocks", args.train_vision_blocks, image_blocks(model.vision_model.timm_model))
    if args.train_text_blocks is not None:
        _train_last("train_text_blocks", args.train_text_blocks, text_blocks(model.text_model))
    if args.freeze_batch_norm and (args.checkpoint is not None or isinstance(args.vision, str)):
        for layer in batch_norms(model.vision_model):
            layer.requires_grad_(False)
    model.train(model.training)


def image_blocks(timm_model: Any) -> list[list[nn.Parameter]]:
    """
    The parameters of each block, by timm's own groups from the input to the output. What comes before the first block
    is left out (stem, patch and position embeddings); what comes after the last one, a norm or a last convolution,
    belongs to it.

    Raises:
        ValueError: timm knows no groups of this model.
    """
    try:
        matcher = timm_model.group_matcher(coarse=False)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"model.train_vision_blocks: timm knows no blocks of {type(timm_model).__name__}.") from error
    blocks: list[list[str]] = []
    for names in group_parameters(timm_model, matcher).values():
        if _in_blocks(names, matcher):
            blocks.append(list(names))
        elif blocks:
            blocks[-1].extend(names)
    parameters = dict(timm_model.named_parameters())
    return [[parameters[name] for name in names] for names in blocks]


def text_blocks(text_model: nn.Module) -> list[list[nn.Parameter]]:
    """
    The parameters of each layer of a BERT; those of the pooler, where it is used, belong to the last one.

    Raises:
        ValueError: a tower without `encoder.layer`.
    """
    layers = getattr(getattr(text_model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"model.train_text_blocks: {type(text_model).__name__} has no encoder.layer, as towers of the BERT family "
            "do. Train it as a whole, or by adapters (section lora)."
        )
    blocks = [list(layer.parameters()) for layer in layers]
    pooler = getattr(text_model, "pooler", None)
    blocks[-1].extend([] if pooler is None else pooler.parameters())
    return blocks


def set_tower_learning_rate(optimizer: Optimizer, model: nn.Module, learning_rate: float) -> None:
    """
    Gives what trains inside the towers a learning rate of its own, in parameter groups of their own; all else of their
    groups stays, weight decay for one. A scheduler that is made afterwards scales both rates.

    Args:
        optimizer: of all parameters of `model`, before its first step.
        model: an encoder, or a captioner around one.

    Raises:
        ValueError: nothing trains in the towers.
    """
    inside = {id(p) for name, p in model.named_parameters() if {"vision_model", "text_model"} & set(name.split("."))}
    found = False
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in inside]
        others = [parameter for parameter in group["params"] if id(parameter) not in inside]
        found = found or bool(own)
        if own and others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        elif own:
            group["lr"] = learning_rate
    if not found:
        raise ValueError(
            f"training.tower_learning_rate is {learning_rate}, and no weight of a tower is trained: leave it out, or "
            "release a tower (model.freeze_vision=false). (FSDP has to keep the parameters' own names.)"
        )


def _in_blocks(names: list[str], matcher: Any) -> bool:
    """Whether a group of parameters is a block of timm's matcher, and not what comes before or after the blocks."""
    if not isinstance(matcher, dict):
        return True
    patterns = matcher.get("blocks") or []
    patterns = [patterns] if isinstance(patterns, str) else [pattern for pattern, _ in patterns]
    return any(re.match(pattern, name) for pattern in patterns for name in names)


def _train_last(field: str, number: int, blocks: list[list[nn.Parameter]]) -> None:
    if number > len(blocks):
        raise ValueError(f"model.{field} is {number}, and the tower has {len(blocks)} blocks: use 1 to as many.")
    for block in blocks[-number:]:
        for parameter in block:
            parameter.requires_grad_(True)


__all__ = ["image_blocks", "release_towers", "set_tower_learning_rate", "text_blocks"]
