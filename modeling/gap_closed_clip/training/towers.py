"""Towers and tokenizers by name: Hub ids, folders, folders of installed packages, and descriptions of new ones."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoint import check_model_name, is_local
from ..model.towers_gap_closed_clip import not_loaded
from .arguments import ModelArguments


VOCABULARY_SIZE = 8000


def check_towers(args: ModelArguments) -> None:
    """
    Checks what can be known at once of the model that training starts from.

    Raises:
        ValueError, FileNotFoundError: a tower or the checkpoint is not named, missing or damaged; with its field.
    """
    if args.checkpoint is not None:
        return check_model_name(args.checkpoint)
    for name in ("vision", "text"):
        tower = getattr(args, name)
        if tower is None:
            raise ValueError(
                f"model.{name} is not set: name a pretrained tower (a Hub id or a folder), or describe one to start "
                "from scratch; or set model.checkpoint. A configuration file without towers goes after one that has "
                "them: gap-closed-clip train configs/demo.yaml configs/clip_lt.yaml"
            )
        if isinstance(tower, str):
            pretrained_name(f"model.{name}", tower)


def vision_tower(vision: str | dict[str, Any]) -> str | PreTrainedConfig:
    if isinstance(vision, str):
        return pretrained_name("model.vision", vision)
    return AutoConfig.for_model(**{"model_type": "timm_wrapper", **vision})


def text_tower(
    text: str | dict[str, Any], captions: Iterable[str]
) -> tuple[PreTrainedTokenizerBase, str | PreTrainedConfig]:
    if isinstance(text, str):
        text = pretrained_name("model.text", text)
        return _tokenizer(text), text
    tokenizer = train_tokenizer(captions, text.get("vocab_size", VOCABULARY_SIZE))
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return tokenizer, AutoConfig.for_model(**{"model_type": "bert", **text, **vocabulary})


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A BERT tokenizer (lower case, WordPiece) whose vocabulary is learned from captions, always the same for them."""
    captions = list(captions)
    blank = BertTokenizer()
    normalize = blank.backend_tokenizer.normalizer.normalize_str
    split = blank.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    inside = {letter for caption in captions for word, _ in split(normalize(caption)) for letter in word[1:]}
    # The trainer numbers the letters inside words in the order of a hash table with a random seed, and decides between
    # equally frequent pairs by these numbers. Named first they get theirs from us: a resumed run and every process of
    # a distributed one have to read a caption alike.
    first = [*blank.get_vocab(), *(f"##{letter}" for letter in sorted(inside))]
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    trained = Tokenizer.from_str(blank.backend_tokenizer.to_str())
    trained.train_from_iterator(captions, trainer)
    return BertTokenizer(vocab=trained.get_vocab())


def pretrained_name(field: str, name: str) -> str:
    """A Hub id as it is, or a folder, after a look at what can be missing or half-written in it."""
    name = _package_folder(name)
    if not is_local(name):
        return name
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{field}: there is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{field}: {folder} is no model folder, config.json is missing.")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # reads the header, which tells how long the file has to be
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{field}: {path} is truncated or no safetensors file ({error}). Copy or download it again."
            ) from error
    return name


def _tokenizer(text: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(text)
    except OSError as error:
        raise not_loaded(f"model.text={text!r}", error) from error
    except ValueError:
        tokenizer = None
    # Where a BERT's folder lacks the files, the library makes up a tokenizer of the special tokens alone.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"model.text={text!r} has no tokenizer: put its tokenizer.json or vocab.txt there.")
    return tokenizer


def _package_folder(name: str) -> str:
    """`package:module/folder` is a folder inside an installed Python package, for weights from a package index."""
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


__all__ = ["check_towers", "pretrained_name", "text_tower", "train_tokenizer", "vision_tower"]
