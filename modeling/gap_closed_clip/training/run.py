"""One run: pairs, model, Trainer, model folder."""

from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import set_seed

from ..data import PairCollator
from ..evaluation import build_compute_metrics, evaluate_model, write_report
from .adapter_base import Base
from .build import build_model_and_processor
from .config import RunConfig
from .frozen import pool_captions_once, recenter
from .output_folder import TrainingResult, delete_other_run, save_model_folder, write_result
from .preflight import prepare, set_caption_length
from .run_captioning import train_captioner
from .trainer import GapClosedClipTrainer


def train(config: RunConfig) -> TrainingResult:
    """
    Trains the model that a configuration describes, and leaves a model folder in `training.output_dir`: weights,
    config, processor, code, `train_config.yaml`, `run.json`, and the evaluation on `training.final_split`
    (metrics.json, table, figures). With `lora`, weights and config are those of an adapter, and a folder `base` holds
    the model it belongs to if no other does; with `captioning`, those of a captioner.

    Raises:
        ValueError, OSError: whatever is wrong with the configuration, the data or the output folder, before training.
    """
    return train_captioner(config) if config.captioning is not None else train_encoder(config)


def train_encoder(config: RunConfig) -> TrainingResult:
    """`train` of a [`GapClosedClipModel`]."""
    start = prepare(config)
    args, train_pairs = start.args, start.train_pairs
    set_seed(args.seed)
    model, processor = build_model_and_processor(config.model, start.captions())
    set_caption_length(train_pairs, model, processor, config.data)
    base = None if config.lora is None else Base(model, config.model, args.output_dir)
    trained = model if base is None else base.adapt(config.lora)
    collator = PairCollator(processor, config.data.augmentation(), config.data.max_caption_tokens, config.data.window)
    if not start.streaming and not any(parameter.requires_grad for parameter in model.text_model.parameters()):
        train_pairs = pool_captions_once(train_pairs, model, collator, args.eval_batch_size, args.device)
    delete_other_run(args, start.checkpoint)
    if base is not None and not config.lora.merge and args.process_index == 0:
        base.save(processor)
    trainer = GapClosedClipTrainer(
        model=trained,
        args=args,
        train_dataset=train_pairs,
        eval_dataset=start.eval_pairs,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=None if start.eval_pairs is None else build_compute_metrics(start.eval_pairs),
    )
    trainer.train(resume_from_checkpoint=start.checkpoint)
    if model.config.center_projections and not start.streaming:
        recenter(model, train_pairs, collator, args.eval_batch_size, args.dataloader_num_workers)
    save_model_folder(trainer, config)
    metrics = {}
    if start.final_pairs is not None and trainer.is_world_process_zero():
        metrics = evaluate_model_folder(trainer, config, start.final_pairs)
    return write_result(trainer, None if start.streaming else len(train_pairs), metrics)


def evaluate_model_folder(
    trainer: GapClosedClipTrainer, config: RunConfig, pairs: Dataset | IterableDataset
) -> dict[str, float]:
    """The final evaluation: metrics.json, metrics.md and figures beside the weights, the table on the screen."""
    args = trainer.args
    metrics, embeddings = evaluate_model(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        pairs,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        max_length=config.data.max_caption_tokens,
        window=config.data.window,
    )
    name = Path(args.output_dir).name
    data = {"source": config.data.source, **config.to_dict()["data"]}
    folder = {name: args.output_dir}
    table = write_report(args.output_dir, {name: metrics}, {name: embeddings}, data, args.final_split, folder)
    print(f"\n{len(embeddings)} pairs, split '{args.final_split}' of '{config.data.source}'\n\n{table}\n")
    return metrics


__all__ = ["TrainingResult", "train"]
