"""What a model folder needs to live on the Hub: its card, its examples, and the way there; and ONNX files beside."""

from .card import write_card
from .examples import write_examples
from .onnx import check_onnx, export_onnx
from .publication import Publication, check_access, publish


__all__ = [
    "Publication",
    "check_access",
    "check_onnx",
    "export_onnx",
    "publish",
    "write_card",
    "write_examples",
]
