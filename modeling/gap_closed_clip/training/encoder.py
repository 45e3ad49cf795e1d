"""From the `model:` section of a configuration to an encoder and its processor: towers, tokenizer, checkpoint."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..checkpoint import check_model_name, load_checkpoint
from ..conversion.preprocessing import agree_on_padding, load_image_processor, load_tokenizer
from ..data import DataArguments, count_truncated
from ..folder_errors import check_vocabulary, first_line
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor, image_processor_for
from ..model.record_processing_gap_closed_clip import RecordProcessor
from ..model.tower_kinds_gap_closed_clip import is_timm, longest_text
from .arguments import ModelArguments
from .modalities import FurtherColumns, check_modalities, check_records, try_modalities
from .modality_towers import Further, new_modalities, with_modalities
from .release import release_towers
from .tower_descriptions import pretrained_name


logger = logging.get_logger(__name__)

VOCABULARY_SIZE = 8000
MOST_LETTERS = 100  # of a word that WordPiece looks up (its max_input_chars_per_word)
Model = TypeVar("Model", bound=PreTrainedModel)


def check_towers(args: ModelArguments, columns: Mapping[str, Any] | None = None) -> None:
    """
    Checks what can be known at once of the model that training starts from.

    Args:
        columns: `data.modalities`, by the names of further modalities.

    Raises:
        ValueError, FileNotFoundError: a tower or the checkpoint is not named, missing or damaged, or does not belong
            to the data; with its field.
    """
    if args.checkpoint is not None:
        check_model_name(args.checkpoint)
    check_modalities(args, columns or {})
    for name, entry in (args.modalities or {}).items():
        if isinstance(entry.get("tower"), str):
            pretrained_name(f"model.modalities.{name}.tower", entry["tower"])
    if args.checkpoint is not None:
        return
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


def build_model_and_processor(
    args: ModelArguments, captions: Iterable[str], given: FurtherColumns | None = None
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """
    The model that training starts from, and its processor.

    Args:
        args: the `model:` section.
        captions: of the training pairs; read only for a text tower from scratch, which needs a vocabulary.
        given: what training pairs have beyond image and text.

    Raises:
        ValueError: a tower is missing, damaged or of the wrong kind, can't embed an image, or `args.config` does not
            fit; further modalities that don't fit the data.
        OSError: a tower or checkpoint that can't be found, is incomplete, or can't be downloaded.
    """
    given = given or FurtherColumns()
    check_towers(args, given.columns)
    if args.checkpoint is not None:
        model, processor = _load_checkpoint(args.checkpoint, args, given)
    else:
        model, processor = _from_towers(args, captions, new_modalities(args, given, {}))
    try_modalities(model, processor, given)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_text(model.config.text_config))
    if args.image_size is not None:
        set_image_size(model, processor, args.image_size)
    try_image_tower(model, processor)
    release_towers(model, args, given.columns)
    return model, processor


def try_image_tower(model: GapClosedClipModel, processor: GapClosedClipProcessor) -> None:
    """
    Embeds a blank image, which shows now whether the image tower gives what its configuration says.

    Raises:
        ValueError: it doesn't.
    """
    pixel_values = processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval().get_image_features(pixel_values=pixel_values.to(model.device))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        kind = getattr(model.config.vision_config, "architecture", None) or model.config.vision_config.model_type
        size = " x ".join(map(str, pixel_values.shape[-2:]))
        raise ValueError(
            f"The image tower, a {kind} model, can't embed an image of {size} pixels ({error}): name another with "
            "model.vision."
        ) from error
    finally:
        model.train(was_training)


def _load_checkpoint(
    checkpoint: str, args: ModelArguments, given: FurtherColumns
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    model, processor = load_checkpoint(checkpoint, allow_pickle=args.allow_pickle)
    in_float32(model, checkpoint)
    trained = processor.modality_processors
    for name in given.columns:
        if isinstance(trained.get(name), RecordProcessor):
            check_records(checkpoint, name, trained[name], given)
    new = new_modalities(args, given, trained)
    changes, weights = dict(args.config), {}
    if new:
        changes["modalities"] = with_modalities(model.config, new)
        processor = GapClosedClipProcessor(
            processor.image_processor, processor.tokenizer, {**trained, **_processors(new)}
        )
        weights = _weights(new)
    if changes:
        model = with_config(model, changes, checkpoint, weights)
    # from_pretrained gives every parameter a gradient; DistributedDataParallel would wait for that of a fixed scale.
    model.logit_scale.requires_grad_(model.config.learnable_temperature)
    return model, processor


def _processors(new: Mapping[str, Further]) -> dict[str, Any]:
    return {name: further.processor for name, further in new.items()}


def _weights(new: Mapping[str, Further]) -> dict[str, torch.Tensor]:
    """The weights that towers of new modalities bring, by their names in the model."""
    return {
        f"modality_towers.{name}.tower.{key}": tensor
        for name, further in new.items()
        if further.tower is not None
        for key, tensor in further.tower.state_dict().items()
    }


def in_float32(model: PreTrainedModel, checkpoint: str) -> None:
    """Makes the weights float32, as they are to be trained: in bfloat16 most steps would be rounded away."""
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        logger.warning(f"{checkpoint} is stored in {dtype}. Its weights are trained, and saved, in float32.")
        model.float()


def with_config(
    model: Model, changes: dict[str, Any], checkpoint: str, new_weights: dict[str, torch.Tensor] | None = None
) -> Model:
    """
    The checkpoint's model with other fields of [`GapClosedClipConfig`].

    Args:
        new_weights: for what the changes add to the model, or in place of its own weights.

    Raises:
        ValueError: they do not go together, or not with the weights.
    """
    config = GapClosedClipConfig.from_dict(model.config.to_dict() | changes)  # checks the values together
    try:
        state = model.state_dict() | (new_weights or {})
        return type(model).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"model.checkpoint: the weights of {checkpoint} do not fit {changes}. Leave out what changes their "
            "shapes, such as projection_dim."
        ) from error


def _from_towers(
    args: ModelArguments, captions: Iterable[str], new: Mapping[str, Further]
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    assert args.vision is not None and args.text is not None  # check_towers has seen to it
    vision = _vision_tower(args.vision)
    tokenizer, text = _text_tower(args.text, captions)
    named = f"model.vision={args.vision!r} or model.text={args.text!r}"
    try:
        model = GapClosedClipModel.from_vision_text_pretrained(
            vision,
            text,
            keep_vision_projection=args.keep_vision_projection,
            modality_towers={name: further.tower for name, further in new.items() if further.tower is not None},
            modalities={name: further.entry for name, further in new.items()},
            **args.config,
        )
    except OSError as error:
        raise OSError(f"{named}: {error}") from error
    except (AssertionError, RuntimeError, TypeError) as error:  # model_args that timm refuses, weights that do not fit
        raise ValueError(f"{named} cannot be built: {first_line(error)}") from error
    except ValueError as error:  # sizes that don't go together; what we refuse ourselves is named
        if "model." in str(error):
            raise
        raise ValueError(f"{named}: {error}") from error
    check_vocabulary(f"model.text={args.text!r}", tokenizer, model)
    agree_on_padding(f"model.text={args.text!r}", model.config.text_config, tokenizer)
    image_processor = _image_processor(model.vision_model, vision)
    return model, GapClosedClipProcessor(image_processor, tokenizer, _processors(new) or None)


def _image_processor(vision_model: PreTrainedModel, name: str | PreTrainedConfig) -> BaseImageProcessor:
    """The image processor that fits a tower: of a model of transformers its own."""
    if is_timm(vision_model):
        return image_processor_for(vision_model)
    assert isinstance(name, str)  # towers of transformers from scratch are text towers alone
    return load_image_processor(name, described=f"model.vision={name!r}")


def set_image_size(model: GapClosedClipModel, processor: GapClosedClipProcessor, image_size: int) -> None:
    """
    Makes the processor give square images of `image_size` pixels a side.

    Raises:
        ValueError: the image tower does not take them.
    """
    training = model.training
    try:
        with torch.no_grad():  # in eval mode: an image of zeros must not move batch statistics
            model.eval().get_image_features(torch.zeros(1, 3, image_size, image_size, dtype=model.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model.image_size is {image_size}, and the image tower takes no images of that size ({error}) Leave it "
            "out, use another size, or a tower that takes any: a convolutional one, or one with "
            "model_args={'dynamic_img_size': True}."
        ) from error
    finally:
        model.train(training)
    settings = processor.image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    size = {"shortest_edge": image_size} if settings["size"].get("shortest_edge") else square
    crop = {"crop_size": square} if settings.get("do_center_crop") else {}
    processor.image_processor = type(processor.image_processor).from_dict({**settings, "size": size, **crop})


def set_caption_length(
    pairs: Dataset | IterableDataset,
    model: GapClosedClipModel,
    processor: GapClosedClipProcessor,
    data: DataArguments,
    trained: bool = True,
) -> None:
    """
    Makes the tokenizer cut texts where training cuts captions: a tower from scratch has never seen longer ones. Logs
    how many captions lose their end, unless the pairs are a stream.

    Args:
        trained: whether the encoders train. If they stay as they are, no limit is lowered: captions alone are cut.

    Raises:
        ValueError: `data.max_caption_tokens` is more than the text tower takes.
    """
    limit = processor.tokenizer.model_max_length
    if data.max_caption_tokens is not None:
        if data.max_caption_tokens > model.max_text_length:
            raise ValueError(
                f"data.max_caption_tokens is {data.max_caption_tokens}, but the text tower takes "
                f"{model.max_text_length} tokens at most: set data.max_caption_tokens={model.max_text_length}."
            )
        if trained or data.max_caption_tokens > limit:
            processor.tokenizer.model_max_length = limit = data.max_caption_tokens
        limit = min(limit, data.max_caption_tokens)
    if isinstance(pairs, IterableDataset):
        return
    truncated = count_truncated(pairs, processor.tokenizer, limit)
    if truncated:
        logger.warning(
            f"{truncated} of {len(pairs)} training captions are longer than {limit} tokens and lose their end."
        )


def _vision_tower(vision: str | dict[str, Any]) -> str | PreTrainedConfig:
    if isinstance(vision, str):
        return pretrained_name("model.vision", vision)
    return AutoConfig.for_model(**{"model_type": "timm_wrapper", **vision})


def _text_tower(
    text: str | dict[str, Any], captions: Iterable[str]
) -> tuple[PreTrainedTokenizerBase, str | PreTrainedConfig]:
    if isinstance(text, str):
        text = pretrained_name("model.text", text)
        return load_tokenizer(text, described=f"model.text={text!r}"), text
    tokenizer = train_tokenizer(captions, text.get("vocab_size", VOCABULARY_SIZE))
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return tokenizer, AutoConfig.for_model(**{"model_type": "bert", **text, **vocabulary})


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A BERT tokenizer (lower case, WordPiece) whose vocabulary is learned from captions, always the same for them."""
    blank = BertTokenizer()
    normalize = blank.backend_tokenizer.normalizer.normalize_str
    split = blank.backend_tokenizer.pre_tokenizer.pre_tokenize_str

    def without_long_words(caption: str) -> str:
        """What the tokenizer reads of it: a longer word is [UNK] to it, and one of a megabyte would take minutes."""
        if len(max(caption.split(), key=len, default="")) <= MOST_LETTERS:
            return caption
        return " ".join(word for word, _ in split(normalize(caption)) if len(word) <= MOST_LETTERS)

    captions = [without_long_words(caption) for caption in captions]
    inside = {letter for caption in captions for word, _ in split(normalize(caption)) for letter in word[1:]}
    # The trainer numbers the letters inside words in the order of a hash table with a random seed, and decides between
    # equally frequent pairs by these numbers. Named first they get theirs from us: a resumed run and every process of
    # a distributed one have to read a caption alike.
    first = [*blank.get_vocab(), *(f"##{letter}" for letter in sorted(inside))]
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    trained = Tokenizer.from_str(blank.backend_tokenizer.to_str())
    trained.train_from_iterator(captions, trainer)
    return BertTokenizer(vocab=trained.get_vocab())


__all__ = [
    "build_model_and_processor",
    "check_towers",
    "pretrained_name",
    "set_caption_length",
    "set_image_size",
    "train_tokenizer",
    "with_config",
]
