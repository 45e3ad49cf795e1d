"""Captions from CLIP's space and from ours: decoders trained on images, on text alone, and the nearest caption.

    python benchmarks/compare_captioning.py configs/demo.yaml
    python benchmarks/compare_captioning.py configs/radiology_small.yaml max_caption_tokens=64

For every seed and either objective, an encoder is trained as the configuration says, then two decoders on it, frozen,
as configs/captioning.yaml says: the same steps, batches and learning rate for all. The decoder trained on text is
given the image's embedding as it is, with the mean-shift correction, and, as the ceiling of what it can write, the
embedding of the true caption. CLIPScore is for all that of one more encoder (the papers' objective, its own seed).

A run that has finished is not repeated with the same settings: a comparison that was stopped goes on where it was, and
several processes can each take some of the seeds. Overrides are those of train.py, for the decoders.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from comparison import CONFIGS, run_once, run_script, slug
from datasets import Dataset
from measure import RESULTS, header, markdown_table, write_report

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipProcessor
from gap_closed_clip.checkpoint import load_captioner, load_checkpoint
from gap_closed_clip.data import load_checked_pairs
from gap_closed_clip.evaluation import (
    Captions,
    embed_pairs,
    evaluate_captions,
    generate_captions,
    metrics_table,
    modality_means,
    nearest_captions,
    plot_captions,
    score_captions,
)
from gap_closed_clip.evaluation.embed import first_rows
from gap_closed_clip.evaluation.report import ROWS
from gap_closed_clip.training import RunConfig, load_config


Metrics = dict[str, float]

ENCODERS = {"CLIP (LT)": [CONFIGS / "clip_lt.yaml"], "ours": []}
DECODERS = {"image": {"train_on": "image"}, "text": {"train_on": "text"}}
NOISELESS = {"text_noiseless": {"train_on": "text", "captioning.noise": 0}}
SCORER_SEED = 100
NEAREST, NEAREST_SHIFTED = "nearest caption", "nearest caption, mean shift"
IMAGE, TEXT, TEXT_SHIFTED, CEILING = "image-trained", "text-only", "text-only, mean shift", "text-only, own caption"
NO_NOISE, NO_NOISE_SHIFTED = "text-only, no noise", "text-only, no noise, mean shift"
METHODS = (NEAREST, NEAREST_SHIFTED, IMAGE, TEXT, TEXT_SHIFTED, CEILING)
# What the figure shows, of the first seed.
DRAWN = (NEAREST, IMAGE, TEXT_SHIFTED)
CAPTION_METRICS = (
    "coco_bleu_1", "coco_bleu_2", "coco_bleu_3", "coco_bleu_4", "sacrebleu_4", "rouge_l", "meteor", "cider_d",
    "clip_score", "ref_clip_score", "image_caption_cosine", "distinct_captions", "caption_words",
)  # fmt: skip
ENCODER_METRICS = (
    "modality_gap", "debiased_modality_gap", "true_pair_cosine", "random_pair_cosine", "margin",
    "image_to_text_recall@10", "text_to_image_recall@10", "num_pairs",
)  # fmt: skip


@dataclass
class Comparison:
    """
    The trainings that are compared, each run at most once.

    Args:
        config: the encoders' configuration file.
        overrides: `KEY=VALUE` for the trainings of the decoders.
        output: folder of all runs.
    """

    config: str
    overrides: list[str]
    output: Path

    def encoder(self, name: str, seed: int) -> tuple[Path, Metrics]:
        """The folder and the metrics of an encoder, which is trained if it has not been before."""
        files = [self.config, *({**ENCODERS, "scorer": [CONFIGS / "paper_objective.yaml"]})[name]]
        config = load_config(files, [f"training.seed={seed}", "eval_strategy=no", "report_to=none"])
        folder = self.output / f"encoder-{slug(name)}-seed{seed}"
        return folder, run_once(config, folder)

    def decoder(self, encoder: Path, kind: str, name: str, seed: int) -> Path:
        """The folder of a decoder, which is trained if it has not been before."""
        encoder_config = yaml.safe_load(Path(self.config).read_text(encoding="utf-8"))
        settings = {
            "model.checkpoint": str(encoder),
            "training.seed": seed,
            "training.final_split": self.split,
            "eval_strategy": "no",
            "report_to": "none",
        }
        settings |= (DECODERS | NOISELESS)[kind]
        settings |= {f"data.{key}": value for key, value in encoder_config["data"].items()}
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        folder = self.output / f"{kind}-{slug(name)}-seed{seed}"
        run_once(load_config([CONFIGS / "captioning.yaml"], [*words, *self.overrides]), folder)
        return folder

    @property
    def split(self) -> str:
        """The split on which everything is evaluated, once."""
        return load_config([self.config]).training["final_split"]


class Pairs:
    """The pairs whose images get captions, those of the training, and how both are embedded."""

    def __init__(self, config: RunConfig, split: str):
        self.test, self.train = load_checked_pairs(config.data, split), load_checked_pairs(config.data, "train")
        self.embedding_settings = {"max_length": config.data.max_caption_tokens, "window": config.data.window}


def write_captions(encoder: Path, decoders: dict[str, Path], pairs: Pairs) -> dict[str, Captions]:
    """Caption the images by every method with one encoder; gives the captions by method."""
    clip_model, processor = load_checkpoint(encoder)
    test, train = (
        embed_pairs(clip_model, processor, rows, **pairs.embedding_settings) for rows in (pairs.test, pairs.train)
    )
    image_mean, text_mean = modality_means(train)
    shift = text_mean - image_mean
    captions = {NEAREST: nearest_captions(test, train), NEAREST_SHIFTED: nearest_captions(test, train, shift)}
    model, processor = load_captioner(decoders["image"])
    captions[IMAGE] = generate_captions(model, processor, pairs.test, window=pairs.embedding_settings["window"])
    rows = list(first_rows(test.image_ids))
    images, true_captions = test.image_embeds[rows], test.text_embeds[rows]
    from_embeddings = {"text": {TEXT: images, TEXT_SHIFTED: images + shift, CEILING: true_captions}}
    if "text_noiseless" in decoders:
        from_embeddings["text_noiseless"] = {NO_NOISE: images, NO_NOISE_SHIFTED: images + shift}
    for kind, methods in from_embeddings.items():
        model, processor = load_captioner(decoders[kind])
        for method, embeds in methods.items():
            captions[method] = replace(captions[NEAREST], captions=write_from(model, processor, embeds))
    return captions


@torch.no_grad()
def write_from(
    model: GapClosedClipForConditionalGeneration,
    processor: GapClosedClipProcessor,
    embeds: np.ndarray,
    batch: int = 64,
) -> list[str]:
    """Write a caption from each of the embeddings (N, D), which are made unit vectors first."""
    model.eval()
    unit = torch.nn.functional.normalize(torch.from_numpy(embeds).float(), dim=-1)
    tokens = [model.generate(shared_embeds=part) for part in unit.split(batch)]
    return [text for part in tokens for text in processor.batch_decode(part, skip_special_tokens=True)]


def measure(captions: dict[str, Captions], scorer: Path, pairs: Pairs) -> dict[str, Metrics]:
    """The metrics of each method's captions, those of CLIPScore by the encoder in the folder `scorer`."""
    model, processor = load_checkpoint(scorer)
    images = embed_pairs(model, processor, pairs.test, **pairs.embedding_settings).by_image()
    limit = pairs.embedding_settings["max_length"]
    return {
        method: evaluate_captions(written) | score_captions(model, processor, written, images, max_length=limit)
        for method, written in captions.items()
    }


