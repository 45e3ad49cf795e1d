"""Export all towers of a trained model to ONNX, with what is needed to use them without torch.

    gap-closed-clip export-onnx outputs/demo --check            # into outputs/demo/onnx
    gap-closed-clip export-onnx owner/name exported --check     # of the Hub; a CLIP of another library, too

In a checkout, `python export_onnx.py` is the same.
"""

import argparse
from pathlib import Path

from ..base_weights import digest_of_weights
from ..checkpoint import check_model_name, is_captioner, is_local, load_checkpoint
from ..disk import writing
from ..hub.onnx import Difference, OnnxMismatch, export_onnx
from . import CommandParser


def parse(words: list[str]) -> argparse.Namespace:
    """
    The arguments of `export_onnx`.

    Raises:
        ValueError: an argument is missing or unknown; a model of the Hub without a folder to write to.
    """
    parser = CommandParser("export-onnx", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="folder that `gap-closed-clip train` wrote, a CLIP, or a Hub id"
    )
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="folder to make (default: MODEL/onnx)")
    parser.add_argument(
        "--check", action="store_true", help="compare with torch first, in onnxruntime; keep only what agrees"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference for --check (default: 1e-5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights of a CLIP of another library, by torch.load(weights_only=True)",
    )
    args = parser.parse_args(words)
    check_model_name(args.model)
    if args.output is None:
        if not is_local(args.model):
            raise ValueError(
                f"{args.model} is no folder, so name one to write to: gap-closed-clip export-onnx {args.model} OUTPUT"
            )
        args.output = Path(args.model) / "onnx"
    return args


def run(args: argparse.Namespace) -> None:
    """
    Exports, compares where `--check` asks for it, and prints the differences.

    Raises:
        ValueError, OSError, ImportError: as `load_checkpoint` and `export_onnx`; after the table, where it differs.
    """
    local = is_local(args.model)
    model, processor = load_checkpoint(args.model, allow_pickle=args.allow_pickle)
    try:
        with writing(args.output, "The ONNX files"):
            differences = export_onnx(
                model,
                processor,
                args.output,
                name=Path(args.model).resolve().name if local else args.model,
                weights=digest_of_weights(args.model) if local else None,
                tolerance=args.tolerance if args.check else None,
                overwrite=args.overwrite,
            )
    except OnnxMismatch as error:
        _show(error.differences)
        raise ValueError(f"{error} Nothing was kept.") from error
    _show(differences)
    if is_captioner(args.model):
        print("The decoder is not exported: these files embed, and write no captions.")
    files = ["vision_model.onnx", "text_model.onnx", *(f"{name}.onnx" for name in model.config.modalities or {})]
    print(f"{', '.join(files[:-1])} and {files[-1]} are in {args.output}; README.md there shows their use.")


def after_interrupt(args: argparse.Namespace) -> str:
    """What Ctrl-C leaves of an export."""
    return f"Nothing was exported to {args.output}."


def _show(differences: list[Difference]) -> None:
    if differences:
        print(f"{'file':18} {'inputs':17} {'shape':20} largest difference from torch")
        print("\n".join(map(str, differences)))


__all__ = ["after_interrupt", "parse", "run"]
