"""What can be wrong with the files of a model folder, each in one line that names the file and what to do."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .model.towers_gap_closed_clip import pickled_weights


WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
AGAIN = "Save it again (`gap-closed-clip train`, or model.save_pretrained and processor.save_pretrained)."
PROCESSOR_FILES = "processor_config.json, tokenizer_config.json or tokenizer.json"
MOST_PIXELS_A_SIDE = 8192  # that a processor makes


class BaseNotLoaded(OSError):
    """The base model of an adapter could not be loaded; the message names both."""


def no_weights(place: str | Path, missing: str, pickled: str | None) -> str:
    hint = f"{pickled} is pickled and not read" if pickled else "it may be half-written"
    return f"{place} has no weights: {missing} is missing, {hint}. {AGAIN}"


@contextmanager
def explained_errors(name_or_path: str, revision: str | None, file: str = "config.json") -> Iterator[None]:
    """
    Turns what the library raises while a model is loaded into messages that say what to do.

    Args:
        file: that is to blame where the files are there, and are no longer what was saved.
    """
    try:
        yield
    except BaseNotLoaded:
        raise
    except OSError as error:
        if pickled := pickled_weights(name_or_path, revision):
            missing = ADAPTER_WEIGHTS if pickled.startswith("adapter") else WEIGHTS
            raise FileNotFoundError(no_weights(name_or_path, missing, pickled)) from error
        raise OSError(
            f"{name_or_path} is neither a folder with a model nor a Hub id within reach (network? HF_TOKEN for a "
            f"private one? HF_HUB_OFFLINE?): {first_line(error)}"
        ) from error
    except RuntimeError as error:  # shapes
        if isinstance(error, RecursionError) or file != "config.json":
            raise _damaged(name_or_path, file, error) from error
        raise ValueError(f"{name_or_path}: the weights do not fit config.json. {error} {AGAIN}") from error
    except ImportError:  # something is not installed
        raise
    except ValueError as error:
        if re.search(rf"(?<!\w){re.escape(str(name_or_path))}(?!\w)", str(error)):  # the message names the folder
            raise
        raise _damaged(name_or_path, file, error) from error
    except Exception as error:  # values of a wrong type, which the libraries meet wherever they first use them
        raise _damaged(name_or_path, file, error) from error


def check_files(folder: Path) -> None:
    """
    Checks that the small files of a model folder are JSON.

    Raises:
        ValueError: one is not.
    """
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)


def read_json(path: Path) -> dict:
    """
    The mapping in a file of a model folder.

    Raises:
        ValueError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise ValueError(f"{path.parent} is damaged: {path.name} is half-written ({error}). {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.parent} is damaged: {path.name} holds no mapping. {AGAIN}")
    return content


def try_processor(processor: Any, image_size: tuple[int, int] | None) -> None:
    """
    Gives a processor an image and a text: what its files say wrongly shows here, and not in the first batch.

    Args:
        image_size: height and width of the images that the model takes; None if it takes any.

    Raises:
        ValueError: it makes no sound input of them.
    """
    images = processor.image_processor
    for setting in ("size", "crop_size"):
        for name, side in dict(getattr(images, setting, None) or {}).items():
            if side is not None and not 1 <= side <= MOST_PIXELS_A_SIDE:
                raise ValueError(
                    f"{setting}.{name} is {side!r:.100}; it is a number of pixels, from 1 to {MOST_PIXELS_A_SIDE}."
                )
    limit = processor.tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise ValueError(f"model_max_length is {limit!r:.100}; it is a number of tokens, 1 or more.")
    if processor.tokenizer.pad_token_id is None:
        raise ValueError("pad_token is missing.")
    inputs = processor(
        images=[Image.new("RGB", (32, 32), "gray")],
        text=["a", "b c"],
        return_tensors="pt",
        padding=True,
        truncation=True,
    )
    pixels = inputs["pixel_values"]
    if image_size is not None and pixels.shape[-2:] != image_size:
        raise ValueError(
            f"it makes images of {' x '.join(map(str, pixels.shape[-2:]))} pixels, and the image tower takes "
            f"{image_size[0]} x {image_size[1]}: its crop_size and size"
        )
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not bool(pixels.isfinite().all()):
        raise ValueError(f"it makes {tuple(pixels.shape)} of an image, or values that are not finite.")


def check_vocabulary(described: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """
    Checks that every token has an embedding. More embeddings than tokens are fine, as where they are padded.

    Args:
        described: what the message begins with, whose tokenizer it is.
        model: an encoder, or a captioner, whose decoder has a vocabulary of its own.

    Raises:
        ValueError: the tokenizer has more tokens.
    """
    decoder = getattr(model, "decoder", None)
    configs = {"text tower": model.config.text_config} | ({"decoder": decoder.config} if decoder is not None else {})
    for name, config in configs.items():
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{described}: the tokenizer has {len(tokenizer)} tokens and the {name} embeds "
                f"{config.vocab_size}: they do not belong together. Put the tower's own tokenizer (tokenizer.json, "
                "tokenizer_config.json) into its folder, or make room for added tokens with "
                "model.resize_token_embeddings(len(tokenizer)) and train them."
            )


def check_finite(described: str, model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: a weight is NaN or infinite, so that every embedding would be; with the folder and its first.
    """
    for name, tensor in model.state_dict().items():
        # The smallest and the largest are NaN where one is, and cost a fraction of isfinite.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(
                f"{described} has weights that are NaN or infinite, the first in {name}: take an earlier checkpoint, "
                "or train again."
            )


def _damaged(name: str, file: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split()) if isinstance(error, StrictDataclassError | ValueError) else first_line(error)
    kind = "" if isinstance(error, StrictDataclassError | ValueError) else f"{type(error).__name__}: "
    return ValueError(f"{name} is damaged, or not of this version: {file} can't be used ({kind}{said:.500}). {AGAIN}")


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


__all__ = [
    "ADAPTER_WEIGHTS",
    "AGAIN",
    "PROCESSOR_FILES",
    "WEIGHTS",
    "BaseNotLoaded",
    "check_files",
    "check_finite",
    "check_vocabulary",
    "explained_errors",
    "first_line",
    "no_weights",
    "read_json",
    "try_processor",
]
