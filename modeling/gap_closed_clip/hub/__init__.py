"""What a model folder needs to live on the Hub: its card, its examples, and the way there."""

from .card import write_card
from .examples import write_examples
from .publication import Publication, check_access, publish


__all__ = ["Publication", "check_access", "publish", "write_card", "write_examples"]
