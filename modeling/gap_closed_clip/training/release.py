"""What trains inside the towers: all, nothing or the last blocks, whether batch statistics move, and at which rate."""

import re
from collections.abc import Collection
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..model.encoding_gap_closed_clip import GapClosedClipTowers
from ..model.tower_kinds_gap_closed_clip import is_timm
from ..model.towers_gap_closed_clip import batch_norms
from .arguments import ModelArguments


def release_towers(model: GapClosedClipTowers, args: ModelArguments, modalities: Collection[str] = ()) -> None:
    """
    Switches the gradients of the towers on or off, as the `model:` section says. What is not trained stays as it is:
    a whole tower, and any BatchNorm, in eval mode. A further modality that the data lack stays as a whole.

    Args:
        model: changed in place.
        args: `freeze_vision`, `freeze_text`, `freeze_modalities`, `train_vision_blocks`, `train_text_blocks`,
            `freeze_batch_norm`; the last one is of published towers and checkpoints alone, since statistics that never
            were can't be kept.
        modalities: those beyond image and text that the training pairs have.

    Raises:
        ValueError: more blocks than the tower has, or a tower whose blocks are not known.
    """
    model.vision_model.requires_grad_(not args.freeze_vision)
    model.text_model.requires_grad_(not args.freeze_text)
    if args.train_vision_blocks is not None:
        _train_last("train_vision_blocks", args.train_vision_blocks, image_blocks(model.vision_model))
    if args.train_text_blocks is not None:
        _train_last("train_text_blocks", args.train_text_blocks, text_blocks(model.text_model))
    if args.freeze_batch_norm and (args.checkpoint is not None or isinstance(args.vision, str)):
        for layer in batch_norms(model.vision_model):
            layer.requires_grad_(False)
    _release_modalities(model, args, modalities)
    model.train(model.training)


def _release_modalities(model: GapClosedClipTowers, args: ModelArguments, modalities: Collection[str]) -> None:
    for name in model.config.modalities or {}:
        model.modality_towers[name].requires_grad_(name in modalities)
        tower = model.parts(name).tower
        if name in args.freeze_modalities:
            tower.requires_grad_(False)
        described = (args.modalities or {}).get(name)
        if args.freeze_batch_norm and (described is None or isinstance(described.get("tower"), str)):
            for layer in batch_norms(tower):
                layer.requires_grad_(False)


def image_blocks(vision_model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """
    The parameters of each block: by timm's own groups from the input to the output, or of transformers' layers. What
    comes before the first block is left out (stem, patch and position embeddings); what comes after the last one, a
    norm, a last convolution or a pooler, belongs to it.

    Raises:
        ValueError: timm knows no groups of this model, or it has no list of layers.
    """
    if not is_timm(vision_model):
        return _blocks_of_layers("train_vision_blocks", vision_model)
    timm_model: Any = vision_model.timm_model
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


def text_blocks(text_model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """
    The parameters of each layer; those behind the last one, a norm or a pooler where it is used, belong to it, and
    those of relative positions, which all layers read, to none.

    Raises:
        ValueError: a tower without a list of layers.
    """
    return _blocks_of_layers("train_text_blocks", text_model)


def set_tower_learning_rate(
    optimizer: Optimizer, model: nn.Module, learning_rate: float, modalities: Collection[str] = ()
) -> None:
    """
    Gives what trains inside the towers a learning rate of its own, in parameter groups of their own; all else of their
    groups stays, weight decay for one. A scheduler that is made afterwards scales both rates.

    Args:
        optimizer: of all parameters of `model`, before its first step.
        model: an encoder, or a captioner around one.
        modalities: further ones whose towers have trained weights, too. (What starts at random, a record's for one,
            trains at the rate of the projections.)

    Raises:
        ValueError: nothing trains in the towers.
    """
    towers = ["vision_model", "text_model", *(f"modality_towers.{name}.tower" for name in modalities)]
    inside = {id(p) for name, p in model.named_parameters() if any(f".{tower}." in f".{name}" for tower in towers)}
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


def _blocks_of_layers(field: str, tower: PreTrainedModel) -> list[list[nn.Parameter]]:
    """The parameters of each layer of a transformers model, which keeps them in `layer`, `layers` or `stages`."""
    found = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layer", "layers", "stages")
    ]
    if not found:
        raise ValueError(
            f"model.{field}: {type(tower).__name__} has no list of layers. Train it as a whole, or by adapters "
            "(section lora)."
        )
    name, layers = min(found, key=lambda item: item[0].count("."))  # the outermost
    blocks = [list(layer.parameters()) for layer in layers]
    names = [other for other, _ in tower.named_parameters()]
    last = max(place for place, other in enumerate(names) if other.startswith(f"{name}."))
    behind, parent = names[last + 1 :], name.rpartition(".")[0]
    beside = [other for other in behind if parent and other.startswith(f"{parent}.")]
    # MPNet and DeBERTa keep beside the layers what all of them read: relative positions, and what belongs to these.
    shared = beside if any(other.startswith(f"{parent}.rel") for other in beside) else []
    blocks[-1] += [tower.get_parameter(other) for other in behind if other not in shared]
    return blocks


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
