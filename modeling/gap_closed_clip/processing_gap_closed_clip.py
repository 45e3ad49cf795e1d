"""[`GapClosedClipProcessor`]: images and captions to what [`GapClosedClipModel`] takes."""

import os

from transformers import CLIPImageProcessor, ProcessorMixin


class GapClosedClipProcessor(ProcessorMixin):
    """
    A CLIP image processor and a BERT tokenizer in one.

    Args:
        image_processor ([`CLIPImageProcessor`]): resizes, crops and normalises images to (3, height, width).
        tokenizer ([`PreTrainedTokenizerBase`]): of the text tower.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> list[str]:
        """As `ProcessorMixin.save_pretrained`; where the code is stands in what is written, not in the processor."""
        if self.tokenizer.is_fast:
            # How the last texts were cut and padded would otherwise go into tokenizer.json.
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        files = super().save_pretrained(save_directory, *args, **kwargs)
        # from_pretrained doesn't bring the entry back: left here, a processor would differ from what is loaded of it.
        vars(self).pop("auto_map", None)
        return files


def image_processor_for(vision_model) -> CLIPImageProcessor:
    """
    The image processor that fits a `TimmWrapperModel`: its input size, and the mean and standard deviation it was
    trained with.

    The short side is resized to the input size (bicubic) and the centre cropped, as in CLIP: timm's own `crop_pct`
    would cut another tenth off the border, which holds anatomy.
    """
    # A Hub checkpoint's own settings stay in its config; a tower from scratch has those of its architecture.
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

__all__ = ["GapClosedClipProcessor", "image_processor_for"]
