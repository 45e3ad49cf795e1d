"""[`CheckedTrainer`]: what our Trainers add to transformers', whatever they train."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import logging

from ..data import CaptionCollator, PairCollator
from ..data.features import FeaturePairs
from ..disk import DiskFull, bytes_of, size_of, writing
from ..model.saving_gap_closed_clip import share_weights
from .argument_checks import check_label_smoothing
from .arguments import GapClosedTrainingArguments
from .gradients import describe_missing, without_gradient
from .release import set_tower_learning_rate
from .resume import checkpoints
from .sound_numbers import SoundNumbers
from .streams import WholeBatches, place_in_stream, read_by_each_process


logger = logging.get_logger(__name__)

AFTER_FULL = "The same command with resume_from_checkpoint=auto goes on from the last complete checkpoint."


class CheckedTrainer(Trainer):
    """transformers' Trainer with what ours add to it, whatever they train."""

    # Further modalities whose towers learn at `tower_learning_rate`.
    pretrained_modalities: Collection[str] = ()
    train_dataset: Any
    _gradients_checked = False
    _numbers: SoundNumbers | None = None

    def __init__(self, model: Any = None, args: Any = None, *more, **kwargs):
        """
        As transformers'.

        Raises:
            ValueError: `args` are no [`GapClosedTrainingArguments`], or smooth labels.
        """
        if not isinstance(args, GapClosedTrainingArguments):
            raise ValueError(
                f"{type(self).__name__} got {'no args' if args is None else type(args).__name__}: give "
                "GapClosedTrainingArguments (of gap_closed_clip.training), which have all fields of transformers' own."
            )
        super().__init__(model, args, *more, **kwargs)
        check_label_smoothing(self.args.label_smoothing_factor)

    def train(self, *args, **kwargs) -> Any:
        """As transformers', whose batches would keep the size that the arguments had when the Trainer was made."""
        if not self.args.auto_find_batch_size:
            self._train_batch_size = self.args.train_batch_size
        return super().train(*args, **kwargs)

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
        # transformers would take one more each time. Nor has one that had already stopped early.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        before = self.state.global_step
        is_stream = isinstance(self.train_dataset, IterableDataset)
        for part in (self.train_dataset, self.data_collator):
            if isinstance(part, FeaturePairs | PairCollator | CaptionCollator):
                part.set_epoch(epoch)
                part.epoch.shuffled = not is_stream and self.args.train_sampling_strategy != "sequential"
        super()._run_epoch(model, epoch, *args, **kwargs)
        # (A pass that a run has behind it when it goes on has no step, and an evaluation at its end may stop the run.)
        skipped = epoch == kwargs.get("epochs_trained") and kwargs.get("steps_trained_in_current_epoch")
        stopped = self.control.should_training_stop and self.state.global_step == before and not skipped
        if stopped and is_stream:
            step = self._pairs_of_a_step()
            accumulated = step > self.args.global_batch_size
            raise ValueError(
                f"The stream of training pairs has no whole {'step' if accumulated else 'batch'} of {step}: lower "
                "training.per_device_train_batch_size (or contrastive_batch_size), "
                f"{'gradient_accumulation_steps, ' if accumulated else ''}or dataloader_num_workers, each of which "
                "makes batches of its own part of the stream."
            )

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        self._gradients_checked, self._numbers = False, None  # of an earlier training
        # transformers takes a stream for one pass, and would begin with the second one again, wherever the run was.
        start = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        self._find_best_checkpoint(checkpoint)
        if not self.state.global_step or has_length(self.train_dataset):
            return start
        state = TrainerState.load_from_json(str(Path(str(checkpoint)) / TRAINER_STATE_NAME))
        passes, batches = place_in_stream(state, self.args.gradient_accumulation_steps)
        return passes, 0 if self.args.ignore_data_skip else batches

    def _find_best_checkpoint(self, checkpoint: str | None) -> None:
        """
        The best checkpoint of a run lies beside the one that it goes on from, also where its folder has been moved.
        (transformers takes one that is not at the place that is noted for gone, and keeps the last weights.)
        """
        step, noted = self.state.best_global_step, self.state.best_model_checkpoint
        if checkpoint is None or not step:
            return
        beside = Path(checkpoint).parent / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if beside.is_dir():
            self.state.best_model_checkpoint = str(beside)
        elif noted is not None and not Path(noted).is_dir():
            self.state.best_model_checkpoint = None

    def get_train_dataloader(self) -> DataLoader:
        """
        As transformers'. Of a stream, too, an epoch's last, incomplete batch is left out (`dataloader_drop_last`), and
        several processes have together the batches that one of a batch as large would have.
        """
        stream = self.train_dataset
        if not isinstance(stream, IterableDataset):
            return self._with_own_numbers(super().get_train_dataloader())
        if isinstance(stream, datasets.IterableDataset):
            # Batches that fill no step would add their gradients to the first step of the next pass.
            size, batches = self._pairs_of_a_step(), self.args.gradient_accumulation_steps
            least = size if self.args.dataloader_drop_last else size - size // batches + 1
            self.train_dataset = WholeBatches(stream, size, least)
        try:
            with read_by_each_process(self.accelerator):
                return self._with_own_numbers(super().get_train_dataloader())
        finally:
            self.train_dataset = stream

    def _pairs_of_a_step(self) -> int:
        """Over all devices. (To the Trainer micro-batches are accumulated as well.)"""
        accumulated = self.args.gradient_accumulation_steps if self.args.num_micro_batches == 1 else 1
        return accumulated * self.args.global_batch_size

    def _with_own_numbers(self, loader: DataLoader) -> DataLoader:
        """
        A loader draws a random number when its workers start. Where they live on, that is in another epoch of a run
        that goes on from a checkpoint, whose dropout would then be another one.
        """
        if loader.persistent_workers:
            inner = getattr(loader, "base_dataloader", loader)  # of accelerate's, which is a DataLoader itself
            loader.generator = inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

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
        folder = Path(output_dir or self.args.output_dir)
        # Pickled arguments, with the Hub's token among them; train_config.yaml says the same in the open, without it.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        share_weights(folder)  # of adapters; a model does so itself

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

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As transformers', of all pairs in their order, by which the metrics know their ids and labels."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if pairs is not self.eval_dataset and not isinstance(pairs, str):
            # Where workers live on, transformers would read the data set of the first evaluation again.
            return self.get_test_dataloader(pairs)
        pairs = self.eval_dataset[pairs] if isinstance(pairs, str) else pairs
        with self._whole_and_in_order(pairs):
            return self._with_own_numbers(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._whole_and_in_order(test_dataset):
            return self._with_own_numbers(super().get_test_dataloader(test_dataset))

    @contextmanager
    def _whole_and_in_order(self, pairs: Any) -> Iterator[None]:
        """
        What transformers does for training, too, when it makes a loader: an incomplete last batch may be left out, and
        several workers make batches of their own part of a stream.
        """
        args = self.args
        before = args.dataloader_drop_last, args.dataloader_num_workers
        args.dataloader_drop_last = False
        if isinstance(pairs, IterableDataset):
            args.dataloader_num_workers = min(args.dataloader_num_workers, 1)
        try:
            yield
        finally:
            args.dataloader_drop_last, args.dataloader_num_workers = before

    def _get_eval_sampler(self, eval_dataset) -> None:
        return None  # not by length, as transformers orders evaluations where training is ordered so


__all__ = ["AFTER_FULL", "CheckedTrainer"]
