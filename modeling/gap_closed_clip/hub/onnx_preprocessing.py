"""Describes what a processor does, in words and numbers: preprocessing.json, tokenizer.json and their README."""

from importlib.metadata import version
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.tower_kinds_gap_closed_clip import is_timm, patch_size
from .onnx_further import describe_further, further_readme, further_rows


VISION_MODEL, TEXT_MODEL = "vision_model.onnx", "text_model.onnx"
PREPROCESSING, TOKENIZER = "preprocessing.json", "tokenizer.json"
PACKAGES = ("onnx", "onnxscript", "timm", "tokenizers", "torch", "transformers")


def describe(
    model: GapClosedClipModel, processor: GapClosedClipProcessor, name: str, max_length: int, opset: int
) -> dict[str, Any]:
    """
    The content of preprocessing.json. A step that the processor leaves out is null.

    Raises:
        ValueError: the image processor resizes or pads in a way that isn't described here, or does anything else.
    """
    step = size_step(model)
    steps = _image_steps(processor.image_processor.to_dict())
    size = example_size(processor)
    _check_steps(processor, steps)
    further = describe_further(processor)
    return {
        "model": name,
        "image": {
            "file": VISION_MODEL,
            "input": "pixel_values",
            "output": "image_embeds",
            **steps,
            "layout": "batch, channel, height, width",
            "dtype": "float32",
            "size": list(size),
            "other_sizes": None if step is None else {"multiple_of": list(step)},
        },
        "text": {
            "file": TEXT_MODEL,
            "inputs": ["input_ids", "attention_mask", "token_type_ids"],
            "output": "text_embeds",
            "tokenizer": TOKENIZER,
            "max_length": max_length,
            "truncation_side": processor.tokenizer.truncation_side,
            "padding": "to the longest of the batch",
            "padding_side": processor.tokenizer.padding_side,
            "padding_id": processor.tokenizer.pad_token_id,
            "dtype": "int64",
        },
        **({"modalities": further} if further else {}),
        "embedding": {"dimension": model.config.projection_dim, "dtype": "float32", "unit_length": True},
        "logit_scale": min(model.logit_scale.detach().double().exp().item(), float(model.config.max_logit_scale)),
        "logit_bias": float(model.logit_bias),
        "hypothesis_template": model.config.hypothesis_template,
        "opset": opset,
        "versions": {"gap_closed_clip": __version__} | {package: version(package) for package in PACKAGES},
    }


def _image_steps(settings: dict[str, Any]) -> dict[str, Any]:
    """From the settings of a CLIP image processor to colour mode, resize, crop, rescaling and normalisation."""
    size = {key: value for key, value in (settings.get("size") or {}).items() if value is not None}
    if settings["do_resize"] and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"The image processor's size is {size}: give shortest_edge, or height and width.")
    if settings.get("do_pad"):
        raise ValueError("The image processor pads images (do_pad), which the ONNX preprocessing can't: set it off.")
    resample = Image.Resampling(int(settings["resample"])).name.lower()
    crop = None
    if settings.get("do_center_crop"):
        crop = {side: settings["crop_size"][side] for side in ("height", "width")}
        if settings.get("image_processor_type") == "GapClosedClipImageProcessor":
            crop["border"] = "round"  # half of an odd border is rounded to an even number, elsewhere down
    return {
        "mode": "RGB",  # whatever do_convert_rgb says: the processor makes every image RGB before
        "resize": {**size, "resample": resample} if settings["do_resize"] else None,
        "center_crop": crop,
        "rescale_factor": settings["rescale_factor"] if settings["do_rescale"] else None,
        "mean": list(settings["image_mean"]) if settings["do_normalize"] else None,
        "std": list(settings["image_std"]) if settings["do_normalize"] else None,
    }


def _check_steps(processor: GapClosedClipProcessor, steps: dict[str, Any]) -> None:
    """Compares the processor's pixels of waves of colour with what the README's example makes of these steps."""
    rows, columns = np.mgrid[:160, :240] * (2 * np.pi / 80)
    waves = np.stack([np.sin(rows), np.sin(columns), np.cos(rows + columns)], axis=-1)
    image = Image.fromarray((127.5 * waves + 128).astype(np.uint8))
    names: dict[str, Any] = {"settings": steps, "image": image, "np": np, "Image": Image}
    exec("\n".join(_example_steps(steps)), names)
    found = names["array"].transpose(2, 0, 1)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"][0].float().numpy()
    # One of 255 levels is 0.4% of the range; see ACCURACY.
    if found.shape != expected.shape or not np.abs(found - expected).max() < 0.02 * np.ptp(expected):
        raise ValueError(
            f"The image processor, {type(processor.image_processor).__name__}, does more than resize, crop, rescale "
            "and normalise, which the ONNX preprocessing can't: train the model with one that does no more, such as "
            "CLIPImageProcessor."
        )


def example_size(processor: GapClosedClipProcessor) -> tuple[int, int]:
    """(height, width) of the images that the processor makes.

    Raises:
        ValueError: they have no fixed size.
    """
    settings = processor.image_processor.to_dict()
    crops = settings.get("do_center_crop")
    size = settings["crop_size"] if crops else settings["size"] if settings["do_resize"] else {}
    if not size.get("height") or not size.get("width"):
        raise ValueError(
            "The image processor's images have no fixed size: set do_center_crop and crop_size, or do_resize and a "
            "size of height and width."
        )
    return size["height"], size["width"]


