"""Weights of open_clip: linear layers, and the names that its transformer has in transformers."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..messages import did_you_mean, shorten


Weights = dict[str, Tensor]
Layers = list[tuple[Tensor, Tensor | None]]

BLOCKS = "transformer.resblocks."
BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Fields of open_clip's own transformers for which those of transformers have no counterpart, with the only value that
# they may have here.
PLAIN_BLOCKS = {
    "ls_init_value": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}


def check_fields(section: str, fields: dict[str, Any], known: Iterable[str], fixed: dict[str, Any]) -> None:
    """
    Checks a section of open_clip's configuration.

    Args:
        section: its name in messages.
        known: fields that may have any value.
        fixed: fields that have to have this value, if they are there.

    Raises:
        ValueError: a field is unknown, or has another value.
    """
    for name, value in fields.items():
        if name in fixed:
            if value != fixed[name]:
                raise ValueError(
                    f"{section}.{name} is {value!r}: the towers of transformers have no such thing, so only "
                    f"{fixed[name]!r} can be taken over."
                )
        elif name not in known:
            raise ValueError(f"{section} has an unknown field {name!r}{did_you_mean(name, [*known, *fixed])}")


def take(weights: Weights, prefix: str) -> Weights:
    """Moves the weights whose names begin with `prefix` out of `weights`; their names without it."""
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def take_layers(weights: Weights, names: Iterable[str]) -> Layers:
    """Moves those of the linear layers that are there out of `weights`: (out, in) and (out,), or None."""
    return [
        (weights.pop(f"{name}.weight").float(), _float(weights.pop(f"{name}.bias", None)))
        for name in names
        if f"{name}.weight" in weights
    ]


def take_matrix(weights: Weights, name: str) -> Layers:
    """The same of a projection that is one matrix (in, out) without a module around it."""
    return [(weights.pop(name).float().T.contiguous(), None)] if name in weights else []


def renamed(weights: Weights, names: dict[str, str]) -> Weights:
    """The weights of a tower by transformers' names; `names` are of what stands outside the blocks."""
    result: Weights = {}
    for name, value in weights.items():
        if name.startswith(BLOCKS):
            layer, _, rest = name.removeprefix(BLOCKS).partition(".")
            result |= _of_block(f"encoder.layers.{layer}", rest, value)
        else:
            module, dot, kind = name.rpartition(".")
            result[names.get(name) or f"{names.get(module, module)}{dot}{kind}"] = value
    return result


def load_weights(model: nn.Module, weights: Weights, tower: str) -> None:
    """
    Loads all weights of a tower, and nothing else.

    Raises:
        ValueError: weights are missing or left over, or have other shapes than the configuration says.
    """
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The {tower} tower's weights do not fit its model_cfg: {_last_line(error)}") from error
    for names, fault in ((missing, "lack"), (unexpected, "have besides what its model_cfg describes")):
        if names:
            raise ValueError(f"The {tower} tower's weights {fault}: {shorten(sorted(names))}")


def activation(section: str, fields: dict[str, Any], quick_gelu: bool) -> str:
    """
    transformers' name of the activation.

    Raises:
        ValueError: it has none.
    """
    arguments = fields.get("act_kwargs") or {}
    if quick_gelu and not arguments:
        return "quick_gelu"
    names = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    name = names.get(arguments.get("approximate", "none"))
    if quick_gelu or name is None or set(arguments) - {"approximate"}:
        raise ValueError(f"{section}.act_kwargs is {arguments}: only approximate 'none' or 'tanh' of GELU is known.")
    return name


def norm_eps(section: str, fields: dict[str, Any]) -> float:
    """
    The epsilon of the layer norms.

    Raises:
        ValueError: `norm_kwargs` says anything else.
    """
    arguments = fields.get("norm_kwargs") or {}
    if set(arguments) - {"eps"}:
        raise ValueError(f"{section}.norm_kwargs is {arguments}: only eps is known.")
    return arguments.get("eps", 1e-5)


def _of_block(layer: str, name: str, value: Tensor) -> Weights:
    kind = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}.get(name)
    if kind is not None:
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{part}_proj.{kind}": chunk for part, chunk in parts}
    module, _, kind = name.rpartition(".")
    return {f"{layer}.{BLOCK_NAMES.get(module, module)}.{kind}": value}


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


__all__ = [
    "PLAIN_BLOCKS",
    "Layers",
    "Weights",
    "activation",
    "check_fields",
    "load_weights",
    "norm_eps",
    "renamed",
    "take",
    "take_layers",
    "take_matrix",
]
