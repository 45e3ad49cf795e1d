"""Computes once what need not be computed in every step: the output of frozen towers for every image and caption."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data import PairCollator, decode_image
from ..data.features import DTYPE, FeaturePairs, FeatureStore, StoredFeatures, digest
from ..data.images import Augmentation, name_of, stored_bytes, window_of
from ..data.modalities import has_image
from ..disk import DiskFull, readable_size
from ..evaluation.embed import evaluation_mode
from ..evaluation.fast_tower import FastTower
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.tower_kinds_gap_closed_clip import image_width, text_width


logger = logging.get_logger(__name__)
Item = TypeVar("Item")

# What computes the pixels and the features; another version of one may compute others.
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "pillow")
# What configurations of towers and image processors say of their origin, of their code and of a head that is not
# there: features do not depend on it.
UNIMPORTANT = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "processor_class", "transformers_version"),
    *("id2label", "label2id", "label_names", "num_classes", "num_labels"),
)


class Kept(NamedTuple):
    """
    What is kept of an image tower's output.

    Args:
        pool: (tower, inputs) -> (n, C).
        width: C.
        described: what it depends on besides the tower, the images and the transforms.
        parts: widths of what it consists of, if of several things.
    """

    pool: Callable[[nn.Module, dict[str, Any]], Tensor]
    width: int
    described: dict[str, Any]
    parts: tuple[int, ...] = ()


@dataclass
class FeatureSettings:
    """
    How frozen towers run once.

    Args:
        folder: where features are kept.
        views: of an image, the plain one among them.
        batch_size: views, or captions, at once.
        num_workers: processes that decode images; 0 for a thread beside the tower.
        device: where the towers run.
    """

    folder: Path
    views: int
    batch_size: int
    num_workers: int
    device: torch.device


def is_frozen(tower: nn.Module) -> bool:
    """Whether nothing of a tower is trained."""
    return not any(parameter.requires_grad for parameter in tower.parameters())


def embed_pairs_once(
    pairs: Dataset,
    model: GapClosedClipModel,
    collator: PairCollator,
    settings: FeatureSettings,
    vary: bool,
) -> Dataset | FeaturePairs:
    """
    The pairs with the features of those towers that are frozen; as they are where none is, or none runs once.

    Args:
        pairs: canonical pairs.
        collator: with the augmentation of the training images.
        vary: embed the images in augmented views, too, for training.

    Raises:
        OSError: the folder can't be written to, or the disk is full.
        ValueError: an image cannot be read; features that can't be kept.
    """
    images = texts = None
    if not settings.views:
        return pairs
    if is_frozen(model.vision_model):
        images = image_features(pairs, model, pooled_images(model), collator, settings, vary)
    if is_frozen(model.text_model):
        texts = _text_features(pairs, model, collator, settings)
    if images is None and texts is None:
        return pairs
    return FeaturePairs(pairs, images, texts, varied=vary, further=tuple(collator.further))


def pooled_images(model: GapClosedClipModel) -> Kept:
    """What represents an image in the image tower."""

    def pool_images(_, inputs: dict[str, Tensor]) -> Tensor:
        return model.encode_image(inputs["pixel_values"]).pooler_output

    pooling = model.config.image_pooling
    return Kept(pool_images, image_width(model.vision_model), {} if pooling == "pooler" else {"pooling": pooling})


def image_features(
    pairs: Dataset,
    model: GapClosedClipModel,
    kept: Kept,
    collator: PairCollator,
    settings: FeatureSettings,
    vary: bool,
) -> StoredFeatures:
    """
    What a frozen image tower gives for the images of pairs, computed where it is not there yet.

    Args:
        model: the tower's.
        kept: what is wanted of each image.
        collator, settings, vary: as of `embed_pairs_once`.

    Raises:
        OSError, ValueError: as `embed_pairs_once`.
    """
    augmentation = collator.augmentation if vary else None
    description = {
        **_description("image", model.vision_model, settings.device),
        "image_processor": _important(collator.processor.image_processor.to_dict()),
        "augmentation": None if augmentation is None else asdict(augmentation),
        **kept.described,
    }
    views = 1 if augmentation is None else settings.views
    store = FeatureStore(settings.folder, description, views, kept.width)
    images = pairs.select_columns([name for name in ("image", "image_id", "window") if name in pairs.column_names])
    there = np.array([has_image(row) for row in images]) if collator.further else np.ones(len(images), bool)
    images = images if there.all() else images.select(np.flatnonzero(there))
    digests = [_image_digest(row, collator) for row in images]
    with store.writing(digests) as missing:
        if missing:
            loader = DataLoader(
                images.select(missing).add_column("position", missing),  # type: ignore[arg-type]
                batch_size=max(settings.batch_size // views, 1),
                collate_fn=_ViewCollator(collator, augmentation, views, digests),
                num_workers=settings.num_workers,
            )
            title = f"Embedding {len(missing)} images" + (f" in {views} views" if views > 1 else "")
            batches = ((part, {"pixel_values": pixel_values}) for part, pixel_values in _prefetched(loader))
            tower = model.vision_model
            _fill(store, tower, kept.pool, digests, batches, len(missing), title, settings, kept.parts)
    rows = np.full(len(there), -1, np.int64)  # a pair that lacks its image has none
    rows[there] = store.rows(digests)
    return StoredFeatures(store, rows)


def _text_features(
    pairs: Dataset, model: GapClosedClipModel, collator: PairCollator, settings: FeatureSettings
) -> StoredFeatures:
    def pool_texts(_, tokens: dict[str, Any]) -> Tensor:
        return model.encode_text(**tokens).pooler_output

    description = _description("text", model.text_model, settings.device) | {"pooling": model.config.text_pooling}
    store = FeatureStore(settings.folder, description, 1, text_width(model.config.text_config))
    distinct = set(pairs["caption"]) - ({""} if collator.further else set())  # "": a pair that lacks its caption
    captions = sorted(distinct, key=lambda caption: (len(caption), caption))
    # Of the tokens and not the caption: what the tokenizer makes of a caption, and where it is cut, counts as well.
    digests = [digest(tokens.tobytes()) for tokens in _each_tokens(captions, collator)]
    with store.writing(digests) as missing:
        size = settings.batch_size
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        batches = ((part, collator.tokenize([captions[index] for index in part])) for part in parts)
        title = f"Embedding {len(missing)} captions"
        _fill(store, model.text_model, pool_texts, digests, batches, len(missing), title, settings)
    row_of = dict(zip(captions, store.rows(digests).tolist(), strict=True))
    return StoredFeatures(store, np.array([row_of.get(caption, -1) for caption in pairs["caption"]], np.int64))


def _each_tokens(captions: Sequence[str], collator: PairCollator, batch_size: int = 1000) -> Iterator[np.ndarray]:
    for start in range(0, len(captions), batch_size):
        tokens = collator.tokenize(list(captions[start : start + batch_size]))
        kept = tokens["attention_mask"].bool()
        for row in range(len(kept)):
            yield torch.stack([tokens["input_ids"][row, kept[row]], tokens["token_type_ids"][row, kept[row]]]).numpy()


def _fill(
    store: FeatureStore,
    tower: nn.Module,
    pool: Callable[[nn.Module, dict[str, Any]], Tensor],
    digests: Sequence[bytes],
    batches: Iterable[tuple[list[int], dict[str, Tensor]]],
    number: int,
    title: str,
    settings: FeatureSettings,
    parts: tuple[int, ...] = (),
) -> None:
    """
    Runs a tower over batches of items and keeps what it gives.

    Args:
        pool: (tower, inputs) -> (n * V, C).
        digests: of all items.
        batches: positions of n items, and inputs of n * V rows.
        number: of items in all batches.
        parts: as of `Kept`.
    """
    if not number:
        return
    _check_space(store, number)
    tower.to(settings.device)
    fast: FastTower | None = None
    with evaluation_mode(tower), tqdm(total=number, desc=title, leave=False) as progress:
        for positions, inputs in batches:
            inputs = {name: value.to(settings.device, non_blocking=True) for name, value in inputs.items()}
            if fast is None:
                fast = FastTower(tower, pool, inputs, parts)
            features = fast(inputs).float().cpu().numpy().reshape(len(positions), store.views, store.width)
            try:
                store.append([digests[position] for position in positions], features)
            except OSError as error:
                raise DiskFull(
                    f"{title}: {error.strerror} ({store.folder}) after {progress.n} of {number}. Those are kept, and "
                    "the same command goes on from there: make room (or let the folder be written to), name "
                    "another one with data.feature_cache, or set data.feature_views=0 to run the tower in every step."
                ) from error
            progress.update(len(positions))
    if fast is not None:
        fast.restore()
        logger.info(
            f"{title}: {fast.way}, at most {fast.distance:.1e} (cosine distance) from the weights as they are."
        )


def _check_space(store: FeatureStore, number: int) -> None:
    """
    Raises:
        OSError: the disk has no room for so many more items.
    """
    needed = number * store.views * store.width * DTYPE.itemsize
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise OSError(
            f"The features of frozen towers need {readable_size(needed)} in {store.folder}, which has "
            f"{readable_size(free)} left: name another folder with data.feature_cache, or set data.feature_views=0 to "
            "run the towers in every step."
        )


class _ViewCollator:
    """
    Rows of images to their positions and V views of each: the plain one and augmented ones.

    The views of an image depend on the image alone, not on the batch or what was embedded before.

    Args:
        collator: has the processor and the window.
        augmentation: makes the other views.
        views: V.
        digests: of the images, by position.
    """

    def __init__(
        self, collator: PairCollator, augmentation: Augmentation | None, views: int, digests: Sequence[bytes]
    ):
        self.collator, self.augmentation, self.views, self.digests = collator, augmentation, views, digests

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[list[int], Tensor]:
        images = []
        for row in rows:
            image = decode_image(row["image"], None, window_of(row, self.collator.window), name=name_of(row))
            images.append(image)
            if self.augmentation is not None:
                generator = torch.Generator().manual_seed(int.from_bytes(self.digests[row["position"]][:8], "little"))
                images.extend(self.augmentation(image, generator) for _ in range(self.views - 1))
        processor = self.collator.processor.image_processor
        return [row["position"] for row in rows], processor(images, return_tensors="pt")["pixel_values"]


def _prefetched(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each prepared in a thread while the caller works on the one before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def _image_digest(row: dict[str, Any], collator: PairCollator) -> bytes:
    """Of the file as it is, and of the intensity window that it is shown in."""
    try:
        return digest(stored_bytes(row["image"]), repr(window_of(row, collator.window)).encode())
    except OSError as error:
        raise type(error)(f"The image '{name_of(row)}' cannot be read ({error}).") from error


def _description(kind: str, tower: Any, device: torch.device) -> dict[str, Any]:
    """What a tower's features depend on besides the inputs."""
    weights = blake2b(digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "kind": kind,
        "config": _important(tower.config.to_dict()),
        "weights": weights.hexdigest(),
        "device": device.type,
        "libraries": {library: version(library) for library in LIBRARIES},
    }


def _important(configuration: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in configuration.items() if name not in UNIMPORTANT}


__all__ = ["FeatureSettings", "Kept", "embed_pairs_once", "image_features", "is_frozen", "pooled_images"]
