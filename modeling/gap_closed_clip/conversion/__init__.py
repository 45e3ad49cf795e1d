"""From CLIPs of transformers and of open_clip to a [`GapClosedClipModel`]."""

from .assembly import assemble, from_clip, is_foreign
from .open_clip import is_open_clip, open_clip_parts
from .parts import ClipParts, Reference


__all__ = ["ClipParts", "Reference", "assemble", "from_clip", "is_foreign", "is_open_clip", "open_clip_parts"]
