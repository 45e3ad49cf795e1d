"""Publish a model folder on the Hub: weights, code, processor, card, evaluation, figures, handler, in one commit.

    python publish.py outputs/demo owner/name --dry-run     # what would go, and what is wrong with it
    python publish.py outputs/demo owner/name --dry-run --output outputs/published      # and see it
    python publish.py outputs/demo owner/name               # private if the repository is new
    python publish.py outputs/lora owner/adapter --base owner/name      # an adapter
    python eval.py outputs/clip outputs/demo output=outputs/demo && python publish.py outputs/demo owner/name
                                                            # the card with CLIP beside it

The folder is first loaded and run in a clean process without this package; what does not work there is not sent. Log
in with `hf auth login`, or set HF_TOKEN.
"""

import argparse
import sys

from gap_closed_clip.hub import publish


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="as train.py left it")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list what would go, send nothing")
    parser.add_argument("--output", help="a new folder for a copy of what goes, e.g. to try its handler")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--base", help="of an adapter: the Hub id of its base model, where it names a folder")
    parser.add_argument("--license", help="of the weights, e.g. apache-2.0 (default: training.card_license)")
    parser.add_argument("--keep-card", action="store_true", help="send the folder's README.md instead of a new card")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's Python files to check them, though they are not this version's own",
    )
    args = parser.parse_args()
    try:
        publication = publish(
            args.folder,
            args.repo_id,
            private=not args.public,
            base=args.base,
            license=args.license,
            keep_card=args.keep_card,
            trust_remote_code=args.trust_remote_code,
            dry_run=args.dry_run,
            output=args.output,
            message=args.message,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("publish.py: interrupted. The repository is as it was, or complete: publish again.", file=sys.stderr)
        return 130
    print(publication)
    if args.dry_run:
        print(f"Nothing was sent to {publication.repo_id}.")
    else:
        print(publication.outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
