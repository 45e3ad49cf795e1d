"""[`GapClosedClipObjective`]: what trains the towers: the loss, its scheduled weights and the temperature."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .configuration_gap_closed_clip import GapClosedClipConfig
from .encoding_gap_closed_clip import GapClosedClipTowers
from .losses_gap_closed_clip import GapClosedLoss, gap_closed_loss, scheduled_weight
from .modalities_gap_closed_clip import pairs_of
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

    def set_training_progress(self, progress: float) -> None:
        """Tells scheduled weights which fraction of training, 0 to 1, is done."""
        self.training_progress.fill_(progress)
        self._progress_is_set = True

    def objective_weights(self) -> dict[str, float | Tensor]:
        """The three weights at the present training progress; scheduled ones as scalar tensors."""
        names = ("contrastive_weight", "align_weight", "uniformity_weight")
        # .float(): a progress in bfloat16 moves in steps of 1/256
        return {name: scheduled_weight(getattr(self.config, name), self.training_progress.float()) for name in names}

    def compute_loss(
        self,
        embeddings: list[Tensor] | dict[str, Tensor],
        group_ids: Tensor | None = None,
        modality_mask: Tensor | None = None,
    ) -> GapClosedLoss:
        """
        The objective (arXiv 2602.20046), with this model's temperature and its weights at the present training
        progress. In training under several processes it is that of the global batch, with exact gradients under
        DistributedDataParallel.

        Args:
            embeddings: M >= 2 modalities, each (B, D) on the unit sphere: by name, or a list whose first is the
                anchor.
            group_ids: (B,) or (B, G); ignored where `config.mask_groups` is off.
            modality_mask: (B, M) bool, a column for each of the embeddings: which a sample has.
        """
        self._warn_of_standing_schedule()
        if not self.config.mask_groups:
            group_ids = None
        weights: dict[str, Any] = {**self.objective_weights(), "across_processes": self.training}
        if isinstance(embeddings, dict):
            weights["pairs"] = pairs_of(list(embeddings), self.config.anchor)
            embeddings = list(embeddings.values())
        scale = self.temperature().to(embeddings[0].device)
        return gap_closed_loss(embeddings, scale, group_ids, modality_mask=modality_mask, **weights)

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
        if isinstance(module, GapClosedClipObjective):
            init.zeros_(module.training_progress)


__all__ = ["GapClosedClipObjective"]
