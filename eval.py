"""`gap-closed-clip eval` for those who have a checkout; `python eval.py --help` says what it takes."""

import sys

from gap_closed_clip_cli import main


if __name__ == "__main__":
    sys.exit(main("eval"))
