"""What a model folder needs to live on the Hub: its card."""

from .card import write_card


__all__ = ["write_card"]
