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
        self.config, self.patch_dim = config, patch_dim
        self.embedding_projection = nn.Linear(config.projection_dim, config.decoder_embedding_tokens * hidden)
        self.embedding_norm = nn.LayerNorm(hidden)
        self.patch_projection: nn.Linear | None = None
        self.patch_norm: nn.LayerNorm | None = None
        if config.decoder_memory == "patches_and_embedding":
            self.patch_projection, self.patch_norm = nn.Linear(patch_dim, hidden), nn.LayerNorm(hidden)
        self.register_buffer("image_shift", torch.zeros(config.projection_dim))

    def forward(self, embeds: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B, D) unit vectors and (B, P, patch_dim) -> (B, tokens + P, hidden)."""
        if self.training and (noise := self.config.embedding_noise):
            embeds = unit_vectors(embeds + torch.randn_like(embeds) * noise / math.sqrt(embeds.shape[-1]))
        # The entries of a unit vector are small. They are scaled to a variance of 1, which a projection expects.
        embeds = (embeds * math.sqrt(embeds.shape[-1])).to(self.embedding_projection.weight.dtype)
        memory = self.embedding_projection(embeds).unflatten(-1, (-1, self.embedding_norm.weight.shape[0]))
        memory = self.embedding_norm(memory)
        if self.patch_projection is None or self.patch_norm is None:
            return memory
        assert patches is not None  # `encode` has seen to it
        patches = self.patch_projection(patches.to(self.patch_projection.weight.dtype))
        return torch.cat([memory, self.patch_norm(patches)], dim=1)


def tokens_of_map(features: Tensor, width: int) -> Tensor:
    """
    (B, P, width): an image tower's tokens as they are, or the places of a convolutional network's map, which has its
    channels first or last.
    """
    if features.ndim != 4:
        return features
    return features.flatten(2).transpose(1, 2) if features.shape[1] == width else features.flatten(1, 2)


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
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        The decoder's memory (B, M, hidden), and the unit vectors (B, D) that it is made of.

        Args:
            pixel_values: (B, 3, height, width).
            shared_embeds: (B, D), unit vectors of the shared space, of texts or of whatever was embedded in it;
                instead of images, where the decoder's memory is the embedding.
            image_tokens: (B, P, patch_dim), with the images' `shared_embeds` instead of the images, where the memory
                has their patches: what `encode_image` gave before, so that frozen encoders need not run again.

        Raises:
            ValueError: neither images nor embeddings, or no images where the decoder's memory has their patches.
        """
        self._check_sources(pixel_values, shared_embeds, image_tokens)
        if pixel_values is not None:
            shared_embeds, image_tokens = self.encode_image(pixel_values)
        assert shared_embeds is not None
        if image_tokens is None:
            return self.memory(shared_embeds), shared_embeds
        return self._memory_of_images(shared_embeds, image_tokens), shared_embeds

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """
        What the encoders give for images (B, 3, height, width): unit vectors (B, D) of the shared space, and the image
        tower's tokens (B, P, patch_dim). `encode`, `forward` and `generate` take them as `shared_embeds` and
        `image_tokens`.
        """
        return self._embeds_and_tokens(self.gap_closed_clip.get_image_features(pixel_values, return_dict=True))

    def _embeds_and_tokens(self, image_features: ModelOutput) -> tuple[Tensor, Tensor]:
        """As from `encode_image`, of the image features that the encoder gives."""
        tokens = tokens_of_map(image_features.last_hidden_state, self.memory.patch_dim)
        return unit_vectors(image_features.pooler_output), tokens

    def _memory_of_images(self, embeds: Tensor, tokens: Tensor) -> Tensor:
        return self.memory(unit_vectors(embeds + self.memory.image_shift), tokens)

    def _encode_for_training(
        self,
        labels: Tensor | None,
        pixel_values: Tensor | None,
        shared_embeds: Tensor | None,
        image_tokens: Tensor | None,
        group_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `encode` gives, and the objective of images and captions in the space where the config asks for it."""
        if labels is None or not self.config.caption_objective_weight:
            return *self.encode(pixel_values, shared_embeds, image_tokens), None
        input_ids, attention_mask = tokens_of_labels(labels, self.decoder.config.pad_token_id)
        encoded = self.gap_closed_clip(
            pixel_values, input_ids=input_ids, attention_mask=attention_mask, group_ids=group_ids, return_dict=True
        )
        if encoded.loss is None:
            raise ValueError(
                "caption_objective_weight is above 0, which compares images with captions, and there is no image: "
                "give pixel_values."
            )
        embeds, tokens = self._embeds_and_tokens(encoded.vision_model_output)
        return self._memory_of_images(embeds, tokens), embeds, encoded.loss

    def _check_sources(
        self, pixel_values: Tensor | None, shared_embeds: Tensor | None, image_tokens: Tensor | None
    ) -> None:
        """
        Raises:
            ValueError: as `encode`.
        """
        of_patches = self.config.decoder_memory != "embedding"
        if pixel_values is None and image_tokens is None and of_patches:
            raise ValueError(
                "The decoder attends to an image's patches, and there is no image: give pixel_values. "
                '(A decoder with config.decoder_memory="embedding" takes shared_embeds, too.)'
            )
        if image_tokens is not None and (pixel_values is not None or shared_embeds is None or not of_patches):
            raise ValueError(
                "image_tokens stand in for images together with their shared_embeds, both as encode_image gives them, "
                'and a decoder with config.decoder_memory="embedding" takes shared_embeds alone: leave out what is '
                "too much."
            )
        if shared_embeds is not None and shared_embeds.shape[1:] != (dim := self.config.projection_dim,):
            raise ValueError(f"shared_embeds has the shape {tuple(shared_embeds.shape)}: give a tensor (B, {dim}).")
        if (pixel_values is None) == (shared_embeds is None):
            raise ValueError("Give images as pixel_values, or embeddings as shared_embeds: one of them.")


__all__ = ["CaptionEncodingMixin", "CaptionMemory", "tokens_of_map"]
