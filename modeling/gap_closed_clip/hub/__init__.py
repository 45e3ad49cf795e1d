"""What a model folder needs to live on the Hub: its card. And the way out: ONNX."""

from .card import write_card
from .onnx import check_onnx, export_onnx


__all__ = ["check_onnx", "export_onnx", "write_card"]
