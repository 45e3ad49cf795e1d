"""Checks of what a configuration says, before anything is built of it: types, weights of the objective, towers."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from transformers import AutoConfig, PreTrainedConfig

from .record_tower_gap_closed_clip import GapClosedClipRecordConfig


# A constant, or points [fraction of training, value] in rising order, linear between them and constant outside.
Weight = float | list[list[float]]

# The weights of the objective's terms, and what its contrastive term may be.
WEIGHTS = (
    "contrastive_weight",
    "align_weight",
    "uniformity_weight",
    "modality_uniformity_weight",
    "cross_uniformity_weight",
)
CONTRASTIVE_LOSSES = ("softmax", "sigmoid")
LARGEST_WEIGHT = 1e4  # of a term of the objective: beyond it, float32 has no digits left for the others
MOST_LAYERS = 1000
LARGEST_SIZE = 2**24  # of a vocabulary, an input, a layer
LARGEST_DIM = 2**16  # of an embedding, and of the layer before it
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "depth", "layers", "depths")
SIZES = ("size", "dim", "dims", "heads", "features", "channels", "width", "vocab", "positions", "embeddings", "length")
# Of timm's arguments those that load weights, or change what a tower takes and gives.
NO_MODEL_ARGS = (
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "features_only",
)


def check_objective(config: PreTrainedConfig) -> None:
    """
    Checks what a configuration says of the objective.

    Raises:
        ValueError: a weight or the contrastive loss is none; names the field and what it takes.
    """
    if config.contrastive_loss not in CONTRASTIVE_LOSSES:
        raise ValueError(
            f"contrastive_loss is {config.contrastive_loss!r}: use one of {', '.join(CONTRASTIVE_LOSSES)}."
        )
    for name in WEIGHTS:
        check_weight(name, getattr(config, name))


def check_weight(name: str, weight: Weight) -> None:
    remedy = (
        f"{name} is {weight!r}: use a number of 0 or more, or points [fraction of training, value] like "
        "[[0.2, 1.0], [0.7, 0.0]]; fractions lie between 0 and 1 and rise strictly, values are from 0 to "
        f"{LARGEST_WEIGHT:g}."
    )
    if isinstance(weight, int | float) and not isinstance(weight, bool):
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise ValueError(remedy)
        return
    if not isinstance(weight, list | tuple) or not weight:
        raise ValueError(remedy)
    for point in weight:
        if (
            not isinstance(point, list | tuple)
            or len(point) != 2
            or not all(isinstance(x, int | float) for x in point)
        ):
            raise ValueError(remedy)
        if not 0 <= point[0] <= 1 or not 0 <= point[1] <= LARGEST_WEIGHT:
            raise ValueError(remedy)
    fractions = [point[0] for point in weight]
    if any(a >= b for a, b in zip(fractions, fractions[1:], strict=False)):
        raise ValueError(remedy)


def tower_config(value: Any, described: str) -> PreTrainedConfig:
    """
    A tower's configuration, of a mapping with a `model_type`.

    Args:
        described: what errors call it.

    Raises:
        ValueError: it has no model_type, or one that transformers doesn't know.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    check_tower_settings(value, described)
    if "model_type" not in value:
        raise ValueError(f"{described} has no model_type: add one, for example 'bert'.")
    settings = dict(value)
    model_type = settings.pop("model_type")
    if model_type == GapClosedClipRecordConfig.model_type:
        return GapClosedClipRecordConfig(**settings)
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        if "model_type" not in str(error) and "identifier" not in str(error):
            raise
        raise ValueError(f"{described}: transformers knows no model_type {model_type!r}.") from error


def check_types(config: PreTrainedConfig, hints: Mapping[str, Any]) -> None:
    """
    Checks that the fields of a configuration are of the types that they are declared with; of lists and mappings not
    what is in them.

    Raises:
        ValueError: one is not, as in a file that was changed by hand.
    """
    for name, hint in hints.items():
        kinds = [get_origin(option) or option for option in (get_args(hint) or (hint,))]
        value = getattr(config, name)
        if Any in kinds or (isinstance(value, bool) and bool in kinds):
            continue
        kinds += [int] if float in kinds else []
        if isinstance(value, bool) or not isinstance(value, tuple(kinds)):
            expected = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds)).replace("NoneType", "null")
            raise ValueError(f"{name} is {value!r:.100}: it has to be {expected}.")


def check_projections(config: Any) -> None:
    """
    Checks the fields of the projections in a [`GapClosedClipConfig`].

    Raises:
        ValueError: one is out of its range, or has no use; names the field and what it takes.
    """
    hidden_dims, names = config.projection_hidden_dim, config.modality_names
    if isinstance(hidden_dims, dict) and not set(hidden_dims) <= set(names):
        raise ValueError(f"projection_hidden_dim has {list(hidden_dims)}: its keys are {', '.join(names)}.")
    hidden = hidden_dims if isinstance(hidden_dims, dict) else {"": hidden_dims}
    hidden = {f"projection_hidden_dim{name and '.'}{name}": dim for name, dim in hidden.items() if dim is not None}
    for name, dim in {"projection_dim": config.projection_dim, **hidden}.items():
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= LARGEST_DIM:
            raise ValueError(f"{name} is {dim!r:.100}: it is a dimension, 1 (the paper has 512) to {LARGEST_DIM}.")
    if not 0 <= config.projection_dropout < 1:
        raise ValueError(f"projection_dropout is {config.projection_dropout}: use a number from 0 to below 1.")
    if config.projection_dropout and hidden_dims is None:
        raise ValueError(
            f"projection_dropout is {config.projection_dropout}, and the projections have no hidden layer to drop "
            "from: set projection_hidden_dim, or leave projection_dropout out."
        )


def check_tower_settings(settings: Any, described: str) -> None:
    """
    Checks what a mapping says of a tower before anything is built of it: not what only the tower's own code knows, but
    what would load a file, or build for minutes.

    Args:
        settings: fields of a configuration.
        described: what errors call it.

    Raises:
        ValueError: no mapping; a number of layers or a size that no tower has; arguments of timm that load weights.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{described} is {settings!r:.100}: it is a mapping of names to values.")
    for name, value in settings.items():
        _check_size(f"{described}.{name}", str(name), value)
    arguments = settings.get("model_args")
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{described}.model_args is {arguments!r:.100}: it is a mapping of arguments of timm.")
    for name, value in arguments.items():
        if name in NO_MODEL_ARGS and value not in (None, False, ""):
            raise ValueError(
                f"{described}.model_args.{name} is {value!r:.100}: leave it out. Weights come from a folder or a Hub "
                "id in the place of the whole mapping."
            )
        _check_size(f"{described}.model_args.{name}", str(name), value)


def _check_size(described: str, name: str, value: Any) -> None:
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, bool) or not isinstance(each, int | float):
            continue
        if name in LAYERS and not 0 <= each <= MOST_LAYERS:
            raise ValueError(f"{described} is {each}: use a number of layers, {MOST_LAYERS} at most.")
        if name.split("_")[-1] in SIZES and not -LARGEST_SIZE <= each <= LARGEST_SIZE:
            raise ValueError(f"{described} is {each}: no tower is that large; use {LARGEST_SIZE} at most.")


__all__ = [
    "WEIGHTS",
    "Weight",
    "check_objective",
    "check_projections",
    "check_tower_settings",
    "check_types",
    "check_weight",
    "tower_config",
]
