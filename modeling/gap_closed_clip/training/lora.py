"""The `lora:` section: from what a user says of adapters to a plain peft configuration and the wrapped model."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..messages import did_you_mean
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from .arguments import TOWER_CONFIGS


# Those that were tried: every adapter gets a gradient and can be merged. (AdaLoRA, for one, has to be called by the
# training loop in every step.) Each with its settings beside the layers.
METHODS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "lora": (LoraConfig, {}),
    "dora": (LoraConfig, {"use_dora": True}),
    "ia3": (IA3Config, {}),
    "loha": (LoHaConfig, {}),
    "lokr": (LoKrConfig, {}),
    "vera": (VeraConfig, {}),
    "oft": (OFTConfig, {"oft_block_size": 0}),
    "hra": (HRAConfig, {}),
}
# What peft calls our settings, by method.
PEFT_NAMES = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "vera_dropout", "module_dropout"),
}
TOWERS = tuple(TOWER_CONFIGS)
# Layers of one tower behind its name, of timm's transformers (EVA, EVA-02, ViT, BEiT, Swin) and those of transformers
# (BERT and its family, DeBERTa, ViT, DINOv2, CLIP, SigLIP, ModernBERT, ...); of convolutional networks, which lack
# attention, the pointwise convolutions of EfficientNet, MobileNet and ConvNeXt and the convolutions of ResNet. Nothing
# matches a depthwise convolution (peft can't merge an adapter into a grouped one), the patch embedding
# (`patch_embed.proj`), the stem, SigLIP's attention pooling (torch's own attention reads its weights past an adapter),
# or a projection to the shared space.
_ATTENTION = (
    r".*\.(?:layers?|blocks)\.\d+\.(?:self_attn|attention|attn)\.(?:self\.|attention\.|attn\.)?"
    r"(?:query|key|value|[qkvo]|[qkvo]_proj|out_proj|output\.dense|[qkv]_lin|out_lin|Wqkv|Wo"
    r"|(?:query|key|value|in)_proj|projection_(?:query|key|value))"
)
_MLP = (
    r".*\.(?:layers?|blocks)\.\d+\.(?:(?:intermediate|output)\.dense|ffn\.lin[12]"
    r"|mlp\.(?:fc[12]|Wi|Wo|up_proj|gate_proj|down_proj|weights_in|weights_out))"
)
LAYERS = {
    "attention": {
        "vision": r".*\.(?:attn|attn_pool)\.(?:qkv|q_proj|k_proj|v_proj|[qkv]|kv|qk|proj)|" + _ATTENTION,
        "text": _ATTENTION,
    },
    "mlp": {
        "vision": r".*\.mlp\.(?:fc1|fc1_g|fc1_x|fc2|w12|w3)|.*\.(?:conv_pw|conv_pwl|conv_head|pwconv[12])"
        r"|.*\.se\.(?:conv_reduce|conv_expand)|.*\.layer\d+\.\d+\.conv[123]"
        r"|.*\.stages\.\d+\.layers\.\d+\.layer\.\d+\.convolution|" + _MLP,
        "text": _MLP,
    },
}
LAYERS["all"] = {tower: "|".join(kind[tower] for kind in LAYERS.values()) for tower in TOWERS}
# What can train beside the adapters, by the names of the model's modules.
PARTS = {"projections": ("visual_projection", "text_projection"), "temperature": ("temperature",)}
# Moves in training whether it is asked to or not, so it belongs to every adapter.
CENTERING = ("visual_centering", "text_centering")
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D)


@dataclass
class LoraArguments:
    """Adapters instead of full fine-tuning: the `lora:` section. Without the section there are none."""

    method: str = field(
        default="lora", metadata={"help": f"A method of peft: {', '.join(METHODS)}; the others by Python."}
    )
    rank: int = field(default=8, metadata={"help": "Rank of an adapter."})
    alpha: float | None = field(
        default=None, metadata={"help": "An adapter's output is multiplied by alpha / rank; default: 2 * rank."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Of an adapter's input, in training."})
    towers: list[str] = field(default_factory=lambda: list(TOWERS), metadata={"help": "vision, text, or both."})
    layers: str = field(
        default="attention",
        metadata={
            "help": "attention, mlp, all, or a regular expression that matches whole names of layers, e.g. "
            r"'vision_model\..*\.attn\.qkv'."
        },
    )
    train: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={
            "help": "What is trained and saved as a whole beside the adapters: projections, temperature, names of "
            "modules. (The centering always is.)"
        },
    )
    merge: bool = field(
        default=False,
        metadata={"help": "Leave a whole model with the adapters merged into it, instead of an adapter."},
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Further fields of the method's peft configuration."}
    )

    def __post_init__(self):
        for name in ("towers", "train"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.method not in METHODS:
            raise ValueError(f"lora.method: unknown method {self.method!r}{did_you_mean(self.method, METHODS)}")
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: it is the adapters' inner dimension, 1 or more.")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}: use a number above 0, or leave it out for 2 * rank.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}: use a number from 0 to below 1.")
        for tower in self.towers:
            if tower not in TOWERS:
                raise ValueError(f"lora.towers: unknown tower {tower!r}{did_you_mean(tower, TOWERS)}")
        if not self.towers:
            raise ValueError(
                "lora.towers is empty: name vision, text or both. To train the projections alone leave the section "
                "lora out and set model.freeze_vision=true model.freeze_text=true."
            )
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ValueError(f"lora.layers is {self.layers!r}, which is no regular expression: {error}.") from error
        self._check_options()

    def _check_options(self) -> None:
        config_class, _ = METHODS[self.method]
        known = {f.name for f in dataclasses.fields(config_class)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in PEFT_NAMES:
            if _peft_name(name, known) is None and getattr(self, name) != defaults[name]:
                raise ValueError(f"lora.{name}: the method {self.method!r} has none. Leave it out.")
        ours = {"target_modules": "layers", "modules_to_save": "train", "peft_type": "method"}
        for name in self.options:
            if name in ours:
                raise ValueError(f"lora.options: set lora.{ours[name]} instead of {name}.")
            if name not in known:
                raise ValueError(f"lora.options: {config_class.__name__} has no {name!r}{did_you_mean(name, known)}")


def build_peft_config(lora: LoraArguments, model: GapClosedClipModel, whole: Sequence[str] = ()) -> PeftConfig:
    """
    The peft configuration for a model, as one could have written it by hand: a pattern in `target_modules`, names in
    `modules_to_save`.

    Args:
        whole: further modalities that are trained and saved with their towers; of the others the projection and the
            centering alone. What does not train before stays as it is.

    Raises:
        ValueError: nothing matches, or a layer that takes no adapter does; `train` names no part of the model; options
            that the method refuses.
    """
    pattern = _pattern(lora)
    _check_pattern(pattern, lora, model)
    config_class, settings = METHODS[lora.method]
    settings = {**settings, "target_modules": pattern, "modules_to_save": _modules_to_save(lora, model, whole)}
    known = {f.name for f in dataclasses.fields(config_class)}
    values = {"rank": lora.rank, "alpha": lora.alpha or 2 * lora.rank, "dropout": lora.dropout}
    for name, value in values.items():
        peft_name = _peft_name(name, known)
        if peft_name is not None:
            settings[peft_name] = value
    if lora.method == "ia3":  # it scales the inputs of these, and the outputs of the others
        settings["feedforward_modules"] = _feedforward(pattern, model)
    try:
        return config_class(**{**settings, **lora.options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora.options: {config_class.__name__} refuses this: {error}") from error


def add_adapters(
    model: GapClosedClipModel,
    lora: LoraArguments,
    base: str | None,
    revision: str | None,
    whole: Sequence[str] = (),
) -> PeftModel:
    """
    The model wrapped by peft: adapters and the parts beside them train, all else is frozen.

    Args:
        model: changed in place.
        base: the folder or Hub id to note in the adapter, from which its base model loads; None where it needs none.
        revision: of a Hub id.
        whole: as of `build_peft_config`.

    Raises:
        ValueError: as `build_peft_config`; also layers of a shape that the method can't adapt.
    """
    peft_config = build_peft_config(lora, model, whole)
    try:
        wrapped = get_peft_model(model, peft_config)
    except (TypeError, ValueError) as error:  # a kind of layer, or a number of features that its block size refuses
        raise ValueError(f"lora.method={lora.method!r} does not fit the layers: {error}") from error
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.peft_config["default"].revision = revision
    model.train(model.training)  # a tower that has become frozen by this is in eval mode
    return wrapped


def _pattern(lora: LoraArguments) -> str:
    """The pattern that peft compares with whole names of modules."""
    if lora.layers in LAYERS:
        return "|".join(rf"{tower}_model(?:{LAYERS[lora.layers][tower]})" for tower in lora.towers)
    return rf"(?=(?:{'|'.join(lora.towers)})_model\.)(?:{lora.layers})"


def _check_pattern(pattern: str, lora: LoraArguments, model: GapClosedClipModel) -> None:
    modules = dict(model.named_modules())
    matched = [name for name in modules if re.fullmatch(pattern, name)]
    for name in matched:
        layer = getattr(modules[name], "base_layer", modules[name])  # which may have another adapter already
        if not isinstance(layer, ADAPTABLE):
            raise ValueError(
                f"lora.layers={lora.layers!r} also matches {name} ({type(layer).__name__}), which takes no "
                "adapter: let it match linear and convolutional layers only."
            )
        if getattr(layer, "groups", 1) > 1:
            raise ValueError(
                f"lora.layers={lora.layers!r} also matches {name}, a convolution in groups, whose adapter can't be "
                "merged: name layers by a regular expression that leaves it out."
            )
    for tower in lora.towers:
        prefix = f"{tower}_model."
        if any(name.startswith(prefix) for name in matched):
            continue
        raise ValueError(
            f"lora.layers={lora.layers!r} matches no layer of the {tower} tower. "
            f"{_layers_instead(lora, tower, modules)} Give a regular expression that matches such whole names, or "
            f"leave {tower!r} out of lora.towers."
        )


def _layers_instead(lora: LoraArguments, tower: str, modules: dict[str, nn.Module]) -> str:
    """What an error says of the layers that a tower has."""
    inside = {name: module for name, module in modules.items() if name.startswith(f"{tower}_model.")}
    linear = [name for name, module in inside.items() if isinstance(module, nn.Linear)]
    convolutions = [n for n, module in inside.items() if isinstance(module, nn.Conv2d) and module.groups == 1]
    examples = list({name.rpartition(".")[2]: name for name in linear or convolutions}.values())
    listed = f"e.g. {', '.join(examples[:6])}." if examples else "there are none."
    kind = "convolutional" if convolutions and not linear else "linear"
    mlp = _pattern(dataclasses.replace(lora, layers="mlp", towers=[tower]))
    hint = ""
    if lora.layers == "attention" and any(re.fullmatch(mlp, name) for name in inside):
        hint = "It has no attention: lora.layers=mlp, or all, adapts its other layers. "
    return f"{hint}Its {kind} layers: {listed}"


def _modules_to_save(lora: LoraArguments, model: GapClosedClipModel, whole: Sequence[str]) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    saved = list(CENTERING) if model.config.center_projections else []
    further, parts = _of_modalities(model, whole)
    saved += further
    for part in lora.train:
        names = (*PARTS.get(part, (part,)), *(parts if part == "projections" else ()))
        if part not in PARTS and part not in modules:
            known, listed = [*PARTS, *modules], f"; known are {', '.join(PARTS)}, and names of modules."
            raise ValueError(f"lora.train: the model has no {part!r}{did_you_mean(part, known, otherwise=listed)}")
        if part == "temperature" and not model.config.learnable_temperature:
            continue
        for name in names:
            # The layers of a container: not all methods can merge what has no weight of its own.
            container = isinstance(modules[name], nn.Sequential)
            leaves = [f"{name}.{child}" for child, m in modules[name].named_children() if list(m.parameters())]
            saved.extend(leaves if container else [name])
    return list(dict.fromkeys(saved))


def _of_modalities(model: GapClosedClipModel, whole: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the further modalities, names of modules that are saved in any case, and of the projections of the others."""
    saved, projections = [], []
    for name in model.config.modalities or {}:
        place, parts = f"modality_towers.{name}", model.parts(name)
        if name in whole and any(parameter.requires_grad for parameter in parts.tower.parameters()):
            saved.append(place)
        elif any(parameter.requires_grad for parameter in parts.projection.parameters()):
            saved += [f"{place}.centering"] if model.config.center_projections else []
            projections.append(f"{place}.projection")
    return saved, projections


def _feedforward(pattern: str, model: GapClosedClipModel) -> list[str]:
    """The names of those matching layers that are the last of an MLP."""
    last = re.compile(
        r".*\.mlp\.(fc2|w3|Wo|down_proj|weights_out)|.*\.(conv_pwl|pwconv2)|.*\.ffn\.lin2|.*\.layers?\.\d+\.output\.dense"
    )
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name) and last.fullmatch(name)]


def _peft_name(name: str, known: set[str]) -> str | None:
    return next((candidate for candidate in PEFT_NAMES[name] if candidate in known), None)


__all__ = ["LoraArguments", "add_adapters", "build_peft_config"]
