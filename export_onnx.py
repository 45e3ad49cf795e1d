"""Export both towers of a trained model to ONNX, with what is needed to use them without torch.

python export_onnx.py outputs/demo --check                # into outputs/demo/onnx
python export_onnx.py owner/name exported --check         # of the Hub
"""

import argparse
import sys
from pathlib import Path

from gap_closed_clip.checkpoint import check_model_name, digest_of_weights, is_captioner, is_local, load_checkpoint
from gap_closed_clip.hub.onnx import Difference, OnnxMismatch, export_onnx


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder that train.py wrote, or a Hub id")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="folder to make (default: MODEL/onnx)")
    parser.add_argument(
        "--check", action="store_true", help="compare with torch first, in onnxruntime; keep only what agrees"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference for --check (default: 1e-5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    check_model_name(args.model)
    local = is_local(args.model)
    if args.output is None and not local:
        raise ValueError(f"Where to? {args.model} is no folder: name one, python export_onnx.py {args.model} OUTPUT")
    output = args.output or Path(args.model) / "onnx"
    model, processor = load_checkpoint(args.model)
    differences = export_onnx(
        model,
        processor,
        output,
        name=Path(args.model).resolve().name if local else args.model,
        weights=digest_of_weights(args.model) if local else None,
        tolerance=args.tolerance if args.check else None,
        overwrite=args.overwrite,
    )
    show(differences)
    if is_captioner(args.model):
        print("The decoder is not exported: these files embed, and write no captions.")
    print(f"vision_model.onnx and text_model.onnx are in {output}; README.md there shows their use.")


def show(differences: list[Difference]) -> None:
    if differences:
        print(f"{'file':18} {'inputs':17} {'shape':20} largest difference from torch")
        print("\n".join(map(str, differences)))


def main() -> int:
    try:
        run(parse())
    except OnnxMismatch as error:
        show(error.differences)
        print(f"export_onnx.py: {error} Nothing was kept.", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"export_onnx.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
