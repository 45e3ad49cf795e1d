"""Train a gap-closed CLIP.

    python train.py                                             # configs/demo.yaml: phantoms, nothing to download
    python train.py configs/radiology_small.yaml
    python train.py configs/demo.yaml configs/clip_lt.yaml      # a later file changes an earlier one
    python train.py configs/demo.yaml model.align_weight=3 learning_rate=5e-4 output_dir=outputs/other
    accelerate launch train.py configs/roco.yaml                # several GPUs

Configuration files have three sections: `model` (towers and fields of GapClosedClipConfig), `data` (DataArguments) and
`training` (transformers' TrainingArguments). Any field is overridden as section.field=value, or as field=value where
only one section has it.
"""

import argparse
import sys
from pathlib import Path

from gap_closed_clip.hub import write_card
from gap_closed_clip.training import RunConfig, load_config, train


HERE = Path(__file__).parent
DEFAULT_CONFIG = HERE / "configs" / "demo.yaml"
CARD_TEMPLATE = HERE / "model_card" / "template.md"


def run(config: RunConfig) -> None:
    result = train(config)
    args = config.training_arguments()
    if args.process_index == 0:
        write_card(
            args.output_dir,
            CARD_TEMPLATE,
            config,
            license=args.card_license,
            num_train_pairs=result.num_train_pairs,
            device=result.device,
            num_processes=result.num_processes,
        )
        print(f"The model folder is {args.output_dir}; its card is README.md there.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml or KEY=VALUE")
    words = parser.parse_args().words
    files = [word for word in words if "=" not in word]
    try:
        run(load_config(files or [DEFAULT_CONFIG], [word for word in words if "=" in word]))
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
