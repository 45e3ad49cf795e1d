"""The exact centering of trained projections, in place of the running means of training."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets.utils import tqdm
from torch import Tensor
from transformers import TrainerCallback

from ..evaluation.embed import evaluation_mode
from ..model.modalities_gap_closed_clip import inputs_by_modality
from ..model.modeling_gap_closed_clip import GapClosedClipModel


@torch.no_grad()
def recenter(model: GapClosedClipModel, batches: Iterable[dict[str, Tensor]]) -> None:
    """
    Sets the running means of a model's centering to the exact ones of some pairs, the training pairs as a rule, as
    inference sees them. A model without centering is left as it is, and its mode too.

    The running mean of training lags behind the weights and is that of augmented images; the exact one closes what gap
    that leaves. (As "precise" statistics do for BatchNorm: Wu and Johnson, arXiv 2105.07576, section 3.)

    Args:
        model: the encoder; under adapters `peft_model.get_base_model()`, of a captioner `captioner.gap_closed_clip`.
        batches: inputs of `model`, all modalities in each, without augmentation: a `DataLoader` of the pairs with
            `PairCollator(processor)`. Read once.

    Raises:
        ValueError: there is no batch.
    """
    if not model.config.center_projections:
        return
    names = model.config.modality_names
    sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    counts: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="Centering", leave=False):
            inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
            mask = inputs.get("modality_mask")
            for name, given in inputs_by_modality(names, inputs).items():
                # In float64: float32 would lose digits over a million pairs.
                features = model.project(name, **given).pooler_output.double()
                if mask is not None:
                    features = features[mask[:, names.index(name)].bool()]
                sums[name] += features.sum(0)
                counts[name] += len(features)
    if not any(counts.values()):
        raise ValueError("recenter: there is no batch to take the means of.")
    for name in names:
        if counts[name]:
            # .copy_ into the buffer itself: an assignment would put the tensor on what peft wraps the module in.
            centering: Any = model.parts(name).centering
            centering.running_mean.copy_(torch.as_tensor(sums[name]) / counts[name])


class RecenterCallback(TrainerCallback):
    """
    Has any `Trainer` recenter a [`GapClosedClipModel`] when training ends and, where that is asked for, before each
    evaluation and each checkpoint: what is measured and what is kept is then centered as a finished run would be.

    Args:
        batches: of `recenter`; a `DataLoader`, since it is read more than once.
        model: the encoder, where the Trainer trains something around it; default: what the Trainer trains.
        at_evaluations: also before evaluations and checkpoints. Costs a pass through all pairs each time.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, Tensor]],
        model: GapClosedClipModel | None = None,
        at_evaluations: bool = True,
    ):
        self.batches, self.model, self.at_evaluations = batches, model, at_evaluations

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.at_evaluations and (control.should_evaluate or control.should_save):
            recenter(self.model or model, self.batches)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model=model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        recenter(self.model or model, self.batches)


__all__ = ["RecenterCallback", "recenter"]