def table_of_captions(runs: dict[tuple[str, str], list[Metrics]]) -> str:
    """A table with a row for each encoder and method: mean ± standard deviation over the seeds."""
    names = [name for name in CAPTION_METRICS if name in next(iter(runs.values()))[0]]
    rows = []
    for (encoder, method), found in runs.items():
        cells = []
        for name in names:
            values = [metrics[name] for metrics in found]
            form = ROWS[name][1]
            spread = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
            cells.append(form.format(np.mean(values)) + spread)
        rows.append([encoder, method, *cells])
    return markdown_table(["encoder", "captions", *(ROWS[name][0] for name in names)], rows, left=2)


def table_of_encoders(found: dict[str, list[Metrics]]) -> str:
    return metrics_table(
        {name: [{m: run[m] for m in ENCODER_METRICS} for run in runs] for name, runs in found.items()}
    )


def notes(comparison: Comparison, seeds: list[int], decoder: RunConfig, images: int) -> str:
    training = decoder.training
    lines = [
        f"Encoders as in {Path(comparison.config).name}, CLIP (LT) and ours, trained on the training pairs of "
        f"{decoder.data.title}; captions for the {images} images of its {comparison.split} split, looked at once.",
        f"Decoders as in configs/captioning.yaml on frozen encoders, all with {training['num_train_epochs']} epochs, "
        f"batch {training['per_device_train_batch_size']}, learning rate {training['learning_rate']:g}, captions cut "
        f"after {decoder.data.max_caption_tokens} tokens; greedy; seeds {', '.join(map(str, seeds))}; mean ± standard "
        "deviation (N - 1).",
        f"`{IMAGE}`: attends to patches and embedding. `{TEXT}`: learned to write captions back from their own text "
        f"embeddings with noise of length {decoder.captioning.config_fields()['embedding_noise']:g}, never saw an "
        "image, and gets the image's embedding; `mean shift`: moved by mean text minus mean image embedding of the "
        f"training pairs. `{CEILING}`: gets the embedding of the true caption, which no image gives. `{NEAREST}`: the "
        "training caption whose embedding is the nearest to the image's. `no noise`: one more decoder on text, "
        "without.",
        "CLIPScore and RefCLIPScore by an encoder of its own (the papers' objective, another seed). BLEU, ROUGE-L and "
        "CIDEr-D as in COCO's evaluation but for the tokenizer; CIDEr-D of 1 is the 100 of published tables. "
        "METEOR only where WordNet is installed.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def draw(written: dict[str, dict[str, Captions]], pairs: Pairs, path: Path) -> None:
    """Draw some images with their captions by the methods `DRAWN`."""
    shown = {f"{encoder}, {method}": found[method] for encoder, found in written.items() for method in DRAWN}
    if isinstance(pairs.test, Dataset):
        plot_captions(shown, pairs.test, path)


def compare() -> None:
    args = parse()
    comparison = Comparison(args.config, args.overrides, args.output)
    scorer, _ = comparison.encoder("scorer", SCORER_SEED)
    encoders: dict[str, list[Metrics]] = {name: [] for name in ENCODERS}
    kinds = DECODERS | (NOISELESS if args.without_noise else {})
    methods = METHODS + ((NO_NOISE, NO_NOISE_SHIFTED) if args.without_noise else ())
    runs: dict[tuple[str, str], list[Metrics]] = {(name, method): [] for name in ENCODERS for method in methods}
    pairs = None
    for seed in args.seeds:
        written = {}
        for name in ENCODERS:
            encoder, metrics = comparison.encoder(name, seed)
            encoders[name].append(metrics)
            decoders = {kind: comparison.decoder(encoder, kind, name, seed) for kind in kinds}
            config = load_config([decoders["text"] / "train_config.yaml"])
            pairs = pairs or Pairs(config, comparison.split)
            written[name] = write_captions(encoder, decoders, pairs)
            for method, found in measure(written[name], scorer, pairs).items():
                runs[name, method].append(found)
        if seed == args.seeds[0]:
            draw(written, pairs, args.output / "captions.png")
        path = args.report or RESULTS / f"captioning_{'_'.join(config.data.sources())}.md"
        done = args.seeds[: len(encoders["ours"])]
        write_report(  # after each seed, should the next one be interrupted
            path,
            header("Captions from two spaces", config.training_arguments().device),
            notes(comparison, done, config, len(written[name][NEAREST])),
            table_of_captions(runs),
            "## The encoders\n\n" + table_of_encoders(encoders),
        )
    print(path.read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="an encoder's configuration file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without-noise", action="store_true", help="train one more decoder on text, without noise")
    parser.add_argument("--output", type=Path, default=None, help="default: outputs/compare-captioning-NAME")
    parser.add_argument("--report", type=Path, help="default: benchmarks/results/captioning_SOURCE.md")
    args = parser.parse_intermixed_args()
    args.output = args.output or Path("outputs") / f"compare-captioning-{Path(args.config).stem}"
    return args


if __name__ == "__main__":
    sys.exit(run_script(compare))
