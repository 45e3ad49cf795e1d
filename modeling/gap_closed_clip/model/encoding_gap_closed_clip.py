"""[`GapClosedClipTowers`]: images, texts and whatever else a tower embeds, to features in the shared space."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_gap_closed_clip import GapClosedClipConfig
from .distributed_gap_closed_clip import world_size
from .further_modality_gap_closed_clip import FurtherModality, Parts
from .length_chunks_gap_closed_clip import encode_by_length
from .losses_gap_closed_clip import at_least_float32
from .modalities_gap_closed_clip import IMAGE_AND_TEXT, MAIN_INPUTS
from .pretrained_gap_closed_clip import GapClosedClipPreTrainedModel
from .projection_gap_closed_clip import centering, embedding_map, has_adapters, hold_unsaved, projection
from .tower_kinds_gap_closed_clip import (
    arguments_for_size,
    build_tower,
    check_layout,
    check_poolings,
    drop_unused_pooler,
    fill_to_full_length,
    first_channels,
    fixed_image_size,
    image_width,
    longest_text,
    pad_on_the_right,
    pool_image,
    pool_text,
    takes,
    text_width,
    unmask,
    unused_parameters,
)
from .towers_gap_closed_clip import all_states, frozen_batch_norms, run_fused_layers_as_modules, select_states


TOKENS = ("input_ids", "attention_mask", "token_type_ids")


class GapClosedClipTowers(GapClosedClipPreTrainedModel):
    """
    The part of [`GapClosedClipModel`] that encodes: a tower for each modality, and behind it a projection and a
    centering (and the map that `gap-closed-clip center` may have made).

    Args:
        config ([`GapClosedClipConfig`]): the architecture.
        vision_model, text_model: towers to use instead of newly initialised ones.
        modality_towers: the same of further modalities, by name.
    """

    def __init__(
        self,
        config: GapClosedClipConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
        modality_towers: Mapping[str, PreTrainedModel] | None = None,
    ):
        super().__init__(config)
        self.vision_model = build_tower(config.vision_config) if vision_model is None else vision_model
        self.text_model = build_tower(config.text_config) if text_model is None else text_model
        # The objects that the towers' own layers look their attention up in, also where the towers were given.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        unmask(self.vision_model)
        check_poolings(config, self.vision_model, self.text_model)
        drop_unused_pooler(self.vision_model, config.image_pooling)
        drop_unused_pooler(self.text_model, config.text_pooling)
        run_fused_layers_as_modules(self.vision_model)
        self.image_size = fixed_image_size(self.vision_model)  # (height, width), or None where any size will do
        self._image_channels = first_channels(self.vision_model)
        self.visual_projection = projection(image_width(self.vision_model), config, "image")
        self.text_projection = projection(text_width(config.text_config), config, "text")
        self.visual_centering = centering(config)
        self.text_centering = centering(config)
        self.visual_map = embedding_map(config)
        self.text_map = embedding_map(config)
        given = modality_towers or {}
        self.modality_towers = nn.ModuleDict(
            {name: FurtherModality(name, config, given.get(name)) for name in config.modalities or {}}
        )

    def parts(self, modality: str) -> Parts:
        """
        Tower, projection, centering and map of a modality.

        Raises:
            ValueError: the model has no such modality.
        """
        if modality == "image":
            return Parts(self.vision_model, self.visual_projection, self.visual_centering, self.visual_map)
        if modality == "text":
            return Parts(self.text_model, self.text_projection, self.text_centering, self.text_map)
        if modality not in self.modality_towers:
            raise ValueError(f"The model has no modality {modality!r}, only {', '.join(self.config.modality_names)}.")
        return self.modality_towers[modality].parts  # type: ignore[operator,union-attr,return-value]

    @property
    def max_text_length(self) -> int:
        """Tokens of the longest text that the text tower takes; a tokenizer's own limit may be higher or missing."""
        return longest_text(self.config.text_config)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | None = None, pooled_image: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Projected image features, (B, D) as `pooler_output`; not normalised. Centered where the config says so; where
        there is an `embedding_map`, they have gone through it and are unit vectors.

        Args:
            pixel_values: (B, 3, height, width), as the processor makes them.
            pooled_image: (B, hidden), the `pooler_output` of an earlier call of `vision_model`, instead of the pixels:
                a frozen tower need not run again.

        Raises:
            ValueError: gray images, a batch without its dimension, or a height or width that the tower can't take.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in TOKENS}  # of a whole batch
        return self.get_features("image", pixel_values=pixel_values, pooled=pooled_image, **kwargs)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pooled_text: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Projected text features, (B, D) as `pooler_output`; not normalised. Centered where the config says so; where
        there is an `embedding_map`, they have gone through it and are unit vectors.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, length), as the tokenizer makes them.
            pooled_text: (B, hidden), the `pooler_output` of an earlier `encode_text`, instead of the tokens: a frozen
                tower need not run again.

        Raises:
            ValueError: texts longer than the tower takes.
        """
        tokens = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        return self.get_features("text", input_ids=input_ids, pooled=pooled_text, **tokens, **kwargs)

    @can_return_tuple
    def get_features(
        self, modality: str, modality_mask: Tensor | None = None, **inputs: Any
    ) -> BaseModelOutputWithPooling:
        """
        Projected features of one modality, (B, D) as `pooler_output`; not normalised. Centered where the config says
        so; where there is an `embedding_map`, they have gone through it and are unit vectors.

        Args:
            modality: "image", "text" or another one of the model's.
            modality_mask: (B,) bool, or (B, M) of all modalities: False where a sample lacks the modality; its row of
                inputs is a placeholder, which has no part in the mean that centering subtracts. Its features say
                nothing.
            inputs: of the modality's tower, by its own names, or `pooled` (B, hidden): what `encode` gave before.

        Raises:
            ValueError: a modality that the model doesn't have, or inputs that its tower doesn't take.
        """
        if modality_mask is not None and modality_mask.ndim == 2:  # of all modalities, as the processor makes it
            modality_mask = modality_mask[:, self.config.modality_names.index(modality)].bool()
        outputs = self.project(modality, **inputs)
        outputs.pooler_output = self.place(modality, outputs.pooler_output, modality_mask)
        return outputs

    def encode(self, modality: str, **inputs: Any) -> BaseModelOutputWithPooling:
        """A modality's tower alone; `pooler_output` is what represents a sample, (B, hidden). See `get_features`."""
        if modality == "image":
            return self.encode_image(**inputs)
        if modality == "text":
            return self.encode_text(**inputs)
        self.parts(modality)  # which says so where there is none
        return self.modality_towers[modality].encode(**inputs)  # type: ignore[operator,union-attr]

    def project(self, modality: str, pooled: Tensor | None = None, **inputs: Any) -> BaseModelOutputWithPooling:
        """`get_features` before the centering."""
        if pooled is not None:
            outputs = BaseModelOutputWithPooling(pooler_output=pooled)
        elif modality in IMAGE_AND_TEXT and inputs.get(main := MAIN_INPUTS[modality]) is None:
            raise ValueError(f"There is no {modality} to embed: give {main}, or pooled_{modality}.")
        else:
            outputs = self.encode(modality, **inputs)
        outputs.pooler_output = at_least_float32(self.parts(modality).projection(outputs.pooler_output))
        return outputs

    def place(self, modality: str, projected: Tensor, modality_mask: Tensor | None = None) -> Tensor:
        """
        From projections (B, D) to features of the space, (B, D): centered, and mapped where there is a map.

        Args:
            modality_mask: (B,) bool, as of `get_features`.
        """
        parts = self.parts(modality)
        if modality_mask is None or not self.config.center_projections:
            return parts.map(parts.centering(projected))
        return parts.map(parts.centering(projected, modality_mask))

    def encode_image(
        self, pixel_values: Tensor, output_hidden_states: bool | int | Sequence[int] | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        The image tower alone: its tokens or map and, as `pooler_output`, what represents an image, (B, hidden).

        Args:
            pixel_values: (B, 3, height, width), as the processor makes them.
            output_hidden_states: indices instead of True leave None in the place of the other states.
            kwargs: what else the tower takes (`output_attentions`, ...).

        Raises:
            ValueError: gray images, a batch without its dimension, or a height or width that the tower can't take.
        """
        check_layout(tuple(pixel_values.shape), self._image_channels)
        size = pixel_values.shape[-2], pixel_values.shape[-1]
        if self.image_size is not None and size != self.image_size:
            raise ValueError(
                f"The images are {size[0]} x {size[1]} pixels, the image tower takes {self.image_size[0]} x "
                f"{self.image_size[1]}: set the image processor's crop_size and size, or the tower's "
                "model_args={'dynamic_img_size': True}."
            )
        # A tower takes None for no, and looks into its configuration only where nothing is handed to it.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if output_hidden_states is not None:
            kwargs["output_hidden_states"] = all_states(output_hidden_states)
        kwargs |= arguments_for_size(self.vision_model, size)
        # Processors make float32. Some towers turn it into their own dtype (ViT, timm's), others not (ConvNeXt, Swin).
        outputs = self.vision_model(pixel_values.to(self.vision_model.dtype), return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pool_image(outputs, self.config.vision_config, self.config.image_pooling, size),
            hidden_states=select_states(outputs.hidden_states, output_hidden_states),
            attentions=outputs.get("attentions"),
        )

    def encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        The text tower alone: (B, length, hidden) and, as `pooler_output`, what represents a text, (B, hidden).

        Args:
            input_ids, attention_mask: (B, length), as the tokenizer makes them. Texts padded on the left are moved
                to the left end, and so are their tokens in the output.
            output_hidden_states: indices instead of True leave None in the place of the other states.
            kwargs: what else the tower takes (`token_type_ids`, `position_ids`, `output_attentions`, ...).

        Raises:
            ValueError: texts longer than the tower takes.
        """
        limit = self.max_text_length
        if input_ids.shape[1] > limit:
            raise ValueError(
                f"The texts are {input_ids.shape[1]} tokens long, the text tower takes {limit} at most: tokenize with "
                "truncation=True (a pipeline takes it, too), which cuts them at the tokenizer's model_max_length. If "
                f"that is above {limit}, set tokenizer.model_max_length = {limit}."
            )
        # A tower takes None for no, and looks into its configuration only where nothing is handed to it.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if not takes(self.text_model, "token_type_ids"):
            kwargs.pop("token_type_ids", None)  # tokenizers and collators make them for every tower
        if output_hidden_states is not None:
            kwargs["output_hidden_states"] = all_states(output_hidden_states)
        if hasattr(self.config.text_config, "use_cache"):
            # An encoder keeps no cache. Its configuration asks for one all the same, of which transformers warns under
            # checkpointing, and torch.compile has no place for a warning in its graph.
            kwargs["use_cache"] = False
        if attention_mask is not None:
            input_ids, attention_mask, kwargs = pad_on_the_right(input_ids, attention_mask, kwargs)
        input_ids, attention_mask = fill_to_full_length(self.config.text_config, input_ids, attention_mask)
        tokens_alone = output_hidden_states is None and not kwargs.get("output_attentions")
        if tokens_alone and attention_mask is not None and self._cuts_padding():
            inputs = {"input_ids": input_ids, **kwargs}
            hidden, pooled = encode_by_length(self._run_text_tower, attention_mask, inputs)
            return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)
        outputs = self.text_model(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pool_text(outputs, attention_mask, self.config.text_pooling),
            hidden_states=select_states(outputs.hidden_states, output_hidden_states),
            attentions=outputs.attentions,
        )

    def _run_text_tower(self, attention_mask: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = self.text_model(attention_mask=attention_mask, return_dict=True, **inputs)
        return outputs.last_hidden_state, pool_text(outputs, attention_mask, self.config.text_pooling)

    def _cuts_padding(self) -> bool:
        """Whether texts are cut where they are padded: where the tower trains, and no other process counts chunks."""
        return self.text_model.training and world_size() == 1 and not torch.compiler.is_compiling()

    def freeze_towers(self, vision: bool = False, text: bool = False, modalities: Sequence[str] = ()) -> None:
        """
        Switches the towers' gradients off (or on), `modalities` names further ones. A tower without trainable
        parameters also stays in eval mode, and so does any BatchNorm whose own weight and bias have no gradient,
        beside adapters for one.
        """
        frozen = {"image": vision, "text": text, **dict.fromkeys(modalities, True)}
        for name in self.config.modality_names:
            self.parts(name).tower.requires_grad_(not frozen.get(name, False))
        self.train(self.training)

    def train(self, mode: bool = True) -> "GapClosedClipTowers":
        super().train(mode)
        # Here, because from_pretrained makes every parameter require a gradient and calls eval() afterwards.
        for parameter in [
            *unused_parameters(self.vision_model, self.config.image_pooling),
            *unused_parameters(self.text_model, self.config.text_pooling),
        ]:
            parameter.requires_grad_(False)
        for tower in [self.parts(name).tower for name in self.config.modality_names]:
            # Dropout and batch statistics would put noise into features that can't adapt to it.
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
            # So do those of a layer whose own weights stay as they are: an adapter would not be saved with them.
            for layer in frozen_batch_norms(tower):
                layer.eval()
        if has_adapters(self):
            saved = [name for name, parts in self.modality_towers.items() if hasattr(parts, "modules_to_save")]
            for name in [name for name in self.config.modality_names if name not in saved]:  # as a whole by peft
                hold_unsaved(self.parts(name).centering)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        # transformers looks for its own layers only; a timm tower has a switch of its own.
        for name in self.config.modality_names:
            tower = self.parts(name).tower
            if tower.supports_gradient_checkpointing:
                tower._set_gradient_checkpointing(enable, *args, **kwargs)


__all__ = ["GapClosedClipTowers"]
