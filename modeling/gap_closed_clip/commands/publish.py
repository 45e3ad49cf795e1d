"""Publish a model folder on the Hub: weights, code, processor, card, evaluation, figures, handler, in one commit.

    gap-closed-clip publish outputs/demo owner/name --dry-run   # what would go, and what is wrong with it
    gap-closed-clip publish outputs/demo owner/name --dry-run --output outputs/published    # and see it
    gap-closed-clip publish outputs/demo owner/name             # private if the repository is new
    gap-closed-clip publish outputs/lora owner/adapter --base owner/name    # an adapter

In a checkout, `python publish.py` is the same. The folder is first loaded and run in a clean process without this
package; what does not work there is not sent. Log in with `hf auth login`, or set HF_TOKEN. To have another model
beside it on the card, evaluate both first: gap-closed-clip eval outputs/clip outputs/demo output=outputs/demo
"""

import argparse
import tempfile

from ..disk import writing
from ..hub import publish
from . import CommandParser


def parse(words: list[str]) -> argparse.Namespace:
    """
    The arguments of `publish`.

    Raises:
        ValueError: an argument is missing or unknown.
    """
    parser = CommandParser("publish", __doc__)
    parser.add_argument("folder", help="as `gap-closed-clip train` left it")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list what would go, send nothing")
    parser.add_argument("--output", help="a new folder for a copy of what goes, e.g. to try its handler")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--base", help="of an adapter: the Hub id of its base model, where it names a folder")
    parser.add_argument("--license", help="of the weights, e.g. apache-2.0 (default: the card's there)")
    parser.add_argument("--keep-card", action="store_true", help="send the folder's README.md instead of a new card")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's Python files to check them, though they are not this version's own",
    )
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    """
    Checks, publishes and prints what went.

    Raises:
        ValueError, OSError: as `publish`.
    """
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "repo_id", "public")}
    with writing(tempfile.gettempdir(), "What goes to the Hub", None, "Or set TMPDIR. Nothing was sent."):
        publication = publish(args.folder, args.repo_id, private=False if args.public else None, **settings)
    print(publication)
    print(f"Nothing was sent to {publication.repo_id}." if args.dry_run else publication.outcome)


def after_interrupt(args: argparse.Namespace) -> str:
    """What Ctrl-C leaves on the Hub."""
    return f"{args.repo_id} is as it was, or complete: publish again."


__all__ = ["after_interrupt", "parse", "run"]
