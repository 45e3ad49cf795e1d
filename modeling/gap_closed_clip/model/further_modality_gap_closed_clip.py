"""[`FurtherModality`]: tower, projection and centering of a modality beyond image and text."""

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_gap_closed_clip import GapClosedClipConfig
from .projection_gap_closed_clip import centering, embedding_map, projection
from .record_tower_gap_closed_clip import GapClosedClipRecordConfig, GapClosedClipRecordTower
from .tower_kinds_gap_closed_clip import (
    build_tower,
    drop_unused_pooler,
    image_width,
    is_timm,
    pool_text,
    takes,
    text_width,
    token_width,
    unmask,
)
from .towers_gap_closed_clip import run_fused_layers_as_modules


class Parts(NamedTuple):
    """What embeds one modality: its tower, and behind it the projection, the centering and the map."""

    tower: PreTrainedModel
    projection: nn.Module
    centering: nn.Module
    map: nn.Module


class FurtherModality(nn.Module):
    """
    The parts of one modality of `config.modalities`.

    Args:
        name: of the modality.
        config: of the whole model.
        tower: to use instead of a newly initialised one.

    Raises:
        ValueError: a tower that can't be built, or does not say how wide its features are.
    """

    weight = None  # for peft, as in ProjectionCentering

    def __init__(self, name: str, config: GapClosedClipConfig, tower: PreTrainedModel | None = None):
        super().__init__()
        entry = config.modalities[name]  # type: ignore[index]
        self.name = name
        self.tower = _build(name, entry["tower"]) if tower is None else tower
        entry["tower"] = self.tower.config  # the object in which its layers look their attention up
        self.pooling = entry["pooling"]
        unmask(self.tower)
        drop_unused_pooler(self.tower, self.pooling or "pooler")
        run_fused_layers_as_modules(self.tower)
        self.projection = projection(_width(self.tower), config, name)
        self.centering = centering(config)
        self.map = embedding_map(config)

    @property
    def parts(self) -> Parts:
        """As of image and text."""
        return Parts(self.tower, self.projection, self.centering, self.map)

    def encode(self, **inputs: Any) -> BaseModelOutputWithPooling:
        """
        The tower alone: its tokens and, as `pooler_output`, what represents a sample, (B, hidden).

        Args:
            inputs: of the tower, by its own names, or by those that they have for the model (`record_numbers`).

        Raises:
            ValueError: an input that the tower doesn't take, or one that it needs and did not get.
        """
        inputs = {key.removeprefix(f"{self.name}_"): value for key, value in inputs.items()}
        unknown = [key for key in inputs if not takes(self.tower, key) and not takes(self.tower, "kwargs")]
        needed = dict.fromkeys([self.tower.main_input_name, *_without_default(self.tower)])
        if unknown or not needed.keys() <= inputs.keys():
            names = ", ".join(f"{self.name}_{key}" for key in needed)
            raise ValueError(
                f"The {self.name} tower ({self.tower.config.model_type}) takes {names}; it got "
                f"{', '.join(f'{self.name}_{key}' for key in inputs) or 'nothing'}."
            )
        floats = [key for key, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
        inputs |= {key: inputs[key].to(self.tower.dtype) for key in floats}  # processors make float32
        outputs = self.tower(**inputs, return_dict=True)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._pool(outputs, inputs.get("attention_mask")),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _pool(self, outputs: Any, attention_mask: Tensor | None) -> Tensor:
        pooled = outputs.get("pooler_output")
        if self.pooling in (None, "pooler") and pooled is not None:
            return pooled.flatten(1)
        if self.pooling == "pooler":
            raise ValueError(
                f"modalities.{self.name}.pooling is 'pooler', and a {self.tower.config.model_type} model has none: "
                "use 'mean' or 'cls'."
            )
        tokens = outputs.last_hidden_state
        if tokens.ndim > 3:  # a map, (B, hidden, ...)
            return tokens.flatten(2).mean(-1)
        if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
            attention_mask = self._mask_of_tokens(attention_mask, tokens.shape[1])
        return pool_text(outputs, attention_mask, self.pooling or "mean")

    def _mask_of_tokens(self, attention_mask: Tensor, number: int) -> Tensor | None:
        """(B, number): the tower's tokens that come of a sound and not of its padding; None if it does not tell."""
        mask_of = getattr(self.tower, "_get_feature_vector_attention_mask", None)  # Wav2Vec2 and its kin
        return None if mask_of is None else mask_of(number, attention_mask.long())


def _build(name: str, config: Any) -> PreTrainedModel:
    # Not by its class: of a folder loaded without the package, configuration and model are modules of their own.
    if config.model_type == GapClosedClipRecordConfig.model_type:
        return GapClosedClipRecordTower(config)
    try:
        return build_tower(config)
    except ValueError as error:
        raise ValueError(f"modalities.{name}.tower can't be built: {error}") from error


def _without_default(tower: PreTrainedModel) -> list[str]:
    """The arguments that a tower's `forward` has to be given."""
    parameters = inspect.signature(tower.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _width(tower: PreTrainedModel) -> int:
    """Features of what represents a sample in a tower."""
    if is_timm(tower):
        return image_width(tower)
    return text_width(tower.config) if hasattr(tower.config, "hidden_size") else token_width(tower)


__all__ = ["FurtherModality", "Parts"]
