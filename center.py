"""`gap-closed-clip center` for those who have a checkout; `python center.py --help` says what it takes."""

import sys

from gap_closed_clip_cli import main


if __name__ == "__main__":
    sys.exit(main("center"))
