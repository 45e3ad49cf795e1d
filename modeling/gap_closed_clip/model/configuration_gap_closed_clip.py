"""Configuration of [`GapClosedClipModel`]: two towers, a shared space, the objective, and a captioner's decoder."""

import difflib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .configuration_checks_gap_closed_clip import check_objective, check_projections, check_types, tower_config
from .modalities_gap_closed_clip import IMAGE_AND_TEXT, POOLINGS, SubConfigs, read_modalities


# What a captioner's decoder attends to. The embedding alone is what text and images have in common.
DECODER_MEMORIES = ("patches_and_embedding", "embedding")
# The fields that only a captioner uses, beside its decoder's configuration.
CAPTION_FIELDS = (
    "decoder_memory",
    "decoder_embedding_tokens",
    "embedding_noise",
    "label_smoothing",
    "caption_objective_weight",
)
# What sentence-transformers reads beside the weights: the one module that makes a whole model of it, with its code.
MODULES_FILE = "modules.json"
EMBEDDER = "sentence_transformers_gap_closed_clip.GapClosedClipEmbedder"


class GapClosedClipConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GapClosedClipModel`], or of a [`GapClosedClipForConditionalGeneration`] around one.

    The objective is `contrastive_weight * contrastive + align_weight * ATP + uniformity_weight * CU` (arXiv
    2602.20046). A weight is a number or a schedule over the fraction of training: `[[0.2, 1.0], [0.7, 0.0]]` is 1
    until 20% of training, falls linearly to 0 at 70% and stays there.

    The defaults are constant weights that served well on real radiology pairs in cross-validation (docs/results.md):
    strong alignment of projections that are centered, and a third of it in uniformity. The papers' own form is
    `align_weight=1, uniformity_weight=1, center_projections=False`, plain CLIP `align_weight=0, uniformity_weight=0,
    center_projections=False`.

    Args:
        vision_config (`TimmWrapperConfig` or `dict`, *optional*):
            The image tower, timm's or one of transformers'. The default is timm's `eva02_base_patch16_clip_224` (86 M
            parameters).
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The text tower, an encoder of transformers. The default is BERT-base.
        modalities (`dict` or `list`, *optional*):
            Modalities beyond image and text, by name and in order, each `{"tower": configuration, "pooling": ...}` (in
            config.json a list, each with its name):
            the tower is any model of transformers that `AutoModel` builds, or a [`GapClosedClipRecordConfig`];
            pooling is `"cls"`, `"mean"`, `"pooler"` or, by default, the tower's own, or the mean where it has none.
        anchor (`str`, *optional*, defaults to `"image"`):
            The modality that contrastive and align terms compare each other one with. `None`: they compare every two.
        fusion_weights (`dict`, *optional*):
            What a query of several modalities weighs each of them with, as training measured it. `None`: all alike.
        projection_dim (`int`, defaults to 512):
            Dimension D of the shared space.
        projection_hidden_dim (`int` or `dict`, *optional*):
            Width of the hidden layer of the projections; `None` makes them linear, as in the paper. A mapping gives
            each modality its own: `{"image": None, "text": 640}`.
        projection_bias (`bool`, defaults to `True`):
            Whether the layers of the projections have biases. Those of published CLIPs have none.
        projection_dropout (`float`, defaults to 0.0):
            Dropout of the projections' hidden layer in training; only with a `projection_hidden_dim`.
        image_pooling (`str`, defaults to `"pooler"`):
            What represents an image: `"pooler"` (what the tower gives itself, as timm's do), `"cls"` (first token) or
            `"mean"` (of the patches); the last two for transformers' towers.
        text_pooling (`str`, defaults to `"cls"`):
            What represents a text: `"cls"` (first token), `"mean"` (of the tokens that are not padding), or `"pooler"`
            (the tower's own pooler; of a CLIP's text tower the end of the text).
        center_projections (`bool`, defaults to `True`):
            Whether each modality's projections are centered by their mean before they are normalised: in training the
            mean of the global batch, at inference running statistics saved with the model.
        centering_momentum (`float`, defaults to 0.1):
            Share of a new batch in the running mean of the projections.
        embedding_map (`str`, *optional*):
            The post-hoc method (`"whitening"`, ...) that made a fixed map behind the embeddings: written by
            `gap-closed-clip center`, whose numbers are saved with the model. `None`: there is no map.
        logit_scale_init_value (`float`, defaults to `log(1 / 0.07)`):
            *Log* of the scale (1 / temperature) at the start, as in CLIP.
        max_logit_scale (`float`, defaults to 100):
            Cap of the scale itself (not of its log).
        learnable_temperature (`bool`, defaults to `True`):
            Whether the temperature is trained: CLIP (LT); `False` is CLIP (FT).
        logit_bias (`float`, defaults to 0.0):
            Added to the logits. SigLIP's probabilities, `sigmoid(logits_per_image)`, need it; it has no part in the
            softmax loss, which it would not change. With the sigmoid loss it is where the learned bias starts, and 0
            stands for SigLIP's -10.
        contrastive_weight, align_weight, uniformity_weight (`float` or `list`, default to 1.0, 3.0, 1.0):
            Weights of the three terms, constant or scheduled.
        modality_uniformity_weight, cross_uniformity_weight (`float` or `list`, default to 0.0):
            Weights of two further terms, those of Fahim et al. (arXiv 2405.18570): the uniformity of each modality,
            `log mean exp(-2 |z_i - z_j|^2)` over i != j, and the same between modalities, `|x_i - y_j|`; means over
            the modalities, and over the pairs that are compared. A term of weight 0 is not computed.
        contrastive_loss (`str`, defaults to `"softmax"`):
            The contrastive term: `"softmax"` is CLIP's InfoNCE, `"sigmoid"` SigLIP's loss (arXiv 2303.15343, eq. 1),
            whose bias is a parameter that trains also where `learnable_temperature` is off (but for adapters, which
            then leave both as they are). SigLIP's temperature starts at `logit_scale_init_value=log(10)`.
        mask_groups (`bool`, defaults to `True`):
            Whether pairs that share an image or a caption (`group_ids` of `forward`), or a record where records are
            compared (`modality_ids`), are kept out of one another's negatives.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the projections' initial weights.
        taken_over_from (`str`, *optional*):
            The CLIP that `from_clip` took over: its Hub id, or its type where it was a folder.
        hypothesis_template (`str`, defaults to `"Medical image of {}."`):
            The sentence that zero-shot classification puts a label into: to be handed to the pipeline as its
            `hypothesis_template`, whose default says that every image is a photo.
        decoder_config (`PreTrainedConfig` or `dict`, *optional*):
            The captioner's decoder, of the BERT family, with `is_decoder` and `add_cross_attention`. `None` where
            there is none; a captioner then takes the text tower's shape.
        decoder_memory (`str`, defaults to `"patches_and_embedding"`):
            What the decoder attends to: the image's patch tokens and its embedding, or the `"embedding"` alone, which
            may then be that of a text as well.
        decoder_embedding_tokens (`int`, defaults to 4):
            Tokens of the memory that an embedding is spread over.
        embedding_noise (`float`, defaults to 0.0):
            Root mean square length of the Gaussian noise that is added, in training, to the embedding (of length 1)
            that the decoder gets. A noisy embedding has a cosine of about `1 / sqrt(1 + embedding_noise**2)` with the
            clean one.
        label_smoothing (`float`, defaults to 0.1):
            Label smoothing of the captioning loss, in training only.
        caption_objective_weight (`float`, defaults to 0.0):
            Weight of the space's own objective beside the captioning loss: for encoders that train together with the
            decoder. 0 leaves it out.

    Raises:
        ValueError: where a value is out of range, naming the field and what it takes.

    Example:

    ```python
    >>> from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel

    >>> config = GapClosedClipConfig(
    ...     vision_config={
    ...         "model_type": "timm_wrapper",
    ...         "architecture": "eva02_tiny_patch14_224",
    ...         "model_args": {"img_size": 56, "embed_dim": 48, "depth": 1, "num_heads": 3},
    ...     },
    ...     text_config={"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3},
    ... )
    >>> model = GapClosedClipModel(config)
    ```
    """

    model_type = "gap_closed_clip"
    sub_configs = SubConfigs("vision_config", "text_config", "decoder_config")
    # Everything but the (N, D) embeddings and the ids: N x N logits and token states must not be gathered over a whole
    # evaluation set by the Trainer, and scalars can't be.
    keys_to_ignore_at_inference = [
        "contrastive_loss",
        "align_loss",
        "uniformity_loss",
        "modality_uniformity_loss",
        "cross_uniformity_loss",
        "logits_per_image",
        "logits_per_text",
        "vision_model_output",
        "text_model_output",
        "further_outputs",
        "caption_loss",
        "logits",
        "cache",  # as transformers 5.24 calls it
        "past_key_values",  # as it does before
        "encoder_hidden_states",
    ]

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    modalities: Any = None
    anchor: str | None = "image"
    fusion_weights: dict[str, float] | None = None
    projection_dim: int = 512
    projection_hidden_dim: int | dict[str, int | None] | None = None
    projection_bias: bool = True
    projection_dropout: float | int = 0.0
    image_pooling: str = "pooler"
    text_pooling: str = "cls"
    center_projections: bool = True
    centering_momentum: float = 0.1
    embedding_map: str | None = None
    logit_scale_init_value: float | int = math.log(1 / 0.07)
    max_logit_scale: float | int = 100.0
    learnable_temperature: bool = True
    logit_bias: float | int = 0.0
    contrastive_weight: Any = 1.0
    align_weight: Any = 3.0
    uniformity_weight: Any = 1.0
    modality_uniformity_weight: Any = 0.0
    cross_uniformity_weight: Any = 0.0
    contrastive_loss: str = "softmax"
    mask_groups: bool = True
    initializer_range: float = 0.02
    taken_over_from: str | None = None
    hypothesis_template: str = "Medical image of {}."
    decoder_config: PreTrainedConfig | dict | None = None
    decoder_memory: str = "patches_and_embedding"
    decoder_embedding_tokens: int = 4
    embedding_noise: float | int = 0.0
    label_smoothing: float | int = 0.1
    caption_objective_weight: float | int = 0.0

    def __post_init__(self, **kwargs):
        vision_default = {"model_type": "timm_wrapper", "architecture": "eva02_base_patch16_clip_224"}
        defaults = {"vision_config": vision_default, "text_config": {"model_type": "bert"}, "decoder_config": None}
        for name, default in defaults.items():
            value = default if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, None if value is None else tower_config(value, name))
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, key: str, value: Any) -> None:  # also of `from_pretrained(..., modalities=...)`
        super().__setattr__(key, read_modalities(value) if key == "modalities" else value)

    def __getattr__(self, name: str) -> Any:
        """`NAME_config`, that of a further modality's tower, by which transformers sets its attention and dtype."""
        modalities = self.__dict__.get("modalities") or {}
        if name.endswith("_config") and name.removesuffix("_config") in modalities:
            return modalities[name.removesuffix("_config")]["tower"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def modality_names(self) -> tuple[str, ...]:
        """All modalities in order: "image", "text" and the further ones."""
        return (*IMAGE_AND_TEXT, *(self.modalities or {}))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the towers of further modalities as mappings too."""
        output = super().to_dict()
        # A list, because a configuration is written with the keys of mappings in alphabetical order.
        output["modalities"] = []
        for name, entry in (self.modalities or {}).items():
            tower = entry["tower"].to_dict()
            tower.pop("transformers_version", None)
            output["modalities"].append({"name": name, **entry, "tower": tower})
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        As `PreTrainedConfig.save_pretrained`. Beside a model, whose code is saved with it, also modules.json, by which
        `SentenceTransformer(folder, trust_remote_code=True)` finds it.
        """
        super().save_pretrained(save_directory, **kwargs)
        if "AutoModel" in (getattr(self, "auto_map", None) or {}):
            # Here and not after the weights, so that push_to_hub=True of the model sends it as well.
            modules = [{"idx": 0, "name": "0", "path": "", "type": EMBEDDER}]
            Path(save_directory, MODULES_FILE).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """As in transformers; `decoder=True` is a captioner's decoder, what text is written with."""
        if decoder and not encoder and self.decoder_config is not None:
            return self.decoder_config
        return self.text_config

    def check(self) -> None:
        """
        Checks all fields. A model does so too when it is made: `from_pretrained(folder, field=value)` changes them
        after the configuration was read.

        Raises:
            ValueError: a field is out of its range; names the field and what it takes.
        """
        check_types(self, GapClosedClipConfig.__annotations__)
        names = self.modality_names
        check_projections(self)
        if self.anchor is not None and self.anchor not in names:
            raise ValueError(f"anchor is {self.anchor!r}: use one of {', '.join(names)}, or None for every pair.")
        self._check_fusion_weights()
        for name in ("image_pooling", "text_pooling"):
            if getattr(self, name) not in POOLINGS:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(POOLINGS)}.")
        if not math.isfinite(self.logit_bias):
            raise ValueError(f"logit_bias is {self.logit_bias}: use a finite number.")
        if not 0 < self.centering_momentum <= 1:
            raise ValueError(f"centering_momentum is {self.centering_momentum}: use a number above 0, at most 1.")
        if not 0 < self.max_logit_scale < math.inf:
            raise ValueError(f"max_logit_scale is {self.max_logit_scale}: use a finite number above 0.")
        if not -math.inf < self.logit_scale_init_value <= math.log(self.max_logit_scale) + 1e-6:
            raise ValueError(
                f"logit_scale_init_value is {self.logit_scale_init_value} but max_logit_scale is "
                f"{self.max_logit_scale}: logit_scale_init_value is the log of the scale and starts at or below the "
                f"cap's, {math.log(self.max_logit_scale):.4f}."
            )
        if self.hypothesis_template.count("{}") != 1:
            raise ValueError(
                f"hypothesis_template is {self.hypothesis_template!r}: it holds {{}} once, where the label goes."
            )
        if self.decoder_memory not in DECODER_MEMORIES:
            raise ValueError(f"decoder_memory is {self.decoder_memory!r}: use one of {', '.join(DECODER_MEMORIES)}.")
        if self.decoder_embedding_tokens < 1:
            raise ValueError(f"decoder_embedding_tokens is {self.decoder_embedding_tokens}: use 1 or more.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: use a number from 0 to below 1.")
        for name in ("embedding_noise", "caption_objective_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: use a number of 0 or more.")
        check_objective(self)

    def _check_fusion_weights(self) -> None:
        weights = self.fusion_weights or {}
        if not set(weights) <= set(self.modality_names) or not all(0 <= w < math.inf for w in weights.values()):
            raise ValueError(
                f"fusion_weights is {weights}: it gives modalities ({', '.join(self.modality_names)}) a weight of 0 "
                "or more, or is None."
            )


def check_field_names(names: Iterable[str]) -> None:
    """
    Checks the names of fields that a caller gives, since `PreTrainedConfig` keeps any.

    Raises:
        ValueError: one is no field of [`GapClosedClipConfig`]; with the nearest name.
    """
    known = GapClosedClipConfig.__annotations__
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"GapClosedClipConfig has no field {name!r}.{hint}")


GapClosedClipConfig.register_for_auto_class()

__all__ = ["GapClosedClipConfig", "check_field_names"]
