"""The image processor and the tokenizer of a published model, and whether a tokenizer belongs to its tower."""

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..model.tower_kinds_gap_closed_clip import FULL_LENGTH, POSITIONS_AFTER_PADDING
from ..model.towers_gap_closed_clip import not_loaded


def load_image_processor(name: str, revision: str | None = None, described: str | None = None) -> BaseImageProcessor:
    """
    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.
        described: what error messages call it; default: the name.

    Raises:
        ValueError: there is none.
    """
    try:
        # Without trust_remote_code=False the library asks on a terminal.
        return AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{described or name} has no image processor: put its preprocessor_config.json there (the image size, "
            "mean and standard deviation that it was trained with)."
        ) from error


def load_tokenizer(name: str, revision: str | None = None, described: str | None = None) -> PreTrainedTokenizerBase:
    """
    As `load_image_processor`, of the tokenizer.

    Raises:
        OSError: the model can't be found.
        ValueError: it has no tokenizer.
    """
    described = described or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise not_loaded(described, error) from error
    except (ValueError, TypeError):
        tokenizer = None
    # Where a folder lacks the files, the library makes up a tokenizer of the special tokens alone.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{described} has no tokenizer: put its tokenizer.json or vocab.txt there.")
    return tokenizer


def agree_on_padding(described: str, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Tells a tower that pads by itself which token its tokenizer pads with.

    Args:
        described: what error messages call the tower.

    Raises:
        ValueError: a tower that numbers positions from its padding token, with a tokenizer that has another one.
    """
    if text_config.model_type in FULL_LENGTH:
        text_config.pad_token_id = tokenizer.pad_token_id
    elif text_config.model_type in POSITIONS_AFTER_PADDING and text_config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            f"{described}: the tokenizer pads with token {tokenizer.pad_token_id}, the {text_config.model_type} with "
            f"{text_config.pad_token_id}, behind which it numbers positions: they do not belong together."
        )


__all__ = ["agree_on_padding", "load_image_processor", "load_tokenizer"]
