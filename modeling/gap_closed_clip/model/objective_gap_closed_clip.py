"""[`GapClosedClipObjective`]: what trains the towers: the loss, its scheduled weights and the temperature."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .configuration_checks_gap_closed_clip import WEIGHTS
from .configuration_gap_closed_clip import GapClosedClipConfig
from .distributed_gap_closed_clip import world_size
from .encoding_gap_closed_clip import GapClosedClipTowers
from .losses_gap_closed_clip import (
    FURTHER_TERMS,
    TILED_FROM,
    FurtherGapClosedLoss,
    GapClosedLoss,
    gap_closed_loss,
    is_zero,
    scheduled_weight,
)
from .modalities_gap_closed_clip import IMAGE_AND_TEXT, pairs_of
from .projection_gap_closed_clip import Temperature


logger = logging.get_logger(__name__)


class GapClosedClipObjective(GapClosedClipTowers):
    """
    The part of [`GapClosedClipModel`] that compares what [`GapClosedClipTowers`] has encoded. Arguments are the
    model's.
    """

    def __init__(
        self,
        config: GapClosedClipConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
        modality_towers: Mapping[str, PreTrainedModel] | None = None,
    ):
        super().__init__(config, vision_model, text_model, modality_towers)
        self.temperature = Temperature(config)
        # Saved with the model, so that a reloaded checkpoint evaluates its loss with the weights it was trained with.
        self.register_buffer("training_progress", torch.zeros(()))
        self._progress_is_set = False
        self.post_init()

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

    @property
    def logit_bias(self) -> Tensor | float:
        """
        What is added to the logits: with the sigmoid loss the parameter in use, (1,), also where an adapter has its
        own; with the softmax a number, that of the configuration.
        """
        learned = self.temperature.logit_bias
        return self.config.logit_bias if learned is None else learned

    def set_training_progress(self, progress: float) -> None:
        """Tells scheduled weights which fraction of training, 0 to 1, is done."""
        self.training_progress.fill_(progress)
        self._progress_is_set = True

    def objective_weights(self) -> dict[str, float | Tensor]:
        """
        The weights of the terms at the present training progress; scheduled ones as scalar tensors. Further terms
        (`FURTHER_TERMS`) have one where it is not the number 0.
        """
        further = [f"{term}_weight" for term in FURTHER_TERMS]
        weights = {name: getattr(self.config, name) for name in WEIGHTS}
        # .float(): a progress in bfloat16 moves in steps of 1/256
        progress = self.training_progress.float()
        used = {name: weight for name, weight in weights.items() if name not in further or not is_zero(weight)}
        return {name: scheduled_weight(weight, progress) for name, weight in used.items()}

    def compute_loss(
        self,
        embeddings: list[Tensor] | dict[str, Tensor],
        group_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
    ) -> GapClosedLoss | FurtherGapClosedLoss:
        """
        The objective (arXiv 2602.20046), with this model's temperature and its weights at the present training
        progress. In training under several processes it is that of the global batch, with exact gradients under
        DistributedDataParallel.

        Args:
            embeddings: M >= 2 modalities, each (B, D) on the unit sphere: by name, or a list whose first is the
                anchor.
            group_ids: (B,) or (B, G); ignored where `config.mask_groups` is off.
            modality_mask: (B, M) bool, a column for each of the embeddings: which a sample has.
            modality_ids: (B, M), as in `gap_closed_loss`; ignored where `config.mask_groups` is off.

        Raises:
            ValueError: as `gap_closed_loss`; `config.contrastive_loss` is not what the model was built for.
        """
        self._warn_of_standing_schedule()
        if not self.config.mask_groups:
            group_ids = modality_ids = None
        weights: dict[str, Any] = {**self.objective_weights(), "across_processes": self.training}
        if isinstance(embeddings, dict):
            weights["pairs"] = pairs_of(list(embeddings), self.config.anchor)
            embeddings = list(embeddings.values())
        weights["logit_bias"] = self._bias_of_loss()
        scale = self.temperature().to(embeddings[0].device)
        return gap_closed_loss(
            embeddings, scale, group_ids, modality_mask=modality_mask, modality_ids=modality_ids, **weights
        )

    def _bias_of_loss(self) -> Tensor | None:
        """The bias of the sigmoid loss; None with the softmax."""
        bias, kind = self.temperature.logit_bias, self.config.contrastive_loss
        if (bias is not None) != (kind == "sigmoid"):
            raise ValueError(
                f"contrastive_loss is {kind!r}, and the model was built for another: give it when the model is made, "
                f"as in from_pretrained(..., contrastive_loss={kind!r})."
            )
        return bias

    def _compare(
        self,
        embeds: dict[str, Tensor],
        group_ids: Tensor | None,
        return_loss: bool | None,
        modality_mask: Tensor | None,
        modality_ids: Tensor | None,
    ) -> dict[str, Tensor]:
        """Logits and, where there is one, the loss with its terms, as fields of the output."""
        losses = {}
        if return_loss is not False and self._are_pairs(embeds, required=bool(return_loss)):
            columns = [self.config.modality_names.index(name) for name in embeds]
            if modality_mask is not None:
                modality_mask = modality_mask[:, columns].to(next(iter(embeds.values())).device).bool()
            if modality_ids is not None:
                modality_ids = modality_ids[:, columns]
            losses = self.compute_loss(embeds, group_ids, modality_mask, modality_ids)._asdict()
            self._warn_of_one_pair(embeds)
        if not set(IMAGE_AND_TEXT) <= set(embeds):
            return losses
        image_embeds, text_embeds = embeds["image"], embeds["text"]
        if self.training and losses and len(image_embeds) >= TILED_FROM:
            return losses  # without the N x N matrix, which the loss does without
        with torch.autocast(text_embeds.device.type, enabled=False):
            bias = self.logit_bias if isinstance(self.logit_bias, float | int) else self.logit_bias.to(text_embeds)
            logits = self.temperature().to(text_embeds) * image_embeds @ text_embeds.T + bias  # (B, C)
        return {**losses, "logits_per_image": logits, "logits_per_text": logits.T}

    def _are_pairs(self, embeds: dict[str, Tensor], required: bool) -> bool:
        """Whether there are as many of each modality. In training, or if required, others are a ValueError."""
        rows = [z.shape[0] for z in embeds.values()]  # under torch.export symbols, of which len() makes numbers
        if all(number == rows[0] for number in rows):
            return True
        if not (self.training or required):
            return False
        numbers = " and ".join(f"{len(z)} {name}s" for name, z in embeds.items())
        if self.training:
            raise ValueError(
                f"{numbers}: in training every image needs its text, row by row, and so does every other modality."
            )
        raise ValueError(
            f"return_loss=True with {numbers}: the loss is of pairs, row by row. Leave return_loss out to get "
            "embeddings and logits alone."
        )

    def _warn_of_one_pair(self, embeds: dict[str, Tensor]) -> None:
        alone = self.training and world_size() == 1 and len(next(iter(embeds.values()))) == 1
        if alone and not torch.compiler.is_compiling():
            logger.warning_once(
                "A training batch has one pair, which nothing can be told apart from: its contrastive loss is 0. Use "
                "batches of 2 or more (gradient accumulation makes none), and dataloader_drop_last=True."
            )

    def _warn_of_standing_schedule(self) -> None:
        scheduled = any(isinstance(getattr(self.config, name), list | tuple) for name in WEIGHTS)
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
        if isinstance(module, GapClosedClipObjective):
            init.zeros_(module.training_progress)


__all__ = ["GapClosedClipObjective"]
