"""From models of other libraries to the parts of a [`GapClosedClipModel`]."""

from .open_clip import is_open_clip, open_clip_parts
from .parts import ClipParts


__all__ = ["ClipParts", "is_open_clip", "open_clip_parts"]
