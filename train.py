"""Train a gap-closed CLIP, or a decoder that writes captions on one.

    python train.py                                             # configs/demo.yaml: phantoms, nothing to download
    python train.py configs/radiology_small.yaml
    python train.py configs/demo.yaml configs/clip_lt.yaml      # a later file changes an earlier one
    python train.py configs/demo.yaml model.align_weight=3 learning_rate=5e-4 output_dir=outputs/other
    accelerate launch train.py configs/roco.yaml                # several GPUs
    python train.py configs/lora.yaml checkpoint=outputs/radiology_small   # adapters instead of full fine-tuning
    python train.py configs/captioning.yaml checkpoint=outputs/demo    # a decoder that writes captions
    python train.py push_to_hub=true hub_model_id=owner/name    # then publish it (public: hub_private_repo=false)

Configuration files have the sections `model` (towers and fields of GapClosedClipConfig), `data` (DataArguments),
`training` (transformers' Seq2SeqTrainingArguments) and, for adapters, `lora` (LoraArguments) or, for a decoder,
`captioning` (CaptioningArguments). Any field is overridden as section.field=value, or as field=value where only one
section has it; a key of a field that holds a mapping as model.text.hidden_size=96.
"""

import argparse
import sys
from pathlib import Path

from gap_closed_clip.checkpoint import is_adapter, is_local
from gap_closed_clip.hub import check_access, publish, write_card, write_examples
from gap_closed_clip.training import (
    GapClosedTrainingArguments,
    RunConfig,
    last_complete_checkpoint,
    load_config,
    read_words,
    train,
)


HERE = Path(__file__).parent
DEFAULT_CONFIG = HERE / "configs" / "demo.yaml"


def run(config: RunConfig) -> None:
    repo_id = repository(config)
    train(config)
    args = config.training_arguments()
    if args.process_index != 0:
        return
    folder = args.output_dir
    adapter = is_adapter(folder)
    if not adapter:
        write_examples(folder, config.data)
    write_card(folder, repo_id=repo_id)
    print(f"The {'adapter' if adapter else 'model folder'} is {folder}; its card is README.md there.")
    if repo_id is not None:
        try:
            publication = publish(folder, repo_id, private=args.hub_private_repo is not False, token=args.hub_token)
        except (ValueError, OSError) as error:
            raise OSError(
                f"{error}\nThe trained model is safe in {folder}; to publish it: python publish.py {folder} {repo_id}"
            ) from error
        print(publication.outcome)


def repository(config: RunConfig) -> str | None:
    """Where `push_to_hub` will publish to; None without it. Said now if it can't: not after hours of training."""
    settings = config.training
    if not settings.get("push_to_hub"):
        return None
    base = config.model.checkpoint
    if config.lora is not None and not config.lora.merge and (base is None or is_local(base) or is_adapter(base)):
        raise ValueError(
            "training.push_to_hub: an adapter alone is of use to others only if its base model is on the Hub. Publish "
            f"that (python publish.py {base or 'FOLDER'} owner/name) and give checkpoint=owner/name, or set "
            "lora.merge=true."
        )
    name = settings.get("hub_model_id") or Path(output_dir(config)).name
    return check_access(name, settings.get("hub_token"))


def output_dir(config: RunConfig) -> str:
    return config.training.get("output_dir", GapClosedTrainingArguments.output_dir)


def what_is_left(config: RunConfig) -> str:
    """Of a run that was interrupted."""
    folder = output_dir(config)
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return f"{folder} holds no complete checkpoint to go on from; training.save_strategy asks for them."
    return f"{checkpoint} is complete: the same command with resume_from_checkpoint=true goes on from there."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml or KEY=VALUE")
    try:
        words = read_words(parser)
        files = [word for word in words if "=" not in word]
        config = load_config(files or [DEFAULT_CONFIG], [word for word in words if "=" in word])
        try:
            run(config)
        except KeyboardInterrupt:
            print(f"\ntrain.py: interrupted. {what_is_left(config)}", file=sys.stderr)
            return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
