"""`gap-closed-clip export-onnx` for those who have a checkout; `python export_onnx.py --help` says what it takes."""

import sys

from gap_closed_clip_cli import main


if __name__ == "__main__":
    sys.exit(main("export-onnx"))
