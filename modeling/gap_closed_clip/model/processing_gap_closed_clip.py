"""[`GapClosedClipProcessor`]: images and captions to what [`GapClosedClipModel`] takes."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs

from .load_images_gap_closed_clip import AROUND_0_TO_1, find_channels, load_image
from .modality_processing_gap_closed_clip import (
    as_samples,
    describe_modality_processors,
    encode_modality,
    load_modality_processors,
    names_of,
    to_ordered_json,
)


# A BERT tokenizer splits a text at every punctuation mark, and when it decodes puts spaces between nearly all parts:
# "x - ray", "2. 5 cm", "( arrow )". These patterns join what is almost always written without spaces.
_JOINED = (
    (re.compile(r"(?<=\w) ([-/&]) (?=\w)"), r"\1"),  # t2-weighted, c5/c6
    (re.compile(r"(?<=\d)([.,]) (?=\d)"), r"\1"),  # 2.5
    (re.compile(r"(?<=\w) ' (?=\w)"), "'"),  # o'clock
    (re.compile(r"([(\[]) "), r"\1"),
    (re.compile(r" ([)\]:;%])"), r"\1"),
)


# Keyword arguments that are no modality.
OPTIONS = {*ImagesKwargs.__annotations__, *ProcessingKwargs.__annotations__, *TextKwargs.__annotations__}
OPTIONS |= {"common_kwargs", "return_metadata"}


def join_words(text: str) -> str:
    """A text that a BERT tokenizer has decoded, with punctuation as people write it: `x-ray (arrow)`."""
    for pattern, joined in _JOINED:
        text = pattern.sub(joined, text)
    return text


class GapClosedClipProcessor(ProcessorMixin):
    """
    A CLIP image processor and a BERT tokenizer in one; and the processors of further modalities.

    Args:
        image_processor ([`CLIPImageProcessor`]): resizes, crops and normalises images to (3, height, width).
        tokenizer ([`PreTrainedTokenizerBase`]): of the text tower.
        modality_processors (`dict[str, Any]`, *optional*): by the names of further modalities, in the order of
            `config.modalities`: [`RecordProcessor`], [`ArrayProcessor`], image processors and feature extractors of
            transformers, or what their `to_dict` gives. They are saved in processor_config.json.

    Raises:
        ValueError: a modality of a name that means something else, or a processor of no known type.
    """

    def __init__(self, image_processor=None, tokenizer=None, modality_processors=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        # ProcessorMixin would cut texts there, and not at the tokenizer's model_max_length as everything else does.
        self.tokenizer.init_kwargs.pop("max_length", None)
        self.modality_processors = load_modality_processors(modality_processors)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """
        As `ProcessorMixin.__call__`, for images of more kinds, which are seen as training sees them, and for further
        modalities, each by its name:

        ```python
        >>> processor(images=[image, None], text=texts, record=[{"age": 62, "sex": "female"}, None], padding=True)
        ```

        A sample that lacks something has None in its place; then all that is given is of equally many samples, and
        `modality_mask` (B, M), in the order image, text, further ones, tells what is there.

        Args:
            images: one image or a list of them: what [`load_image`] takes (paths, URLs, DICOM and 16-bit files, their
                bytes, Pillow images, arrays and tensors, gray or colour), or a batch (B, 3, H, W) or (B, 1, H, W).
                Colour arrays of values from 0 to 255 are taken as transformers takes them; floats of no more than 2
                are 0 to 1, and what a resize has taken a little beyond is clipped. With `do_rescale=False` arrays
                keep their values, and gray ones become three equal channels.
            text: a text, or a list of them.
            kwargs: by the names of further modalities one sample or a list of them; a record is a mapping of fields to
                values, and of several also columns or a data frame. Others are options of the image processor and the
                tokenizer.

        Returns:
            `pixel_values`, `input_ids`, ...; `{modality}_{input of its tower}`; `modality_mask` if a sample lacks
            something. Further modalities and samples that lack something are always tensors.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: something that is no image or can't be read, an array of another shape, colour values that
                are neither 0 to 1 nor 0 to 255, or a modality that the processor does not know.
            ImportError: a DICOM file, where pydicom is not installed.
        """
        further = {name: kwargs.pop(name) for name in self.modality_processors if kwargs.get(name) is not None}
        self._check_known(kwargs, images is None and text is None and not further)
        if not further and not _lacks(images) and not _lacks(text):
            return self._encode_pairs(images, text, **kwargs)
        samples: dict[str, list] = {
            name: as_samples(self.modality_processors[name], given) for name, given in further.items()
        }
        lacking_images, images = _fill_in(images, Image.new("RGB", (32, 32)))
        lacking_texts, text = _fill_in(text, "")
        for name, lacking in (("image", lacking_images), ("text", lacking_texts)):
            samples |= {} if lacking is None else {name: [None if lacks else True for lacks in lacking]}
        encoded: dict[str, Any] = {}
        if any(value is None for values in samples.values() for value in values):
            encoded["modality_mask"] = self._mask(samples)
        for name in further:
            encoded |= encode_modality(name, self.modality_processors[name], samples[name])
        if images is not None or text is not None:
            if "modality_mask" in encoded or kwargs.get("return_tensors") is None:
                kwargs["return_tensors"] = "pt"
            encoded |= self._encode_pairs(images, text, **kwargs)
        if lacking_images is not None and any(lacking_images):
            encoded["pixel_values"][lacking_images] = 0
        return BatchFeature(encoded)

    def _check_known(self, kwargs: dict[str, Any], is_alone: bool) -> None:
        """Refuses records of a modality that there is not; where nothing else is given, whatever is no option."""
        for name, value in kwargs.items():
            if name in OPTIONS or value is None:
                continue
            records = value if isinstance(value, list | tuple) else [value]
            known = ", ".join(names_of(self.modality_processors))
            if is_alone or any(isinstance(record, dict) for record in records):
                raise ValueError(
                    f"The processor knows no modality '{name}'; it knows {known} "
                    "(images=..., text=..., others by their name, see modality_processors in processor_config.json)."
                )

    def _mask(self, samples: dict[str, list]) -> torch.Tensor:
        """(B, M) bool: which modalities each sample has."""
        numbers = {name: len(values) for name, values in samples.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(
                f"There are different numbers of samples ({', '.join(f'{name}: {n}' for name, n in numbers.items())})"
                ", of which some lack something (None): give a value or None for each sample."
            )
        nothing = [None] * next(iter(numbers.values()))
        names = names_of(self.modality_processors)
        return torch.tensor([[value is not None for value in samples.get(name, nothing)] for name in names]).T

    def _encode_pairs(self, images: Any, text: Any, **kwargs) -> BatchFeature:
        """As `__call__`, of images and texts alone, none of which is lacking."""
        for name, value in (("images", images), ("text", text)):
            if isinstance(value, list | tuple) and not value:
                raise ValueError(f"{name} is an empty list: give one or more, or leave {name} out.")
        if images is not None:
            rescaled = {**kwargs, **kwargs.get("images_kwargs", {})}.get("do_rescale")
            if rescaled is None:
                rescaled = getattr(self.image_processor, "do_rescale", True)
            images = _prepare_images(images, bool(rescaled), "images")
        return super().__call__(images=images, text=text, **kwargs)

    @staticmethod
    def load_image(image, window: tuple[float, float] | None = None):
        """
        An upright 8-bit RGB image as training makes it, see [`load_image`]: for transformers' own pipelines, whose
        loader makes 16-bit images white and knows no DICOM.

        ```python
        >>> classify(processor.load_image("scan.dcm"), candidate_labels=["chest", "brain"])
        ```
        """
        return load_image(image, window)

    def decode(self, *args, clean_up_tokenization_spaces: bool | None = None, **kwargs) -> str | list[str]:
        """
        As the tokenizer's, with words and numbers whole: `x-ray (2.5 cm)`, not `x - ray ( 2. 5 cm )`. Metrics would
        count the latter as errors. (Not with `clean_up_tokenization_spaces=False`.)
        """
        clean_up = clean_up_tokenization_spaces
        text = self.tokenizer.decode(*args, clean_up_tokenization_spaces=clean_up, **kwargs)
        if clean_up is False:
            return text
        return join_words(text) if isinstance(text, str) else [join_words(part) for part in text]

    def batch_decode(self, sequences, *args, **kwargs) -> list[str]:
        """`decode` of each sequence."""
        return [str(self.decode(tokens, *args, **kwargs)) for tokens in sequences]

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """`decode` of what was generated; the pipeline calls it."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> list[str]:
        """As `ProcessorMixin.save_pretrained`. The processor itself is left as it was."""
        if self.tokenizer.is_fast:
            # The truncation and padding of the last texts would otherwise be saved in tokenizer.json.
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        files = super().save_pretrained(save_directory, *args, **kwargs)
        # Saving adds the entry, which says where the code is, and from_pretrained does not read it back: with it, a
        # processor would differ from the same one loaded.
        self.__dict__.pop("auto_map", None)
        return files

    def to_dict(self) -> dict[str, Any]:
        """As `ProcessorMixin.to_dict`; the processors of further modalities are in it if there are any."""
        described = super().to_dict()
        described.pop("modality_processors", None)
        if self.modality_processors:
            described["modality_processors"] = describe_modality_processors(self.modality_processors)
        return described

    def to_json_string(self) -> str:
        """As `ProcessorMixin.to_json_string`; modalities and their fields keep their order, which counts."""
        return to_ordered_json(self.to_dict(), kept="modality_processors")


