"""[`GapClosedClipImageProcessor`]: the image preprocessing of open_clip and OpenAI's CLIP, to the pixel."""

import numpy as np
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class GapClosedClipImageProcessor(CLIPImageProcessorPil):
    """
    What torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` make of a PIL image, as open_clip uses them.

    transformers' CLIP image processor differs in two ways. It resizes tensors, whose values differ from Pillow's by up
    to a few levels; the class of it that resizes by Pillow loses that on saving. And it rounds the border of a center
    crop down, where torchvision rounds to the nearest even number: an image whose side is 3, 7, 11, ... pixels longer
    than the crop is cut one pixel away.

    The arguments are those of [`CLIPImageProcessor`].
    """

    def center_crop(self, image: np.ndarray, size, **kwargs) -> np.ndarray:
        """
        The center of `image` (C, height, width).

        Raises:
            ValueError: the image is smaller than the crop.
        """
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            raise ValueError(
                f"The image is {height} x {width} pixels after resizing, less than crop_size {size.height} x "
                f"{size.width}: set size['shortest_edge'] to at least the longer side of crop_size."
            )
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[..., top : top + size.height, left : left + size.width]


GapClosedClipImageProcessor.register_for_auto_class()

__all__ = ["GapClosedClipImageProcessor"]
