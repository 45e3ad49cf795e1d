"""The Trainer, with what pairs need: batches without repeats, scheduled weights, and an eye on the space."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data import CaptionCollator, DistinctSampler, OneSourceSampler, PairCollator, group_ids_of, sources_of
from ..data.features import FeaturePairs
from ..disk import DiskFull, bytes_of, size_of, writing
from ..model.micro_batches_gap_closed_clip import MicroBatches
from .argument_checks import check_batch_size
from .diagnostics import RunningMeans, batch_diagnostics, warning_of
from .gradients import describe_missing, without_gradient
from .release import set_tower_learning_rate
from .resume import checkpoints
from .sound_numbers import SoundNumbers
from .streams import WholeBatches, read_by_each_process


logger = logging.get_logger(__name__)

AFTER_FULL = "The same command with resume_from_checkpoint=auto goes on from the last complete checkpoint."


class TrainingProgressCallback(TrainerCallback):
    """Tells the model which fraction of training is done, for weights of the objective that follow a schedule."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_training_progress(state.global_step / max(state.max_steps, 1))


class _SamplerEpochCallback(TrainerCallback):
    """accelerate hands the epoch on to a sampler except where it has wrapped it thrice (resuming, many processes)."""

    def __init__(self, sampler: DistinctSampler | OneSourceSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class CheckedTrainer(Trainer):
    """transformers' Trainer with what ours add to it, whatever they train."""

    # Further modalities whose towers learn at `tower_learning_rate`.
    pretrained_modalities: Collection[str] = ()
    train_dataset: Any
    _gradients_checked = False
    _numbers: SoundNumbers | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Tensor:
        """
        As transformers', with a look at the gradients of the first step, and at every step's numbers.

        Raises:
            ValueError: in the first step, a trainable parameter got no gradient; loss or gradient are NaN or infinite,
                and no more such steps may be skipped.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._is_sound(loss, model, inputs):
            return torch.zeros_like(loss)
        # (A sharded model's parameters may be empty on some process.)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.sync_gradients and not sharded and self._shows_every_gradient(model, inputs):
            self._check_gradients_once()
        return loss

    def _run_epoch(self, model: nn.Module, epoch: int, *args, **kwargs) -> None:
        # A run that was killed after its last step, while it was evaluated or saved, has none to take when resumed:
        # transformers would take one more each time.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        before = self.state.global_step
        for part in (self.train_dataset, self.data_collator):
            if isinstance(part, FeaturePairs | PairCollator | CaptionCollator):
                part.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)
        stopped = self.control.should_training_stop and self.state.global_step == before
        if stopped and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                f"The stream of training pairs has no whole batch of {self.args.global_batch_size}: lower "
                "training.per_device_train_batch_size (or contrastive_batch_size), or dataloader_num_workers, each of "
                "which makes batches of its own part of the stream."
            )

    def get_train_dataloader(self) -> DataLoader:
        """
        As transformers'. Of a stream, too, an epoch's last, incomplete batch is left out (`dataloader_drop_last`), and
        several processes have together the batches that one of a batch as large would have.
        """
        stream = self.train_dataset
        if not isinstance(stream, IterableDataset):
            return super().get_train_dataloader()
        if isinstance(stream, datasets.IterableDataset):
            size = self.args.global_batch_size if self.args.dataloader_drop_last else None
            self.train_dataset = WholeBatches(stream, size)
        try:
            with read_by_each_process(self.accelerator):
                return super().get_train_dataloader()
        finally:
            self.train_dataset = stream

    def _is_sound(self, loss: Tensor, model: nn.Module, inputs: dict[str, Any]) -> bool:
        if self._numbers is None:
            self._numbers = SoundNumbers(self.args.skip_broken_steps, self.train_dataset)
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.is_enabled()
        # Gradients are still being added up where no step follows.
        whole = self.accelerator.sync_gradients
        return self._numbers.check(loss, model, inputs, self.state.global_step + 1, scaled or not whole)

    def _shows_every_gradient(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether a batch has what every parameter needs for a gradient."""
        return True

    def _check_gradients_once(self) -> None:
        if self._gradients_checked:
            return
        self._gradients_checked = True
        missing = without_gradient(self.model)
        if missing and self.args.ddp_find_unused_parameters:
            logger.warning(describe_missing(missing))
        elif missing:
            raise ValueError(describe_missing(missing))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers', with `tower_learning_rate` of the arguments in parameter groups of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.tower_learning_rate is not None:
            model = self.model if model is None else model
            set_tower_learning_rate(optimizer, model, self.args.tower_learning_rate, self.pretrained_modalities)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # Pickled arguments, with the Hub's token among them; train_config.yaml says the same in the open, without it.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        Raises:
            DiskFull: there is no room; what was written of the checkpoint is gone.
        """
        folder = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        wanted = None
        if self.is_world_process_zero():
            before = checkpoints(folder)
            optimizer = getattr(self.optimizer, "optimizer", None)  # inside accelerate's
            wanted = size_of(before[-1]) if before else bytes_of(self.model, optimizer)
        try:
            with writing(folder, name, wanted, AFTER_FULL):
                super()._save_checkpoint(model, trial)
        except DiskFull:
            if self.is_world_process_zero():
                shutil.rmtree(folder / name, ignore_errors=True)
            raise

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """
        As transformers', which only warns of weights that a checkpoint lacks and leaves them as they are.

        Raises:
            ValueError: it lacks weights, other than those that are tied to some that it has.
        """
        super()._issue_warnings_after_load(load_result)
        missing, state = set(load_result.missing_keys), self.model.state_dict()
        loaded = {state[name].data_ptr() for name in state.keys() - missing}
        lost = sorted(name for name in missing if state[name].data_ptr() not in loaded)
        # (Of a model in several files transformers compares the names in the files with those of the layers.)
        if lost and not load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} weights of the model, the first: {lost[0]}. Go on from another one "
                "(resume_from_checkpoint=FOLDER), or start a new run."
            )

    def get_decay_parameter_names(self, model) -> list[str]:
        # As in CLIP, vectors and scalars are not decayed: weight decay would pull the temperature towards 1.
        # Not by get_parameter: the names include parameters that a layer has left out (those of SigLIP's pooling).
        parameters = dict(model.named_parameters())
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name in parameters and parameters[name].ndim > 1]

    def get_eval_dataloader(self, eval_dataset=None):
        # transformers leaves an incomplete last batch out of the evaluation, too, where training asks for it.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last


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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_batch_size(self.args)
        self._prepare_micro_batches()
        self.add_callback(TrainingProgressCallback())
        self._means = RunningMeans()
        self._warned = False

    def _prepare_micro_batches(self) -> None:
        self._micro_batches: list[dict[str, Tensor]] = []
        steps = self.args.gradient_accumulation_steps
        if self.args.contrastive_batch_size is not None:
            # To the Trainer micro-batches are those of an accumulated step: it counts steps and epochs by them.
            self.args.gradient_accumulation_steps = self.args.num_micro_batches
        elif steps > 1:
            batch = self.args.global_batch_size
            logger.warning(
                f"gradient_accumulation_steps={steps} adds up the gradients of {steps} batches of {batch}: every pair "
                f"is compared with the {batch - 1} others of its own batch only, so it adds no negatives. For a "
                f"contrastive batch of {steps * batch} set contrastive_batch_size={steps * batch} instead."
            )

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
            if drop_last and isinstance(plain, RandomSampler):
                # The DataLoader would leave out an incomplete micro-batch only.
                return RandomSampler(dataset, num_samples=len(dataset) // batch_size * batch_size)
            return plain
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
