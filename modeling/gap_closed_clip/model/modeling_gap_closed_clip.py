"""[`GapClosedClipModel`]: an image tower and a text tower in one space, with the loss that closes the gap."""

import copy
import inspect
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_gap_closed_clip import GapClosedClipConfig
from .encoding_gap_closed_clip import GapClosedClipTowers
from .losses_gap_closed_clip import TILED_FROM, GapClosedLoss, gap_closed_loss, scheduled_weight, unit_vectors
from .micro_batches_gap_closed_clip import MicroBatches, encode_in_micro_batches
from .outputs_gap_closed_clip import GapClosedClipOutput
from .projection_gap_closed_clip import Temperature
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


class GapClosedClipModel(GapClosedClipTowers):
    """
    Image and text embeddings that share one space.

    Towers, projections to D dimensions, optionally centered, unit vectors; the loss of arXiv 2602.20046 inside
    `forward`.

    Args:
        config ([`GapClosedClipConfig`]): the architecture and the objective.
        vision_model, text_model: towers to use instead of newly initialised ones.
    """

    # A captioner's folder loads as the encoder inside it.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^memory\."]

    def __init__(
        self,
        config: GapClosedClipConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config, vision_model, text_model)
        self.temperature = Temperature(config)
        # Saved with the model, so that a reloaded checkpoint evaluates its loss with the weights it was trained with.
        self.register_buffer("training_progress", torch.zeros(()))
        self._progress_is_set = False
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedConfig,
        text_model_name_or_path: str | PreTrainedConfig,
        keep_vision_projection: bool = False,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
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
            vision_kwargs, text_kwargs: handed to the towers' `from_pretrained` (`dtype`, `revision`, `model_args`,
                ...).
            config_kwargs: fields of [`GapClosedClipConfig`]. By default `image_pooling` and `text_pooling` are what
                the towers were trained with, where they tell.

        Raises:
            OSError: a tower that can't be found or downloaded.
            ValueError: a model that is no such tower, a pooling that it doesn't have, or `keep_vision_projection`
                where there is no fitting head.
        """
        vision_kwargs, text_kwargs = vision_kwargs or {}, text_kwargs or {}
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
        model = cls(config, vision_model=vision_model, text_model=text_model)
        if head is not None:
            model.visual_projection.load_state_dict(head)
        return model

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

    @property
    def logit_scale(self) -> Tensor:
        """
        (1,): the log of the scale; the parameter in use, also where an adapter has its own. Setting it to a number or
        a tensor of one, as another CLIP has it, fills the parameter.
        """
        return self.temperature.logit_scale

    @logit_scale.setter
    def logit_scale(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value)
        if value.numel() != 1:
            raise ValueError(
                f"logit_scale has the shape {tuple(value.shape)}: it is one number, the log of the scale."
            )
        with torch.no_grad():
            self.temperature.logit_scale.copy_(value.reshape(1))

    def set_training_progress(self, progress: float) -> None:
        """Tells scheduled weights which fraction of training, 0 to 1, is done."""
        self.training_progress.fill_(progress)
        self._progress_is_set = True

    def objective_weights(self) -> dict[str, float | Tensor]:
        """The three weights at the present training progress; scheduled ones as scalar tensors."""
        names = ("contrastive_weight", "align_weight", "uniformity_weight")
        # .float(): a progress in bfloat16 moves in steps of 1/256
        return {name: scheduled_weight(getattr(self.config, name), self.training_progress.float()) for name in names}

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
        **kwargs,
    ) -> GapClosedClipOutput:
        """
        Embeds images, texts, or both; with both of the same number, the loss as well.

        Args:
            pixel_values: (B, 3, height, width).
            input_ids, attention_mask, token_type_ids, position_ids: (C, length).
            group_ids: integers, (B,) or (B, G): pairs that agree in any column (one image, one caption) are not
                negatives of one another.
            pooled_text, pooled_image: (C, hidden) and (B, hidden), instead of `input_ids` and `pixel_values`; see
                `get_text_features` and `get_image_features`.
            micro_batches: one large batch in parts ([`MicroBatches`] of the inputs above), instead of all of them.
                Same embeddings, loss and gradients; the activations are those of one part at a time.
            return_loss: by default there is a loss where there are as many images as texts. In training, and with
                True, numbers that differ are an error; otherwise the loss is left out.
            output_attentions: of the towers; timm's have none to give.
            output_hidden_states: of both towers; indices instead of True leave None in the place of the other states.

        Raises:
            ValueError: neither images nor texts; in training or with `return_loss=True`, numbers of images and texts
                that differ; with `return_loss=True`, one of the two alone.
        """
        if micro_batches is not None:
            micro_batches, group_ids = micro_batches.pop_group_ids()
            return self._output(*self._embed_micro_batches(micro_batches), group_ids, return_loss)
        has_text = input_ids is not None or pooled_text is not None
        has_images = pixel_values is not None or pooled_image is not None
        if not has_images and not has_text:
            raise ValueError("forward got neither pixel_values nor input_ids: give images, texts, or both.")
        image_features = text_features = image_embeds = text_embeds = None
        if has_images:
            image_features = self.get_image_features(
                pixel_values,
                pooled_image,
                output_attentions=None if is_timm(self.vision_model) else output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
            image_embeds = unit_vectors(image_features.pooler_output)  # (B, D)
        if has_text:
            tokens = (input_ids, attention_mask, token_type_ids, position_ids)
            text_features = self.get_text_features(
                *tokens,
                pooled_text,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
            text_embeds = unit_vectors(text_features.pooler_output)  # (C, D)
        outputs = {"vision_model_output": image_features, "text_model_output": text_features}
        return self._output(image_embeds, text_embeds, group_ids, return_loss, **outputs)

    def compute_loss(self, embeddings: list[Tensor], group_ids: Tensor | None = None) -> GapClosedLoss:
        """
        The objective (arXiv 2602.20046), with this model's temperature and its weights at the present training
        progress. In training under several processes it is that of the global batch, with exact gradients under
        DistributedDataParallel.

        Args:
            embeddings: M >= 2 modalities, each (B, D) on the unit sphere; the first is the anchor.
            group_ids: (B,) or (B, G); ignored where `config.mask_groups` is off.
        """
        self._warn_of_standing_schedule()
        if not self.config.mask_groups:
            group_ids = None
        scale = self.temperature().to(embeddings[0].device)
        weights: dict[str, Any] = {**self.objective_weights(), "across_processes": self.training}
        return gap_closed_loss(embeddings, scale, group_ids, **weights)

    def _embed_micro_batches(self, micro_batches: MicroBatches) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of the images and the texts of all micro-batches together."""
        names = micro_batches.batches[0].keys()
        if not {"pixel_values", "pooled_image"} & names or not {"input_ids", "pooled_text"} & names:
            raise ValueError(f"micro_batches hold {', '.join(names)}: give both pixel_values and input_ids.")

        def encode(
            pixel_values: Tensor | None = None, pooled_image: Tensor | None = None, **text
        ) -> tuple[Tensor, Tensor]:
            images, texts = self._project_images(pixel_values, pooled_image), self._project_texts(**text)
            return images.pooler_output, texts.pooler_output

        image_features, text_features = encode_in_micro_batches(encode, micro_batches, self.logit_scale.device)
        # Centered by the mean of the whole batch, not of a part.
        return unit_vectors(self._place_images(image_features)), unit_vectors(self._place_texts(text_features))

    def _output(
        self,
        image_embeds: Tensor | None,
        text_embeds: Tensor | None,
        group_ids: Tensor | None,
        return_loss: bool | None,
        **tower_outputs: BaseModelOutputWithPooling | None,
    ) -> GapClosedClipOutput:
        """The output for unit vectors (B, D) and (C, D) or, where there is one modality alone, None."""
        comparison: dict[str, Tensor] = {}
        if image_embeds is not None and text_embeds is not None:
            text_embeds = text_embeds.to(image_embeds.device)  # device_map may have parted the towers
            comparison = self._compare(image_embeds, text_embeds, group_ids, return_loss)
        elif return_loss:
            given = "texts" if image_embeds is None else "images"
            raise ValueError(f"return_loss=True with {given} alone: the loss compares images with texts, give both.")
        return GapClosedClipOutput(
            **comparison, image_embeds=image_embeds, text_embeds=text_embeds, group_ids=group_ids, **tower_outputs
        )

    def _compare(
        self, image_embeds: Tensor, text_embeds: Tensor, group_ids: Tensor | None, return_loss: bool | None
    ) -> dict[str, Tensor]:
        """Logits and, where there is one, the loss with its terms, as fields of the output."""
        losses = {}
        if return_loss is not False and self._are_pairs(image_embeds, text_embeds, required=bool(return_loss)):
            losses = self.compute_loss([image_embeds, text_embeds], group_ids)._asdict()
        if self.training and losses and len(image_embeds) >= TILED_FROM:
            return losses  # without the N x N matrix, which the loss does without
        with torch.autocast(text_embeds.device.type, enabled=False):
            logits = (
                self.temperature().to(text_embeds) * image_embeds @ text_embeds.T + self.config.logit_bias
            )  # (B, C)
        return {**losses, "logits_per_image": logits, "logits_per_text": logits.T}

    def _are_pairs(self, image_embeds: Tensor, text_embeds: Tensor, required: bool) -> bool:
        """Whether there are as many images as texts. In training, or if required, others are a ValueError."""
        if len(image_embeds) == len(text_embeds):
            return True
        if self.training:
            raise ValueError(
                f"{len(image_embeds)} images and {len(text_embeds)} texts: in training every image needs its text, "
                "row by row."
            )
        if required:
            raise ValueError(
                f"return_loss=True with {len(image_embeds)} images and {len(text_embeds)} texts: the loss is of "
                "pairs, row by row. Leave return_loss out to get embeddings and logits alone."
            )
        return False

    def _warn_of_standing_schedule(self) -> None:
        weights = (self.config.contrastive_weight, self.config.align_weight, self.config.uniformity_weight)
        scheduled = any(isinstance(weight, list | tuple) for weight in weights)
        if self.training and scheduled and not self._progress_is_set and not torch.compiler.is_compiling():
            logger.warning_once(
                "A weight of the objective follows a schedule, but nothing tells the model how far training is: it "
                f"stays at progress {float(self.training_progress):g}. Give the Trainer "
                "gap_closed_clip.training.TrainingProgressCallback(), or call model.set_training_progress(fraction) "
                "before every step."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GapClosedClipModel):
            init.zeros_(module.training_progress)


# Saving puts the code beside the weights.
GapClosedClipModel.register_for_auto_class("AutoModel")

__all__ = ["GapClosedClipModel", "GapClosedClipOutput"]