def size_step(model: GapClosedClipModel) -> tuple[int, int] | None:
    """
    Of an image tower that can be exported for any size, what height and width must be multiples of; None of others.
    """
    if model.image_size is not None:
        return None
    if any(type(module).__name__.endswith("2dSame") for module in model.vision_model.modules()):
        # TensorFlow's padding depends on the size that a layer meets: as a formula of the image's size it grows with
        # every layer, and torch takes many minutes over it.
        return None
    if not is_timm(model.vision_model) and any(
        "Attention" in type(module).__name__ for module in model.vision_model.modules()
    ):
        # Those of transformers that see patches look up, or interpolate, the positions of the size they are shown, and
        # what is exported has those of the example alone.
        return None
    return patch_size(model.vision_model) or (1, 1)


def tokenizer_of(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenizer:
    """
    The tokenizer for use without transformers: it cuts and pads by itself.

    Raises:
        ValueError: there is no such form of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{type(tokenizer).__name__} makes no tokenizer.json: use a fast tokenizer.")
    backend = Tokenizer.from_str(backend.to_str())  # a copy
    # Whatever it was last called with would be saved otherwise, e.g. the shorter captions of training.
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    return backend


def readme(description: dict[str, Any]) -> str:
    """The text of the folder's README.md; its example runs in that folder."""
    image = description["image"]
    other_sizes = image["other_sizes"]
    if other_sizes is None:
        sizes = "no other size"
    elif other_sizes["multiple_of"] == [1, 1]:
        sizes = "or of other sizes"
    else:
        sizes = "or of other sizes, multiples of {} x {}".format(*other_sizes["multiple_of"])
    return README.substitute(
        model=description["model"],
        height=image["size"][0],
        width=image["size"][1],
        sizes=sizes,
        max_length=description["text"]["max_length"],
        dimension=description["embedding"]["dimension"],
        steps="\n".join(f"    {line}" for line in _example_steps(image)),
        opset=description["opset"],
        further_rows="".join(further_rows(description)),
        further=further_readme(description),
        accuracy=ACCURACY_OF_FIXED_SIZE if "width" in (image["resize"] or {}) else ACCURACY,
    )


def _example_steps(image: dict[str, Any]) -> list[str]:
    """Lines of the example's `pixels`, from an image to an array (height, width, 3)."""
    lines = []
    if image["resize"]:
        resize = 'settings["resize"]'
        if "shortest_edge" in image["resize"]:
            lines.append(f'size = [side * {resize}["shortest_edge"] // min(image.size) for side in image.size]')
        else:
            lines.append(f'size = {resize}["width"], {resize}["height"]')
        lines.append(f'image = image.resize(size, Image.Resampling[{resize}["resample"].upper()])')
    if image["center_crop"]:
        lines.append('width, height = settings["center_crop"]["width"], settings["center_crop"]["height"]')
        half = image["center_crop"].get("border", "int")
        lines.append(f"left, top = {half}((image.width - width) / 2), {half}((image.height - height) / 2)")
        lines.append("image = image.crop((left, top, left + width, top + height))")
    factor = "" if image["rescale_factor"] is None else ' * settings["rescale_factor"]'
    lines.append(f"array = np.asarray(image, np.float32){factor}")
    if image["mean"]:
        lines.append('array = (array - settings["mean"]) / settings["std"]')
    return lines


ACCURACY = """, and the cosine between the embeddings of the two was
above 0.99999 where this was measured"""
# torchvision filters along the rows first, Pillow 13 the side that shrinks; both round to 8 bits in between.
ACCURACY_OF_FIXED_SIZE = """. Where one side shrinks and the other
grows it can be a quarter of them, in noise by up to 14 levels"""
README = Template("""\
# $model as ONNX

| file | takes | gives |
| --- | --- | --- |
| `vision_model.onnx` | `pixel_values` (batch, 3, $height, $width) float32, $sizes | \
`image_embeds` (batch, $dimension) |
| `text_model.onnx` | `input_ids`, `attention_mask`, `token_type_ids` (batch, length) int64, length up to \
$max_length | `text_embeds` (batch, $dimension) |
$further_rows
The embeddings are float32 unit vectors in one space: their products are cosines. `preprocessing.json` says what
becomes of an image and of a text before, what the cosines are multiplied by for class probabilities (`logit_scale`),
and the sentence that a class name is put into. `tokenizer.json` is the tokenizer; lower-casing, cutting and padding
are in it. An `.onnx_data` file, if there is one, holds the weights of the `.onnx` beside it and stays with it. Opset
$opset.

```python
import json

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

description = json.load(open("preprocessing.json", encoding="utf-8"))
settings = description["image"]
tokenizer = Tokenizer.from_file("tokenizer.json")
vision_model = onnxruntime.InferenceSession("vision_model.onnx")
text_model = onnxruntime.InferenceSession("text_model.onnx")


def pixels(path):
    image = Image.open(path).convert(settings["mode"])
$steps
    return array.transpose(2, 0, 1).astype(np.float32)


texts = tokenizer.encode_batch(["Chest radiograph.", "Axial MR image of the brain."])
inputs = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
inputs = {name: np.array([getattr(text, field) for text in texts]) for name, field in inputs.items()}
text_embeds = text_model.run(None, inputs)[0]
image_embeds = vision_model.run(None, {"pixel_values": np.stack([pixels("image.png")])})[0]
cosines = image_embeds @ text_embeds.T
logits = description["logit_scale"] * cosines + description["logit_bias"]
```

This is for upright, opaque images of 8 bits. The model's own processor resizes with torchvision, the example with
Pillow: a few pixel values in a thousand come out one of 255 levels apart$accuracy.
$further""")

__all__ = ["describe", "example_size", "readme", "size_step", "tokenizer_of"]
