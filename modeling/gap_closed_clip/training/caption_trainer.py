"""The Trainer of captioners: transformers' Trainer for sequences with the checks of ours."""

import copy
from typing import Any

from torch import nn
from transformers import GenerationConfig, Seq2SeqTrainer, TrainerCallback

from .checked_trainer import CheckedTrainer
from .trainer import TrainingProgressCallback


class _GenerationConfigCallback(TrainerCallback):
    """
    Starts the training with the generation config that the model came with. The library aligns it with the tokenizer
    before (5.17, which finds no `bos_token` in a BERT tokenizer and removes ours).
    """

    def __init__(self, generation_config: GenerationConfig):
        self.generation_config = copy.deepcopy(generation_config)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.generation_config = copy.deepcopy(self.generation_config)


class GapClosedCaptionTrainer(CheckedTrainer, Seq2SeqTrainer):
    """
    transformers' `Seq2SeqTrainer`, which trains a captioner too. This one adds:

    - training makes no logits where there is only padding to predict (`skip_logits`);
    - the first step fails where a trainable parameter gets no gradient;
    - the objective of encoders that train along follows the training's progress;
    - vectors and scalars are not decayed, and evaluation keeps its last batch where training drops it;
    - evaluation by several processes counts no pair twice;
    - training and what it generates leave the model's generation config as it was.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(TrainingProgressCallback())
        self.add_callback(_GenerationConfigCallback(self.model.generation_config))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs) -> Any:
        return super().compute_loss(model, {**inputs, "skip_logits": not return_outputs}, return_outputs, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        # The library keeps the pairs with which accelerate fills up the last batch for all processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        # The library fills in all defaults, of which a length of 20 tokens contradicts the config's own in every later
        # call, and would be saved.
        kept = copy.deepcopy(self.model.generation_config)
        # One caption a pair, the best, whatever the model's own config asks for.
        self.model.generation_config.update(num_return_sequences=1, return_dict_in_generate=False)
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.model.generation_config = kept


__all__ = ["GapClosedCaptionTrainer"]
