"""Features of frozen towers: how fast they are embedded and trained on, and the memory of a million cached pairs.

    python benchmarks/features.py                     # benchmarks/results/features_*.md
    python benchmarks/features.py --images 192 --cached-pairs 100000 --device cuda --workers 14

- *Bare tower*: images/s of EfficientNet-Lite0 on pixels at hand, in each way that FastTower tries.
- *Embedding*: images/s from JPEG files to features on the disk, as a first run has it (decoding, views, writing).
- *Training*: images/s of the Trainer on features, and through the frozen tower, on the same pairs.
- *Memory*: of an epoch over made-up cached pairs, three views each, in a process of its own.

Images are phantoms, written as JPEG of 256 pixels. Needs pip install "gap-closed-clip[towers]"; nothing is downloaded.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from comparison import CONFIGS, run_script
from datasets import Dataset, Image
from measure import RESULTS, PeakMemory, clock, device_slug, header, in_fresh_process, markdown_table, write_report
from torch.utils.data import DataLoader
from transformers.utils import logging

from gap_closed_clip.commands import keep_freed_memory
from gap_closed_clip.data import DistinctSampler, PairCollator, decode_image, group_ids_of
from gap_closed_clip.data.features import FeaturePairs, FeatureStore, StoredFeatures, digest
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.evaluation.fast_tower import FastTower, Way, has_spatial_convolutions
from gap_closed_clip.evaluation.precision import cpu_has_bfloat16
from gap_closed_clip.training import GapClosedClipTrainer, GapClosedTrainingArguments, load_config
from gap_closed_clip.training.encoder import build_model_and_processor
from gap_closed_clip.training.precompute import FeatureSettings, embed_pairs_once


VIEWS, WIDTHS, BATCH = 3, (1280, 384), 256
PAIRS_AT_A_TIME = 20_000  # made-up pairs that are written at once


@dataclass(frozen=True)
class Settings:
    """
    What is measured.

    Args:
        images: number of different images.
        cached_pairs: number of made-up pairs.
        device: of the towers.
        repeats: of each measurement; medians are told.
        workers: processes that decode images; 0: none beside this one.
    """

    images: int
    cached_pairs: int
    device: str
    repeats: int
    workers: int


def parse() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--cached-pairs", type=int, default=1_000_000, help="0: their memory is not measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    settings = parse()
    logging.set_verbosity_error()
    keep_freed_memory()  # as the command does
    with tempfile.TemporaryDirectory() as folder:
        pairs = jpeg_pairs(settings.images, Path(folder) / "images")
        config = load_config([CONFIGS / "radiology_small.yaml"])
        model, processor = build_model_and_processor(config.model, pairs["caption"])
        model.to(settings.device)
        collator = PairCollator(processor, config.data.augmentation(), config.data.max_caption_tokens)
        bare = bare_tower(model, settings)
        embedded = [embedding_speed(pairs, model, collator, settings, Path(folder)) for _ in range(settings.repeats)]
        kept = feature_settings(settings, Path(folder) / "kept")
        features = embed_pairs_once(pairs, model, collator, kept, vary=True)
        on_features = training_speed(model, features, collator, settings, Path(folder), epochs=20)
        through_tower = training_speed(model, pairs, collator, settings, Path(folder), epochs=1)
        memory: dict[str, int] | str = "The memory of many cached pairs was not measured."
        if settings.cached_pairs:
            memory = in_fresh_process(cached_memory, settings.cached_pairs, str(Path(folder) / "made-up"))
    best = max(bare.values())
    rows = [[f"bare tower, {way}", f"{speed:.0f}", f"{speed / best:.0%}"] for way, speed in bare.items()]
    speed = statistics.median(embedded)
    rows.append([f"embedding, {VIEWS} views of each JPEG", f"{speed:.0f}", f"{speed / best:.0%}"])
    rows.append(["training through the frozen image tower", f"{through_tower:.0f}", f"{through_tower / best:.0%}"])
    rows.append(["training on features", f"{on_features:.0f}", f"{on_features / best:.0%}"])
    report = [
        header("Features of frozen towers", settings.device),
        markdown_table(["EfficientNet-Lite0 at 224 pixels", "images/s", "of the best bare tower"], rows),
        f"Training on features is {on_features / through_tower:.0f} times as fast as through the tower.",
        memory if isinstance(memory, str) else describe(memory, settings.cached_pairs),
    ]
    without = settings.device == "cpu" and not cpu_has_bfloat16()
    path = RESULTS / f"features_{device_slug(settings.device)}{'_no-bfloat16' if without else ''}.md"
    write_report(path, *report)
    print(path.read_text(encoding="utf-8"))


def jpeg_pairs(number: int, folder: Path) -> Dataset:
    """Pairs of phantoms whose images are JPEG files."""
    folder.mkdir()
    pairs = make_phantoms(number, seed=0, image_size=256)
    paths = []
    for index, image in enumerate(pairs["image"]):
        paths.append({"bytes": None, "path": str(folder / f"{index}.jpg")})
        decode_image(image).save(paths[-1]["path"], quality=90)
    ids = [str(index) for index in range(number)]
    pairs = pairs.remove_columns(["image", "image_id"]).add_column("image", paths, feature=Image(decode=False))
    return pairs.add_column("image_id", ids)


def bare_tower(model: Any, settings: Settings) -> dict[str, float]:
    """Images/s of the tower alone, by way."""
    tower = model.vision_model.eval()
    inputs = {"pixel_values": torch.randn(96, 3, 224, 224, device=settings.device)}
    speeds = {}
    with torch.no_grad():
        fast = FastTower(tower, lambda tower, inputs: tower(**inputs).pooler_output, inputs)
        layouts = [torch.contiguous_format] + [torch.channels_last] * has_spatial_convolutions(tower)
        for way in (Way(layout, dtype) for layout in layouts for dtype in (None, torch.bfloat16)):
            fast.use(way)
            fast(inputs)
            seconds = []
            for _ in range(settings.repeats):
                start = clock(settings.device)
                fast(inputs)
                seconds.append(clock(settings.device) - start)
            speeds[str(way)] = 96 / statistics.median(seconds)
        fast.restore()
    return speeds


def feature_settings(settings: Settings, folder: Path) -> FeatureSettings:
    device = torch.device(settings.device)
    return FeatureSettings(folder, VIEWS, batch_size=96, num_workers=settings.workers, device=device)


def embedding_speed(pairs: Dataset, model: Any, collator: PairCollator, settings: Settings, folder: Path) -> float:
    """Views/s of a first run, the trial of ways included, without the captions."""
    model.text_model.requires_grad_(True)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        start = clock(settings.device)
        embed_pairs_once(pairs, model, collator, feature_settings(settings, Path(cache)), vary=True)
        seconds = clock(settings.device) - start
    model.text_model.requires_grad_(False)
    return VIEWS * len(pairs) / seconds


def training_speed(
    model: Any, pairs: Dataset | FeaturePairs, collator: PairCollator, settings: Settings, folder: Path, epochs: int
) -> float:
    """Images/s of the Trainer."""
    args = GapClosedTrainingArguments(
        output_dir=str(folder / "run"), num_train_epochs=epochs, per_device_train_batch_size=BATCH, report_to="none",
        learning_rate=1e-3, save_strategy="no", disable_tqdm=True, use_cpu=settings.device == "cpu",
        dataloader_num_workers=0 if isinstance(pairs, FeaturePairs) else settings.workers,
    )  # fmt: skip
    trainer = GapClosedClipTrainer(model=model, args=args, train_dataset=pairs, data_collator=collator)
    return trainer.train().metrics["train_samples_per_second"]


def cached_memory(number: int, folder: str) -> dict[str, int]:
    """
    Bytes that an epoch over made-up cached pairs needs, and seconds that it takes.

    The pairs' columns are a table on the disk, as `datasets` keeps them.
    """
    random = np.random.default_rng(0)
    stores = [FeatureStore(folder, {"made up": name}, views, width) for name, views, width in made_up_towers()]
    for start in range(0, number, PAIRS_AT_A_TIME):
        items = [digest(index.to_bytes(8, "little")) for index in range(start, min(start + PAIRS_AT_A_TIME, number))]
        for store in stores:
            with store.writing(items):
                values = random.standard_normal((len(items), store.views, store.width), dtype=np.float32)
                store.append(items, values)
    captions = [f"Axial CT of patient {index} with a finding that nobody else has." for index in range(number)]
    table = pa.table({"image_id": [f"images/{index:08d}.jpg" for index in range(number)], "caption": captions})
    Dataset(table).save_to_disk(f"{folder}/pairs")
    del captions, table
    del stores
    pairs = Dataset.load_from_disk(f"{folder}/pairs")
    with PeakMemory("cpu") as memory:
        stores = [FeatureStore(folder, {"made up": name}, views, width) for name, views, width in made_up_towers()]
        rows = np.arange(number)
        features = FeaturePairs(pairs, *(StoredFeatures(store, rows) for store in stores), varied=True)
        sampler = DistinctSampler(group_ids_of(pairs), BATCH, drop_last=True)
        start = clock("cpu")
        for _ in DataLoader(features, BATCH, sampler=sampler, collate_fn=stack, drop_last=True):  # type: ignore[arg-type]
            pass
        seconds = clock("cpu") - start
    disk = sum(path.stat().st_size for path in Path(folder).rglob("*.bin"))
    return {"memory": memory.bytes or 0, "disk": disk, "seconds": round(seconds)}


def made_up_towers() -> list[tuple[str, int, int]]:
    return [("image", VIEWS, WIDTHS[0]), ("text", 1, WIDTHS[1])]


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def describe(found: dict[str, int], number: int) -> str:
    return (
        f"{number:,} made-up cached pairs ({VIEWS} views of {WIDTHS[0]} features and a caption of {WIDTHS[1]}, "
        f"{found['disk'] / 1e9:.2f} GB on the disk): an epoch of batches of {BATCH} took {found['memory'] / 1e9:.2f} "
        f"GB of memory at most and {found['seconds']} s."
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
