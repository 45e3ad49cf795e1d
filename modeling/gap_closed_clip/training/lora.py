"""The `lora:` section: from what a user says of adapters to a plain peft configuration and the wrapped model."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
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
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint import BASE, is_adapter, is_local
from ..conversion import is_foreign
from ..messages import did_you_mean
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from .arguments import TOWER_CONFIGS, ModelArguments


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
# (BERT and its family, ViT, DINOv2, CLIP, SigLIP, ModernBERT, ...); of convolutional networks, which lack attention,
# the pointwise convolutions of EfficientNet, MobileNet and ConvNeXt and the convolutions of ResNet. Nothing matches a
# depthwise convolution (peft can't merge an adapter into a grouped one), the patch embedding (`patch_embed.proj`), the
# stem, SigLIP's attention pooling (torch's own attention reads its weights past an adapter), or a projection to the
# shared space.
_ATTENTION = (
    r".*\.(?:layers?|blocks)\.\d+\.(?:self_attn|attention|attn)\.(?:self\.|attention\.|attn\.)?"
    r"(?:query|key|value|[qkvo]|[qkvo]_proj|out_proj|output\.dense|[qkv]_lin|out_lin|Wqkv|Wo)"
)
_MLP = (
    r".*\.(?:layers?|blocks)\.\d+\.(?:(?:intermediate|output)\.dense|ffn\.lin[12]"
    r"|mlp\.(?:fc[12]|Wi|Wo|up_proj|gate_proj|down_proj|weights_in|weights_out))"
)
LAYERS = {
    "attention": {
        "vision": r".*\.(?:attn|attn_pool)\.(?:qkv|q_proj|k_proj|v_proj|q|kv|proj)|" + _ATTENTION,
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

# Fields of the configuration that say how a model is trained, not what it makes of an image or a text.
TRAINING_FIELDS = {
    "contrastive_weight", "align_weight", "uniformity_weight", "mask_groups",
    "centering_momentum", "logit_scale_init_value", "learnable_temperature", "initializer_range",
}  # fmt: skip


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


def build_peft_config(lora: LoraArguments, model: GapClosedClipModel) -> PeftConfig:
    """
    The peft configuration for a model, as one could have written it by hand: a pattern in `target_modules`, names in
    `modules_to_save`.

    Raises:
        ValueError: nothing matches, or a layer that takes no adapter does; `train` names no part of the model; options
            that the method refuses.
    """
    pattern = _pattern(lora)
    _check_pattern(pattern, lora, model)
    config_class, settings = METHODS[lora.method]
    settings = {**settings, "target_modules": pattern, "modules_to_save": _modules_to_save(lora, model)}
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


def add_adapters(model: GapClosedClipModel, lora: LoraArguments, base: str | None, revision: str | None) -> PeftModel:
    """
    The model wrapped by peft: adapters and the parts beside them train, all else is frozen.

    Args:
        model: changed in place.
        base: the folder or Hub id to note in the adapter, from which its base model loads; None where it needs none.
        revision: of a Hub id.

    Raises:
        ValueError: as `build_peft_config`; also layers of a shape that the method can't adapt.
    """
    peft_config = build_peft_config(lora, model)
    try:
        wrapped = get_peft_model(model, peft_config)
    except (TypeError, ValueError) as error:  # a kind of layer, or a number of features that its block size refuses
        raise ValueError(f"lora.method={lora.method!r} does not fit the layers: {error}") from error
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.peft_config["default"].revision = revision
    model.train(model.training)  # a tower that has become frozen by this is in eval mode
    return wrapped


class AdapterBase:
    """
    The model that adapters are trained on, as it is without them.

    Args:
        model: the model before adapters are added.
        args: the `model:` section that the model was built from.
        output_dir: folder of the run, which the base is saved in where nothing else holds it.
    """

    def __init__(self, model: GapClosedClipModel, args: ModelArguments, output_dir: str):
        self.model = model
        # The same tensors, by the names they have without adapters.
        self.state: dict[str, Tensor] = model.state_dict()
        self.folder = Path(output_dir).resolve() / BASE
        self.checkpoint = args.checkpoint if self._is_whole_model(args) else None

    def adapt(self, lora: LoraArguments) -> PeftModel:
        """
        The model wrapped by peft, with a note of where its base is.

        Raises:
            ValueError: as `add_adapters`.
        """
        name: str | None = str(self.folder)
        revision = None
        if lora.merge:
            name = None
        elif self.checkpoint is not None and is_local(self.checkpoint):
            name = str(Path(self.checkpoint).resolve())
        elif self.checkpoint is not None:
            name, revision = self.checkpoint, self.model.config._commit_hash
        return add_adapters(self.model, lora, name, revision)

    def save(self, processor: GapClosedClipProcessor) -> None:
        """Saves the base into the output folder's `base`, unless another folder or repository holds it."""
        if self.checkpoint is None:
            self.model.save_pretrained(self.folder, state_dict=self.state)
            processor.save_pretrained(self.folder)

    @staticmethod
    def _is_whole_model(args: ModelArguments) -> bool:
        """Whether the checkpoint in `args` gives the same embeddings as the base, and peft can load it."""
        if args.checkpoint is None or is_foreign(args.checkpoint) or is_adapter(args.checkpoint):
            return False
        config = GapClosedClipConfig.from_pretrained(args.checkpoint)
        changed = {name for name, value in args.config.items() if getattr(config, name) != value}
        return changed <= TRAINING_FIELDS


def _pattern(lora: LoraArguments) -> str:
    """The pattern that peft compares with whole names of modules."""
    if lora.layers in LAYERS:
        return "|".join(rf"{tower}_model(?:{LAYERS[lora.layers][tower]})" for tower in lora.towers)
    return rf"(?=(?:{'|'.join(lora.towers)})_model\.)(?:{lora.layers})"


def _check_pattern(pattern: str, lora: LoraArguments, model: GapClosedClipModel) -> None:
    modules = dict(model.named_modules())
    matched = [name for name in modules if re.fullmatch(pattern, name)]
    for name in matched:
        if not isinstance(modules[name], ADAPTABLE):
            raise ValueError(
                f"lora.layers={lora.layers!r} also matches {name} ({type(modules[name]).__name__}), which takes no "
                "adapter: let it match linear and convolutional layers only."
            )
        if getattr(modules[name], "groups", 1) > 1:
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


def _modules_to_save(lora: LoraArguments, model: GapClosedClipModel) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    saved = list(CENTERING) if model.config.center_projections else []
    for part in lora.train:
        names = PARTS.get(part, (part,))
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


def _feedforward(pattern: str, model: GapClosedClipModel) -> list[str]:
    """The names of those matching layers that are the last of an MLP."""
    last = re.compile(
        r".*\.mlp\.(fc2|w3|Wo|down_proj|weights_out)|.*\.(conv_pwl|pwconv2)|.*\.ffn\.lin2|.*\.layers?\.\d+\.output\.dense"
    )
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name) and last.fullmatch(name)]


def _peft_name(name: str, known: set[str]) -> str | None:
    return next((candidate for candidate in PEFT_NAMES[name] if candidate in known), None)


__all__ = ["AdapterBase", "LoraArguments", "add_adapters", "build_peft_config"]
