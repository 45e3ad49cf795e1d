"""From the `model:` section of a configuration to a model and the processor that fits it."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..modeling_gap_closed_clip import GapClosedClipModel
from ..processing_gap_closed_clip import GapClosedClipProcessor, image_processor_for
from .arguments import ModelArguments


VOCABULARY_SIZE = 8000


def build_model_and_processor(
    args: ModelArguments, captions: Iterable[str]
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """
    The model that training starts from, and its processor.

    Args:
        args: the `model:` section.
        captions: of the training pairs; read only for a text tower from scratch, which needs a vocabulary.

    Raises:
        ValueError: a tower is missing or of the wrong kind.
        OSError: a checkpoint that can't be found, is incomplete, or can't be downloaded.
    """
    if args.checkpoint is not None:
        model, processor = _load_checkpoint(args)
    else:
        for name in ("vision", "text"):
            if getattr(args, name) is None:
                raise ValueError(
                    f"model.{name} is not set: name a pretrained tower (a Hub id or a folder), or describe one to "
                    f"start "
                    "from scratch; or set model.checkpoint."
                )
        tokenizer, text = _text_tower(args.text, captions)
        try:
            model = GapClosedClipModel.from_vision_text_pretrained(
                _vision_tower(args.vision), text, keep_vision_projection=args.keep_vision_projection, **args.config
            )
        except OSError as error:
            raise _not_loaded(f"model.vision={args.vision!r} or model.text={args.text!r}", error) from error
        processor = GapClosedClipProcessor(image_processor_for(model.vision_model), tokenizer)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_text(model.config.text_config))
    if args.freeze_vision or args.freeze_text:
        model.freeze_towers(vision=args.freeze_vision, text=args.freeze_text)
    return model, processor


def longest_text(text_config: PreTrainedConfig) -> int:
    """Tokens that a text tower takes. RoBERTa numbers positions from behind its padding id."""
    reserved = text_config.pad_token_id + 1 if text_config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return text_config.max_position_embeddings - reserved


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A BERT tokenizer (lower case, WordPiece) whose vocabulary is learned from captions."""
    captions = list(captions)
    batches = (captions[i : i + 1000] for i in range(0, len(captions), 1000))
    return BertTokenizer().train_new_from_iterator(batches, vocab_size=vocab_size, show_progress=False)


def _load_checkpoint(args: ModelArguments) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    try:
        model = GapClosedClipModel.from_pretrained(args.checkpoint, **args.config)
        return model, GapClosedClipProcessor.from_pretrained(args.checkpoint)
    except OSError as error:
        raise _not_loaded(f"model.checkpoint={args.checkpoint!r}", error) from error


def _vision_tower(vision: str | dict[str, Any]) -> str | PreTrainedConfig:
    if isinstance(vision, str):
        return _package_folder(vision)
    if "architecture" not in vision:
        raise ValueError(
            "model.vision describes a tower without `architecture`: name one of timm, e.g. eva02_tiny_patch14_224."
        )
    return AutoConfig.for_model("timm_wrapper", **vision)


def _text_tower(
    text: str | dict[str, Any], captions: Iterable[str]
) -> tuple[PreTrainedTokenizerBase, str | PreTrainedConfig]:
    if isinstance(text, dict):
        tokenizer = train_tokenizer(captions, text.get("vocab_size", VOCABULARY_SIZE))
        return tokenizer, AutoConfig.for_model(
            "bert", **{**text, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        )
    text = _package_folder(text)
    try:
        return AutoTokenizer.from_pretrained(text), text
    except OSError as error:
        raise _not_loaded(f"model.text={text!r}", error) from error


def _package_folder(name: str) -> str:
    """`package:module/folder` is a folder inside an installed Python package, for weights that come from a package "
    "index."""
    if not name.startswith("package:"):
        return name
    module, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{name}: there is no installed package {module}. Try: pip install {module.replace('_', '-')}"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise ValueError(f"{name}: the package {module} has no folder {folder or '.'}.")
    return str(path)


def _not_loaded(what: str, error: OSError) -> OSError:
    return OSError(
        f"{what} could not be loaded. Is it a folder with config.json and model.safetensors, or a Hub id, and is the "
        f"Hub "
        f"within reach (network, HF_TOKEN for private ones, HF_HUB_OFFLINE unset)? The library says: {error}"
    )


__all__ = ["build_model_and_processor", "longest_text", "train_tokenizer"]
