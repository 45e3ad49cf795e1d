"""The Trainer of captioners: transformers' Trainer for sequences with the checks of ours."""

import copy

from transformers import Seq2SeqTrainer

from .trainer import CheckedTrainer, TrainingProgressCallback


class GapClosedCaptionTrainer(CheckedTrainer, Seq2SeqTrainer):
    """
    transformers' `Seq2SeqTrainer`, which trains a captioner too. This one adds:

    - the first step fails where a trainable parameter gets no gradient;
    - the objective of encoders that train along follows the training's progress;
    - vectors and scalars are not decayed, and evaluation keeps its last batch where training drops it;
    - evaluation by several processes counts no pair twice;
    - what it generates leaves the model's generation config as it was.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(TrainingProgressCallback())

    def evaluation_loop(self, *args, **kwargs):
        # The library keeps the pairs with which accelerate fills up the last batch for all processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        # The library fills in all defaults, of which a length of 20 tokens contradicts the config's own in every later
        # call, and would be saved.
        kept = copy.deepcopy(self.model.generation_config)
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.model.generation_config = kept


__all__ = ["GapClosedCaptionTrainer"]
