"""The Trainer, with what pairs need: batches without repeats, scheduled weights, and an eye on the space."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..data import DistinctSampler, OneSourceSampler, group_ids_of, sources_of
from ..model.micro_batches_gap_closed_clip import MicroBatches
from .argument_checks import check_batch_size, check_order
from .checked_trainer import CheckedTrainer
from .diagnostics import RunningMeans, batch_diagnostics, warning_of


logger = logging.get_logger(__name__)


class TrainingProgressCallback(TrainerCallback):
    """Tells the model which fraction of training is done, for weights of the objective that follow a schedule."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_training_progress(state.global_step / max(state.max_steps, 1))


class _First(Sampler[int]):
    """The first `number` rows of another sampler's order, which is a new one in each epoch."""

    def __init__(self, sampler: Sampler[int], number: int):
        self.sampler, self.number = sampler, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return islice(self.sampler, self.number)


class _SamplerEpochCallback(TrainerCallback):
    """accelerate hands the epoch on to a sampler except where it has wrapped it thrice (resuming, many processes)."""

    def __init__(self, sampler: DistinctSampler | OneSourceSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class GapClosedClipTrainer(CheckedTrainer):
    """
    transformers' `Trainer`; a plain one trains the model too. This one adds:

    - `contrastive_batch_size` of the arguments: any number of pairs compared in one step, encoded in micro-batches;
    - scheduled weights follow the training's progress ([`TrainingProgressCallback`]);
    - pairs that share an image or a caption are kept out of one batch (`distinct_batches` of the arguments), and pairs
      of different sources, if that is asked for (`mix_sources`);
    - the log tells each term and its weight, the scale, gap, true-pair and random-pair cosine of each two modalities
      and the mean cosine inside each, averaged over the logged steps, with a warning where the space collapses or
      scatters;
    - the first step fails where a trainable parameter gets no gradient, a dead adapter for one;
    - a step whose loss or gradient is NaN or infinite stops the run before it reaches the weights, or is passed over
      (`skip_broken_steps` of the arguments);
    - evaluation keeps its last batch where training drops it, and vectors and scalars are not decayed.
    """

    _accumulated: int | None = None  # steps of accumulation that stand for micro-batches

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_batch_size(self.args)
        check_order(self.args)
        self._prepare_micro_batches()
        self.add_callback(TrainingProgressCallback())
        self._means = RunningMeans()
        self._warned = False
        steps = self.args.gradient_accumulation_steps
        if self.args.contrastive_batch_size is None and steps > 1:
            batch = self.args.global_batch_size
            logger.warning(
                f"gradient_accumulation_steps={steps} adds up the gradients of {steps} batches of {batch}: every pair "
                f"is compared with the {batch - 1} others of its own batch only, so it adds no negatives. For a "
                f"contrastive batch of {steps * batch} set contrastive_batch_size={steps * batch} instead."
            )

    def _prepare_micro_batches(self) -> None:
        # To the Trainer micro-batches are those of an accumulated step: it counts steps and epochs by them. Sizes may
        # be others in the next training, as where hyperparameters are searched for.
        args = self.args
        self._micro_batches: list[dict[str, Tensor]] = []
        if args.gradient_accumulation_steps == self._accumulated:
            args.gradient_accumulation_steps = 1
        self._accumulated = None
        if args.contrastive_batch_size is not None:
            args.gradient_accumulation_steps = self._accumulated = args.num_micro_batches

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        self._means, self._warned = RunningMeans(), False  # of an earlier training
        return super()._init_training_state(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        if self.args.num_micro_batches == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # A stream that ended in the middle of a step has left some behind.
        micro_batches, self._micro_batches = self._micro_batches[-self.args.num_micro_batches :], []
        self.current_gradient_accumulation_steps = 1  # the loss is that of the whole batch, no sum to be divided
        return super().training_step(model, {"micro_batches": MicroBatches(micro_batches)}, num_items_in_batch)

    def _shows_every_gradient(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        # An adapter of a modality that no sample of the batch has would be taken for a dead one.
        batches = inputs["micro_batches"] if "micro_batches" in inputs else [inputs]
        masks = [batch["modality_mask"] for batch in batches if "modality_mask" in batch]
        return not masks or bool(torch.cat([mask.any(0, keepdim=True) for mask in masks]).any(0).all())

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._means.add(batch_diagnostics(outputs))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and (means := self._means.take()):
            model = self.accelerator.unwrap_model(self.model)
            means["logit_scale"] = model.logit_scale.detach().exp().item()
            if model.config.contrastive_loss == "sigmoid":
                means["logit_bias"] = model.logit_bias.item()
            means.update({name: float(weight) for name, weight in model.objective_weights().items()})
            logs.update({name: round(value, 4) for name, value in means.items()})
            self._warn_of_collapse_and_scatter(means)
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        self._prepare_micro_batches()
        if self.args.num_micro_batches == 1 or isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # Each micro-batch goes to the device when it is encoded: together they may not fit.
        placement, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placement

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch_size, drop_last = self.args.global_batch_size, self.args.dataloader_drop_last
        if isinstance(dataset, IterableDataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler: DistinctSampler | OneSourceSampler
        sources = [] if self.args.mix_sources else sources_of(dataset)
        if sources:
            rows = range(len(dataset))
            groups = group_ids_of(dataset) if self.args.distinct_batches else list(zip(rows, rows, strict=True))
            sampler = OneSourceSampler(groups, sources, batch_size, seed=seed, drop_last=drop_last)
        elif self.args.distinct_batches:
            sampler = DistinctSampler(group_ids_of(dataset), batch_size, seed=seed, drop_last=drop_last)
        else:
            plain = super()._get_train_sampler(train_dataset)
            if not drop_last:
                return plain
            # The DataLoader would leave out an incomplete micro-batch only.
            whole = len(dataset) // batch_size * batch_size
            if isinstance(plain, RandomSampler):
                return RandomSampler(dataset, num_samples=whole)
            if isinstance(plain, LengthGroupedSampler):
                return _First(plain, whole)
            return SequentialSampler(range(whole)) if isinstance(plain, SequentialSampler) else plain
        self.remove_callback(_SamplerEpochCallback)  # of an earlier training
        self.add_callback(_SamplerEpochCallback(sampler))
        return sampler

    def _warn_of_collapse_and_scatter(self, means: dict[str, float]) -> None:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        if self._warned or progress < 0.5:
            return
        names = self.accelerator.unwrap_model(self.model).config.modality_names
        if warning := warning_of(means, names, progress):
            self._warned = True
            logger.warning(warning)


__all__ = ["GapClosedClipTrainer", "TrainingProgressCallback", "batch_diagnostics"]
