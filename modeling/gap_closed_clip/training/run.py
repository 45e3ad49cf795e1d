"""One run from a configuration to a model folder: preflight, build, fit, save, evaluate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import Trainer, set_seed

from ..disk import writing
from ..evaluation import evaluate_model, write_report
from .build import RunParts, build
from .checked_trainer import AFTER_FULL
from .config import RunConfig
from .fuse import set_fusion_weights
from .output_folder import TrainingResult, delete_other_run, save_model_folder
from .preflight import RunInputs, preflight
from .processes import SHARE, WatchCallback, held_by_the_first, losing_no_process
from .recenter import RecenterCallback
from .resume import EarlyStopping, SettingsCallback, settings_of


def train(config: RunConfig) -> TrainingResult:
    """
    Trains the model that a configuration describes, and leaves a model folder in `training.output_dir`: weights,
    config, processor, code, `train_config.yaml`, `run.json`, and the evaluation on `training.final_split`
    (metrics.json, table, figures). With `lora`, weights and config are those of an adapter, and a folder `base` holds
    the model it belongs to if no other does; with `captioning`, those of a captioner.

    Raises:
        ValueError, OSError: whatever is wrong with the configuration, the data or the output folder, before training.
    """
    args = config.training_arguments()
    with losing_no_process(), held_by_the_first(args.output_dir, args.process_index):
        inputs = preflight(config)
        set_seed(inputs.args.seed)
        parts = build(config, inputs)
        trainer = fit(parts, inputs, settings_of(config, inputs.args, inputs.train_pairs))
        with writing(args.output_dir, "The trained model", None, AFTER_FULL):
            result = save_model_folder(trainer, config, inputs.num_train_pairs)
        return replace(result, metrics=evaluate(trainer, config, inputs))


def fit(parts: RunParts, inputs: RunInputs, settings: dict[str, Any]) -> Trainer:
    """
    Trains, centers the projections exactly, and measures what each of more than two modalities counts for in a query;
    another run's results in the output folder are deleted at the last moment, if that was asked for.

    Args:
        settings: noted in each checkpoint, see `check_settings`.

    Returns:
        the Trainer, with the trained model.
    """
    args = inputs.args
    delete_other_run(args, inputs.checkpoint)
    if parts.base is not None and args.process_index == 0:
        with writing(args.output_dir, "The adapter's base"):
            parts.base.save(parts.processor, resumed=inputs.checkpoint is not None)
    trainer = parts.trainer_class(
        model=parts.model,
        args=args,
        train_dataset=parts.train_pairs,
        eval_dataset=parts.eval_pairs,
        data_collator=parts.data_collator,
        processing_class=parts.processor,
        compute_metrics=parts.compute_metrics,
    )
    trainer.pretrained_modalities = parts.pretrained_modalities
    if parts.trains_encoder and not inputs.streaming:
        trainer.add_callback(RecenterCallback(parts.plain_batches(args), parts.encoder, parts.towers_have_run))
    trainer.add_callback(SettingsCallback(settings))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience))
    trainer.add_callback(WatchCallback(SHARE * args.ddp_timeout))
    with writing(args.output_dir, "Logs and checkpoints", None, AFTER_FULL):
        trainer.train(resume_from_checkpoint=inputs.checkpoint)
    if parts.encoder.config.modalities and parts.trains_encoder and trainer.is_world_process_zero():
        set_fusion_weights(parts.encoder, parts.batches_to_weigh(args))
    return trainer


def evaluate(trainer: Trainer, config: RunConfig, inputs: RunInputs) -> dict[str, float]:
    """
    The final evaluation by the first process: metrics.json, metrics.md, figures (and captions.jsonl of a captioner)
    beside the weights, and the table on the screen.

    Returns:
        the metrics; none without pairs, and on all other processes.
    """
    args, pairs = trainer.args, inputs.final_pairs
    if pairs is None or not trainer.is_world_process_zero():
        return {}
    seen = inputs.seen.get(args.final_split)
    evaluation = evaluate_model(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        pairs,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        max_length=config.data.max_caption_tokens,
        window=config.data.window,
    )
    name = Path(args.output_dir).name
    table = write_report(
        args.output_dir,
        {name: evaluation},
        config.described_data(),
        args.final_split,
        folders={name: args.output_dir},
        pairs=pairs,
        settings={"seen_pairs": {name: seen}} if seen else None,
    )
    print(f"\n{evaluation.size}, split '{args.final_split}' of {config.data.title}\n\n{table}\n")
    return evaluation.metrics


__all__ = ["TrainingResult", "train"]