def _lacks(values: Any) -> bool:
    return isinstance(values, list | tuple) and any(value is None for value in values)


def _fill_in(values: Any, filling: Any) -> tuple[list[bool] | None, Any]:
    """Which of some values are None (None: there are no values at all), and the values with `filling` instead."""
    if values is None:
        return None, None
    if not isinstance(values, list | tuple):
        number = len(values) if isinstance(values, np.ndarray | torch.Tensor) and values.ndim == 4 else 1
        return [False] * number, values
    return [value is None for value in values], [filling if value is None else value for value in values]


def _prepare_images(images: Any, rescaled: bool, name: str) -> Any:
    """What an image processor takes: images, lists and batches as they were given, each image RGB.

    Args:
        images: one, several, or lists of them.
        rescaled: whether the image processor will divide by 255.
        name: what error messages call them.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray):
        return [_prepare_images(image, rescaled, f"{name}[{index}]") for index, image in enumerate(images)]
    if not isinstance(images, np.ndarray | torch.Tensor):
        return load_image(images, name=name)
    if images.ndim == 4:
        if 3 in (images.shape[1], images.shape[3]) and _fits(images, rescaled):
            return images  # whole, and on its device
        return [_prepare_images(image, rescaled, f"{name}[{index}]") for index, image in enumerate(images)]
    try:
        channels, axis = find_channels(tuple(images.shape))
    except ValueError as error:
        raise ValueError(f"{name} is no image: {error}, or as (B, 3, H, W).") from error
    if channels == 3 and _fits(images, rescaled):
        return images
    if rescaled:
        return load_image(images, name=name)
    if channels == 4:
        raise ValueError(f"{name} has transparency, which do_rescale=False leaves no place for: give three channels.")
    gray = images[None] if images.ndim == 2 else images
    axis = 0 if images.ndim == 2 else axis
    return gray.repeat(3, axis) if isinstance(gray, np.ndarray) else gray.repeat_interleave(3, axis)


def _fits(colour: np.ndarray | torch.Tensor, rescaled: bool) -> bool:
    """Whether an image processor makes of colour values what is meant: they are 0 to 255, or not rescaled at all."""
    if not rescaled or str(colour.dtype).endswith("uint8"):
        return True
    low, high = float(colour.min()), float(colour.max())
    if str(colour.dtype).rpartition(".")[2].startswith(("float", "bfloat")):
        return low >= 0 and (AROUND_0_TO_1[1] < high <= 255 or high == 0)  # 0 to 1 would be divided once more
    return False  # of other integers a resize makes numbers below 0, which wrap around


def image_processor_for(vision_model) -> CLIPImageProcessor:
    """
    The image processor that fits a `TimmWrapperModel`: its input size, and the mean and standard deviation it was
    trained with. One of transformers has its own, `AutoImageProcessor.from_pretrained(name)`.

    The short side is resized to the input size (bicubic) and the center cropped, as in CLIP: timm's own `crop_pct`
    would cut another tenth off the border, which shows anatomy.

    Raises:
        ValueError: it is no model of timm's.
    """
    # A Hub checkpoint's own settings stay in its config; a tower from scratch has those of its architecture.
    if not hasattr(vision_model, "timm_model"):
        raise ValueError(
            f"image_processor_for is for timm's models, and this is a {type(vision_model).__name__}: take its own, "
            "AutoImageProcessor.from_pretrained(...) of the folder or Hub id that the model is from."
        )
    pretrained = vision_model.timm_model.pretrained_cfg | getattr(vision_model.config, "pretrained_cfg", {})
    patch_embed = getattr(vision_model.timm_model, "patch_embed", None)  # convolutional networks have none
    height, width = pretrained["input_size"][1:] if patch_embed is None else patch_embed.img_size
    return CLIPImageProcessor(
        size={"shortest_edge": min(height, width)} if height == width else {"height": height, "width": width},
        crop_size={"height": height, "width": width},
        image_mean=list(pretrained["mean"]),
        image_std=list(pretrained["std"]),
    )


GapClosedClipProcessor.register_for_auto_class()

__all__ = ["GapClosedClipProcessor", "image_processor_for", "join_words"]
