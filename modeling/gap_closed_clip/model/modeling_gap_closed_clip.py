"""[`GapClosedClipModel`]: images, texts and further modalities in one space, with the loss that closes the gap."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_gap_closed_clip import GapClosedClipConfig, check_field_names
from .losses_gap_closed_clip import unit_vectors
from .micro_batches_gap_closed_clip import MicroBatches, encode_in_micro_batches
from .modalities_gap_closed_clip import IMAGE_AND_TEXT, inputs_by_modality
from .objective_gap_closed_clip import GapClosedClipObjective
from .outputs_gap_closed_clip import GapClosedClipOutput
from .saving_gap_closed_clip import describe_code
from .tower_kinds_gap_closed_clip import is_timm
from .towers_gap_closed_clip import forget_origin, load_image_tower, load_text_tower, pretrained_head


logger = logging.get_logger(__name__)


def _announce_loss(forward: Callable) -> Callable:
    """
    Gives `forward` the signature of a model that returns its loss without labels. The Trainer reads there whether
    there is one to evaluate, and takes no default but True for yes; in truth it is None, so that a caller who asks for
    the loss can be told where there is none.
    """
    signature = inspect.signature(forward)
    parameters = [p.replace(default=True) if p.name == "return_loss" else p for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


class GapClosedClipModel(GapClosedClipObjective):
    """
    Image and text embeddings that share one space.

    Towers, projections to D dimensions, optionally centered, unit vectors; the loss of arXiv 2602.20046 inside
    `forward`.

    Args:
        config ([`GapClosedClipConfig`]): the architecture and the objective.
        vision_model, text_model: towers to use instead of newly initialised ones.
        modality_towers: the same of the further modalities (`config.modalities`), by name.
    """

    # A captioner's folder loads as the encoder inside it.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^memory\."]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedConfig,
        text_model_name_or_path: str | PreTrainedConfig,
        keep_vision_projection: bool = False,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        modality_towers: Mapping[str, PreTrainedModel] | None = None,
        dtype: torch.dtype | None = None,
        **config_kwargs,
    ) -> "GapClosedClipModel":
        """
        Starts from published towers, by Hub id or folder. A tower given as a configuration starts from scratch.

        Args:
            vision_model_name_or_path: a timm image model, e.g. `timm/eva_giant_patch14_clip_224.laion400m`, one of
                transformers, e.g. `facebook/dinov2-base` or the image half of `openai/clip-vit-base-patch32`, or its
                configuration.
            text_model_name_or_path: an encoder, e.g. `google-bert/bert-base-uncased` or the text half of a CLIP, or
                its configuration.
            keep_vision_projection: start the image projection from the checkpoint's own CLIP head; `projection_dim` is
                then the head's (1024 for EVA-CLIP-g) and the projections are linear.
            vision_kwargs, text_kwargs: handed to the towers' `from_pretrained` (`revision`, `model_args`, ...).
            modality_towers: of further modalities (`modalities` of `config_kwargs`), by name.
            dtype: of the whole model; float32 by default, whatever the towers are stored in.
            config_kwargs: fields of [`GapClosedClipConfig`]. By default `image_pooling` and `text_pooling` are what
                the towers were trained with, where they tell.

        Raises:
            OSError: a tower that can't be found or downloaded.
            ValueError: a model that is no such tower, a pooling that it doesn't have, a field that the configuration
                doesn't have, or `keep_vision_projection` where there is no fitting head.
        """
        check_field_names(config_kwargs)
        vision_kwargs, text_kwargs = vision_kwargs or {}, text_kwargs or {}
        if {"dtype", "torch_dtype"} & {*vision_kwargs, *text_kwargs}:
            raise ValueError("vision_kwargs and text_kwargs: a dtype is that of the whole model, give it as dtype=.")
        vision_model, image_pooling = load_image_tower(
            vision_model_name_or_path, vision_kwargs, config_kwargs.get("image_pooling")
        )
        text_model, text_pooling = load_text_tower(
            text_model_name_or_path, text_kwargs, config_kwargs.get("text_pooling")
        )
        config_kwargs |= {"image_pooling": image_pooling, "text_pooling": text_pooling}
        head = None
        if keep_vision_projection:
            head = pretrained_head(vision_model_name_or_path, vision_kwargs.get("revision"))
            head_dim = len(head["weight"])
            projection_dim = config_kwargs.setdefault("projection_dim", head_dim)
            if projection_dim != head_dim or config_kwargs.get("projection_hidden_dim") is not None:
                raise ValueError(
                    f"keep_vision_projection: the head of {vision_model_name_or_path} is linear, to {head_dim} "
                    f"dimensions; leave projection_dim (now {projection_dim}) and projection_hidden_dim out."
                )
        forget_origin(vision_model.config, text_model.config)
        # Copies: a new composite config resets the attention implementation of the parts it is given.
        parts = {"vision_config": copy.deepcopy(vision_model.config), "text_config": copy.deepcopy(text_model.config)}
        config = GapClosedClipConfig(**parts, **config_kwargs)
        model = cls(config, vision_model=vision_model, text_model=text_model, modality_towers=modality_towers)
        if head is not None:
            model.visual_projection.load_state_dict(head)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_clip(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, allow_pickle: bool = False, **config_kwargs
    ) -> "GapClosedClipModel":
        """
        Starts from a whole CLIP of transformers (CLIP, SigLIP, ChineseCLIP, a VisionTextDualEncoder, ...) or open_clip
        (BiomedCLIP, ...). Before it is trained, its embeddings are those of the source.

        Args:
            name_or_path: folder or Hub id.
            revision: of a Hub id.
            allow_pickle: whether pickled weights may be read, by `torch.load(weights_only=True)`.
            config_kwargs: fields of [`GapClosedClipConfig`], e.g. the weights of the objective.

        Raises:
            ImportError: the package is not installed; a model folder's own code is not enough.
            OSError, ValueError: as `gap_closed_clip.from_clip`, which gives the processor as well.
        """
        # Not an import statement: the code beside the weights runs without the package, and transformers looks for
        # what it imports.
        return import_module("gap_closed_clip").from_clip(name_or_path, revision, allow_pickle, **config_kwargs)[0]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        As `PreTrainedModel.save_pretrained`. The code is written beside the weights, so that the folder loads where
        this package is not installed, with `trust_remote_code=True`.
        """
        config: Any = self.config  # type: ignore[has-type]
        describe_code(config, self)
        if config.decoder_config is not None:
            # A captioner shares its configuration with the encoder inside it, which is saved without a decoder.
            self.config = copy.deepcopy(config)
            self.config.decoder_config = None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config = config

    @_announce_loss
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        group_ids: Tensor | None = None,
        pooled_text: Tensor | None = None,
        pooled_image: Tensor | None = None,
        micro_batches: MicroBatches | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        modality_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        **kwargs,
    ) -> GapClosedClipOutput:
        """
        Embeds images, texts, other modalities, or several of them; with several of the same number, the loss as well.

        Args:
            pixel_values: (B, 3, height, width).
            input_ids, attention_mask, token_type_ids, position_ids: (C, length).
            group_ids: integers, (B,) or (B, G): samples that agree in any column (one image, one caption) are not
                negatives of one another.
            pooled_text, pooled_image: (C, hidden) and (B, hidden), instead of `input_ids` and `pixel_values`; see
                `get_text_features` and `get_image_features`.
            micro_batches: one large batch in parts ([`MicroBatches`] of the inputs above), instead of all of them.
                Same embeddings, loss and gradients; the activations are those of one part at a time.
            return_loss: by default there is a loss where there are as many of each modality. In training, and with
                True, numbers that differ are an error; otherwise the loss is left out.
            output_attentions: of the towers; timm's have none to give.
            output_hidden_states: of both towers; indices instead of True leave None in the place of the other states.
            modality_mask: (B, M) bool, in the order of `config.modality_names`: False where a sample lacks a modality.
                Its row of the inputs is a placeholder; its embedding is a row of zeros, without a part in the loss.
            modality_ids: (B, M) integers, in the same order: samples that agree in a modality's column (equal records)
                are not negatives of one another where that modality is compared.
            kwargs: inputs of further modalities, each tensor named after the modality and its tower's input, such as
                `record_numbers` or `audio_input_values`; or `pooled_NAME`, what `encode` gave before.

        Raises:
            ValueError: nothing to embed; in training or with `return_loss=True`, numbers of samples that differ; with
                `return_loss=True`, one modality alone; a `modality_mask` of another shape.
        """
        names = self.config.modality_names
        if micro_batches is not None:
            micro_batches, shared = micro_batches.pop("group_ids", "modality_mask", "modality_ids")
            group_ids, modality_mask, modality_ids = map(shared.get, ("group_ids", "modality_mask", "modality_ids"))
            if modality_mask is not None:
                modality_mask = modality_mask.to(self.logit_scale.device)
            embeds = self._embed_micro_batches(micro_batches, modality_mask)
            return self._output(embeds, return_loss, group_ids, modality_mask, modality_ids)
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        pooled = {"pooled_image": pooled_image, "pooled_text": pooled_text}
        images = {"pixel_values": pixel_values, "position_ids": position_ids}
        given = inputs_by_modality(names, {**kwargs, **images, **tokens, **pooled})
        if not given:
            further = "".join(f", {name}_..." for name in self.config.modalities)
            remedy = "inputs of one modality or more" if further else "images, texts, or both"
            raise ValueError(f"forward got none of pixel_values, input_ids{further}: give {remedy}.")
        _warn_of_unknown(kwargs, names)
        masks = self._masks(modality_mask)
        features, embeds = {}, {}
        for name, inputs in given.items():
            if name in IMAGE_AND_TEXT and "pooled" not in inputs:
                # A timm tower takes no such argument.
                attentions = None if is_timm(self.parts(name).tower) else output_attentions
                inputs |= {"output_attentions": attentions, "output_hidden_states": output_hidden_states}
            features[name] = self.get_features(name, masks.get(name), return_dict=True, **inputs)
            embeds[name] = _unit_rows(features[name].pooler_output, masks.get(name))  # (B, D)
        return self._output(embeds, return_loss, group_ids, modality_mask, modality_ids, features)

    def _masks(self, modality_mask: Tensor | None) -> dict[str, Tensor]:
        """The columns (B,) of a mask (B, M) by the modality's name; empty without one."""
        names = self.config.modality_names
        if modality_mask is None:
            return {}
        if modality_mask.ndim != 2 or modality_mask.shape[1] != len(names):
            raise ValueError(
                f"modality_mask has the shape {tuple(modality_mask.shape)}: it is (B, {len(names)}), a column for "
                f"each of {', '.join(names)}."
            )
        return dict(zip(names, modality_mask.bool().T, strict=True))

    def _embed_micro_batches(self, micro_batches: MicroBatches, modality_mask: Tensor | None) -> dict[str, Tensor]:
        """Unit vectors (B, D) of each modality of all micro-batches together."""
        names = list(inputs_by_modality(self.config.modality_names, micro_batches.batches[0]))
        if len(names) < 2:
            held = ", ".join(micro_batches.batches[0])
            raise ValueError(f"micro_batches hold {held}: give both pixel_values and input_ids.")

        def encode(**inputs: Tensor) -> tuple[Tensor, ...]:
            given = inputs_by_modality(names, inputs)
            return tuple(self.project(name, **given[name]).pooler_output for name in names)

        features = encode_in_micro_batches(encode, micro_batches, self.logit_scale.device)
        masks = self._masks(modality_mask)
        # Centered by the mean of the whole batch, not of a part.
        return {
            name: _unit_rows(self.place(name, projected, masks.get(name)), masks.get(name))
            for name, projected in zip(names, features, strict=True)
        }

    def _output(
        self,
        embeds: dict[str, Tensor],
        return_loss: bool | None,
        group_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        features: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> GapClosedClipOutput:
        """The output for unit vectors (B, D) by modality, and the towers' outputs."""
        comparison: dict[str, Tensor] = {}
        features = features or {}
        if len(embeds) > 1:
            first = next(iter(embeds.values()))
            embeds = {name: z.to(first.device) for name, z in embeds.items()}  # device_map may have parted the towers
            comparison = self._compare(embeds, group_ids, return_loss, modality_mask, modality_ids)
        elif return_loss:
            raise ValueError(
                f"return_loss=True with {next(iter(embeds))}s alone: the loss compares "
                f"{'modalities, give two or more' if self.config.modalities else 'images with texts, give both'}."
            )
        further = [name for name in self.config.modalities or {} if name in embeds]
        return GapClosedClipOutput(
            **comparison,
            image_embeds=embeds.get("image"),
            text_embeds=embeds.get("text"),
            further_embeds={name: embeds[name] for name in further} or None,
            group_ids=group_ids,
            modality_mask=modality_mask,
            vision_model_output=features.get("image"),
            text_model_output=features.get("text"),
            further_outputs={name: features[name] for name in further if name in features} or None,
        )


def _warn_of_unknown(kwargs: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Says once which tensors have no tower: transformers hands on all kinds of things, so they are no error."""
    begins = tuple(f"{name}_" for name in names[2:]) + tuple(f"pooled_{name}" for name in names)
    unknown = [key for key, value in kwargs.items() if isinstance(value, Tensor) and not key.startswith(begins)]
    if unknown and not torch.compiler.is_compiling():
        logger.warning_once(
            f"forward makes nothing of {', '.join(unknown)}: the model has the modalities {', '.join(names)}."
        )


def _unit_rows(features: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (B, D) at unit length; zeros, whatever stands there, where a sample lacks the modality."""
    if mask is not None:
        features = torch.where(mask.to(features.device).unsqueeze(-1), features, 0.0)
    return unit_vectors(features)


# Saving puts the code beside the weights.
GapClosedClipModel.register_for_auto_class("AutoModel")

__all__ = ["GapClosedClipModel", "GapClosedClipOutput"]
