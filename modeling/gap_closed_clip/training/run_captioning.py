"""One run that trains a captioner: pairs, encoder, decoder, Trainer, model folder."""

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import set_seed

from ..data import CaptionCollator, PairCollator
from ..evaluation import build_caption_metrics, check_references, evaluate_captioner, write_report
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.towers_gap_closed_clip import longest_text
from .caption_trainer import GapClosedCaptionTrainer
from .captioning import build_captioner, embed_captions_once, mean_shift
from .config import RunConfig
from .frozen import recenter
from .output_folder import TrainingResult, delete_other_run, save_model_folder, write_result
from .preflight import Start, prepare, set_caption_length


def train_captioner(config: RunConfig) -> TrainingResult:
    """
    `train` of a [`GapClosedClipForConditionalGeneration`].

    Raises:
        ValueError, OSError: as `train`.
    """
    start = prepare(config)
    args, train_pairs = start.args, start.train_pairs
    _check(config, start)
    set_seed(args.seed)
    model, processor = build_captioner(config.captioning, config.model, start.captions())
    _check_caption_length(config, model)
    set_caption_length(train_pairs, model.gap_closed_clip, processor, config.data)
    limit, window = config.data.max_caption_tokens, config.data.window
    collator = PairCollator(processor, config.data.augmentation(), limit, window)
    if config.captioning.train_on == "text":
        model.to(args.device)
        train_pairs = embed_captions_once(train_pairs, model, collator, args.eval_batch_size)
        how = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers}
        how |= {"max_length": limit, "window": window}
        corrected = config.captioning.mean_shift
        # Before training, whose evaluations and checkpoints have it, too; a captioner that is gone on from brings one.
        model.set_image_shift(mean_shift(model, processor, start.train_pairs, **how) if corrected else None)
    delete_other_run(args, start.checkpoint)
    writes = args.predict_with_generate and start.eval_pairs is not None
    trainer = GapClosedCaptionTrainer(
        model=model,
        args=args,
        train_dataset=train_pairs,
        eval_dataset=start.eval_pairs,
        data_collator=CaptionCollator(collator),
        processing_class=processor,
        compute_metrics=build_caption_metrics(start.eval_pairs, processor) if writes else None,
    )
    trainer.train(resume_from_checkpoint=start.checkpoint)
    encoder = model.gap_closed_clip
    if config.captioning.encoders == "joint" and encoder.config.center_projections and not start.streaming:
        recenter(encoder, train_pairs, collator, args.eval_batch_size, args.dataloader_num_workers)
    save_model_folder(trainer, config)
    metrics = {}
    if start.final_pairs is not None and trainer.is_world_process_zero():
        metrics = evaluate_caption_folder(trainer, config, start.final_pairs)
    return write_result(trainer, None if start.streaming else len(train_pairs), metrics)


def _check(config: RunConfig, start: Start) -> None:
    if start.streaming and config.captioning.train_on == "text":
        raise ValueError(
            "data.streaming and captioning.train_on=text: every caption is embedded before training, so the set has "
            "to be there as a whole. Leave streaming off."
        )
    for split, pairs in start.held_out.items():
        if isinstance(pairs, Dataset):
            check_references(pairs, split)


def _check_caption_length(config: RunConfig, model: GapClosedClipForConditionalGeneration) -> None:
    limit = longest_text(model.config.decoder_config)
    if (config.data.max_caption_tokens or 0) > limit:
        raise ValueError(
            f"data.max_caption_tokens is {config.data.max_caption_tokens}, but the decoder takes {limit} tokens at "
            "most."
        )


def evaluate_caption_folder(
    trainer: GapClosedCaptionTrainer, config: RunConfig, pairs: Dataset | IterableDataset
) -> dict[str, float]:
    """The final evaluation: metrics.json, metrics.md, captions.jsonl, captions.png beside the weights, the table."""
    args = trainer.args
    how: dict[str, Any] = {"max_length": config.data.max_caption_tokens, "window": config.data.window}
    metrics, captions = evaluate_captioner(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        pairs,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        **how,
    )
    name = Path(args.output_dir).name
    data = {"source": config.data.source, **config.to_dict()["data"]}
    table = write_report(
        args.output_dir,
        {name: metrics},
        {},
        data,
        args.final_split,
        {name: args.output_dir},
        captions={name: captions},
        pairs=pairs,
    )
    print(f"\n{len(captions)} images, split '{args.final_split}' of '{config.data.source}'\n\n{table}\n")
    return metrics


__all__ = ["train_captioner"]
