"""[`GapClosedClipProcessor`]: images and captions to what [`GapClosedClipModel`] takes."""

import os
import re

from transformers import CLIPImageProcessor, ProcessorMixin


# A BERT tokenizer splits a text at every punctuation mark, and when it decodes puts spaces between nearly all parts:
# "x - ray", "2. 5 cm", "( arrow )". These patterns join what is almost always written without spaces.
_JOINED = (
    (re.compile(r"(?<=\w) ([-/&]) (?=\w)"), r"\1"),  # t2-weighted, c5/c6
    (re.compile(r"(?<=\d)([.,]) (?=\d)"), r"\1"),  # 2.5
    (re.compile(r"(?<=\w) ' (?=\w)"), "'"),  # o'clock
    (re.compile(r"([(\[]) "), r"\1"),
    (re.compile(r" ([)\]:;%])"), r"\1"),
)


def join_words(text: str) -> str:
    """A text that a BERT tokenizer has decoded, with punctuation as people write it: `x-ray (arrow)`."""
    for pattern, joined in _JOINED:
        text = pattern.sub(joined, text)
    return text


class GapClosedClipProcessor(ProcessorMixin):
    """
    A CLIP image processor and a BERT tokenizer in one.

    Args:
        image_processor ([`CLIPImageProcessor`]): resizes, crops and normalises images to (3, height, width).
        tokenizer ([`PreTrainedTokenizerBase`]): of the text tower.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

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


def image_processor_for(vision_model) -> CLIPImageProcessor:
    """
    The image processor that fits a `TimmWrapperModel`: its input size, and the mean and standard deviation it was
    trained with.

    The short side is resized to the input size (bicubic) and the center cropped, as in CLIP: timm's own `crop_pct`
    would cut another tenth off the border, which shows anatomy.
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

__all__ = ["GapClosedClipProcessor", "image_processor_for", "join_words"]
