"""[`CaptionEncodingMixin`]: what a captioner's decoder attends to, of images or of embeddings of the shared space."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .caption_loss_gap_closed_clip import tokens_of_labels
from .configuration_gap_closed_clip import GapClosedClipConfig
from .losses_gap_closed_clip import unit_vectors


class CaptionMemory(nn.Module):
    """
    What the decoder attends to: an embedding of the shared space, spread over some tokens, and an image's patches.

    `image_shift` (D,) is added to image embeddings before they are read: the usual mean-shift correction of a decoder
    that was trained on text embeddings. Zero unless it is set.
    """

    image_shift: Tensor

    def __init__(self, config: GapClosedClipConfig, patch_dim: int):
        super().__init__()
        decoder_config: Any = config.decoder_config
        hidden = decoder_config.hidden_size
        self.config = config
        self.embedding_projection = nn.Linear(config.projection_dim, config.decoder_embedding_tokens * hidden)
        self.embedding_norm = nn.LayerNorm(hidden)
        self.patch_projection: nn.Linear | None = None
        self.patch_norm: nn.LayerNorm | None = None
        if config.decoder_memory == "patches_and_embedding":
            self.patch_projection, self.patch_norm = nn.Linear(patch_dim, hidden), nn.LayerNorm(hidden)
        self.register_buffer("image_shift", torch.zeros(config.projection_dim))

    def forward(self, embeds: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B, D) unit vectors and (B, P, patch_dim), or a map -> (B, tokens + P, hidden)."""
        if self.training and (noise := self.config.embedding_noise):
            embeds = unit_vectors(embeds + torch.randn_like(embeds) * noise / math.sqrt(embeds.shape[-1]))
        # The entries of a unit vector are small. They are scaled to a variance of 1, which a projection expects.
        embeds = (embeds * math.sqrt(embeds.shape[-1])).to(self.embedding_projection.weight.dtype)
        memory = self.embedding_projection(embeds).unflatten(-1, (-1, self.embedding_norm.weight.shape[0]))
        memory = self.embedding_norm(memory)
        if self.patch_projection is None or self.patch_norm is None:
            return memory
        assert patches is not None  # `encode` has seen to it
        patches = patches_of(patches, self.patch_projection.in_features)
        return torch.cat([memory, self.patch_norm(self.patch_projection(patches))], dim=1)


def patches_of(tokens: Tensor, width: int) -> Tensor:
    """(B, P, width): an image tower's tokens as they are, or a convolutional network's map, channels first or last."""
    if tokens.ndim != 4:
        return tokens
    return tokens.flatten(2).transpose(1, 2) if tokens.shape[1] == width else tokens.flatten(1, 2)


class CaptionEncodingMixin:
    """From images, or from what frozen encoders gave for them before, to the memory of a captioner's decoder."""

    config: GapClosedClipConfig
    gap_closed_clip: Any
    decoder: Any
    memory: CaptionMemory

    def set_image_shift(self, shift: Tensor | None) -> None:
        """
        The mean-shift correction of a decoder trained on text alone: (D,), mean text minus mean image embedding of the
        training pairs, added to image embeddings. None for no correction.
        """
        self.memory.image_shift.copy_(torch.zeros_like(self.memory.image_shift) if shift is None else shift)

    def encode(
        self,
        pixel_values: Tensor | None = None,
        shared_embeds: Tensor | None = None,
        pooled_image: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        The decoder's memory (B, M, hidden), and the unit vectors (B, D) that it is made of.

        Args:
            pixel_values: (B, 3, height, width).
            shared_embeds: (B, D), unit vectors of the shared space, of texts or of whatever was embedded in it;
                instead of images, where the decoder's memory is the embedding.
            pooled_image, image_tokens: `pooler_output` and `last_hidden_state` of an earlier call of
                `gap_closed_clip.encode_image`, instead of images: a frozen tower need not run again. A decoder whose
                memory is the embedding takes the first alone.

        Raises:
            ValueError: none of them, or several; no images where the decoder's memory has their patches.
        """
        self._check_sources(pixel_values, shared_embeds, pooled_image, image_tokens)
        if shared_embeds is not None:
            return self.memory(shared_embeds), shared_embeds
        features = self.gap_closed_clip.get_image_features(pixel_values, pooled_image=pooled_image, return_dict=True)
        if image_tokens is not None:
            features.last_hidden_state = image_tokens
        return self._make_memory(features)

    def _make_memory(self, image_features: ModelOutput) -> tuple[Tensor, Tensor]:
        """The decoder's memory and unit vectors, as from `encode`, of the image features that the encoder gives."""
        embeds = unit_vectors(image_features.pooler_output)  # (B, D)
        return self.memory(unit_vectors(embeds + self.memory.image_shift), image_features.last_hidden_state), embeds

    def _check_sources(
        self,
        pixel_values: Tensor | None,
        shared_embeds: Tensor | None,
        pooled_image: Tensor | None,
        image_tokens: Tensor | None,
    ) -> None:
        """
        Raises:
            ValueError: as `encode`.
        """
        of_patches = self.config.decoder_memory != "embedding"
        if (pooled_image is not None and of_patches) != (image_tokens is not None):
            raise ValueError(
                "pooled_image and image_tokens stand in for images together, pooler_output and last_hidden_state of "
                'gap_closed_clip.encode_image. (A decoder with config.decoder_memory="embedding" takes the first '
                "alone.)"
            )
        if pixel_values is None and pooled_image is None and of_patches:
            raise ValueError(
                "The decoder attends to an image's patches, and there is no image: give pixel_values. "
                '(A decoder with config.decoder_memory="embedding" takes shared_embeds, too.)'
            )
        if shared_embeds is not None and shared_embeds.shape[1:] != (dim := self.config.projection_dim,):
            raise ValueError(f"shared_embeds has the shape {tuple(shared_embeds.shape)}: give a tensor (B, {dim}).")
        if sum(given is not None for given in (pixel_values, shared_embeds, pooled_image)) != 1:
            raise ValueError(
                "Give images as pixel_values, or embeddings as shared_embeds, or pooled_image: one of them."
            )

    def _encode_for_training(
        self, labels: Tensor | None, group_ids: Tensor | None, **sources: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `encode` gives, and the objective of images and captions in the space where the config asks for it."""
        if labels is None or not self.config.caption_objective_weight:
            return *self.encode(**sources), None
        input_ids, attention_mask = tokens_of_labels(labels, self.decoder.config.pad_token_id)
        encoded = self.gap_closed_clip(
            sources["pixel_values"],
            input_ids=input_ids,
            attention_mask=attention_mask,
            group_ids=group_ids,
            return_dict=True,
        )
        if encoded.loss is None:
            raise ValueError(
                "caption_objective_weight is above 0, which compares images with captions, and there is no image: "
                "give pixel_values."
            )
        return *self._make_memory(encoded.vision_model_output), encoded.loss


__all__ = ["CaptionEncodingMixin", "CaptionMemory", "patches_of"]
