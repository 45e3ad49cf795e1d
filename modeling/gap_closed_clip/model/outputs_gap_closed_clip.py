"""[`GapClosedClipOutput`]: what [`GapClosedClipModel`] returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class GapClosedClipOutput(ModelOutput):
    """
    Output of [`GapClosedClipModel`] for B images and C texts; B = C wherever there is a loss.

    Args:
        loss (scalar): weighted sum of the terms; only with both modalities, `return_loss` and B = C.
        contrastive_loss, align_loss, uniformity_loss (scalars): the terms before weighting.
        logits_per_image (B, C): scale times cosine, plus the bias. Left out of training with large batches, where it
            would be the matrix that the loss does without.
        logits_per_text (C, B): its transpose.
        image_embeds (B, D), text_embeds (C, D): unit vectors in the shared space, float32 (float64 in a float64
            model).
        group_ids (B,) or (B, G): those given, handed on so that an evaluation loop can gather them.
        further_embeds: {name: (B, D)} of the modalities beyond image and text; None where there is none.
        modality_mask (B, M): that given, handed on too. The embedding of what a sample lacks is a row of zeros.
        vision_model_output, text_model_output: the towers' outputs, with the projected features as `pooler_output`.
        further_outputs: {name: the same} of the further modalities.
        modality_uniformity_loss, cross_uniformity_loss (scalars): further terms, where their weights are not 0.
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    align_loss: Tensor | None = None
    uniformity_loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    group_ids: Tensor | None = None
    further_embeds: dict[str, Tensor] | None = None
    modality_mask: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    further_outputs: dict[str, BaseModelOutputWithPooling] | None = None
    modality_uniformity_loss: Tensor | None = None
    cross_uniformity_loss: Tensor | None = None

    @property
    def embeds(self) -> dict[str, Tensor]:
        """The embeddings (B, D) of all modalities that were given, by name."""
        found = {"image": self.image_embeds, "text": self.text_embeds, **(self.further_embeds or {})}
        return {name: embeds for name, embeds in found.items() if embeds is not None}


__all__ = ["GapClosedClipOutput"]
