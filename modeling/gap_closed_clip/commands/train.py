"""Train a gap-closed CLIP, or a decoder that writes captions on one.

    gap-closed-clip train                                       # configs/demo.yaml: phantoms, nothing to download
    gap-closed-clip train configs/radiology_small.yaml
    gap-closed-clip train configs/demo.yaml configs/clip_lt.yaml        # a later file changes an earlier one
    gap-closed-clip train configs/demo.yaml model.align_weight=3 learning_rate=5e-4 output_dir=outputs/other
    accelerate launch -m gap_closed_clip_cli train configs/roco.yaml    # several GPUs
    gap-closed-clip train configs/demo.yaml configs/records.yaml        # the patient's record as a third modality
    gap-closed-clip train configs/lora.yaml checkpoint=outputs/radiology_small  # adapters instead of full fine-tuning
    gap-closed-clip train configs/captioning.yaml checkpoint=outputs/demo       # a decoder that writes captions
    gap-closed-clip train push_to_hub=true hub_model_id=owner/name  # then publish it (public: hub_private_repo=false)

In a checkout, `python train.py` is the same. A configuration that is no file here is looked up among those of the
package. Configuration files have the sections `model` (towers and fields of GapClosedClipConfig), `data`
(DataArguments), `training` (transformers' Seq2SeqTrainingArguments) and, for adapters, `lora` (LoraArguments) or, for
a decoder, `captioning` (CaptioningArguments). Any field is overridden as section.field=value, or as field=value where
only one section has it; a key of a field that holds a mapping as model.text.hidden_size=96.
"""

from pathlib import Path
from typing import Any

from ..checkpoint import is_adapter, is_local
from ..disk import writing
from ..hub import check_access, publish, write_card, write_examples
from ..training import RunConfig, last_complete_checkpoint, load_config, train
from . import CommandParser, keep_freed_memory


DEFAULT_CONFIG = "demo.yaml"


def parse(words: list[str]) -> RunConfig:
    """
    The configuration that a command line describes.

    Raises:
        FileNotFoundError, ValueError: as `load_config`; an option, which the command has none of.
    """
    words = CommandParser("train", __doc__).parse_words(words, "CONFIG.yaml or KEY=VALUE")
    files = [word for word in words if "=" not in word]
    return load_config(files or [DEFAULT_CONFIG], [word for word in words if "=" in word])


def run(config: RunConfig) -> None:
    """
    Trains, writes the card, and publishes where `push_to_hub` asks for it.

    Raises:
        ValueError, OSError: as `train` and `publish`.
    """
    repo_id = _repository(config)
    keep_freed_memory()
    train(config)
    args = config.training_arguments()
    if args.process_index != 0:
        return
    folder = args.output_dir
    adapter = is_adapter(folder)
    again = f"The trained model is safe there; `gap_closed_clip.hub.write_card({folder!r})` writes the card again."
    with writing(folder, "The model card", None, again):
        if not adapter:
            write_examples(folder, config.data)
        write_card(folder, repo_id=repo_id)
    print(f"The {'adapter' if adapter else 'model folder'} is {folder}; its card is README.md there.")
    if repo_id is not None:
        try:
            publication = publish(folder, repo_id, private=args.hub_private_repo, token=args.hub_token)
        except (ValueError, OSError) as error:
            raise OSError(
                f"{error}\nThe trained model is safe in {folder}; to publish it: gap-closed-clip publish {folder} "
                f"{repo_id}"
            ) from error
        print("\n".join([*publication.remarks, publication.outcome]))


def after_interrupt(config: RunConfig) -> str:
    """Where training can go on after Ctrl-C."""
    checkpoint = last_complete_checkpoint(config.output_dir)
    if checkpoint is None:
        kept = config.model.freeze_vision or config.model.freeze_text
        features = " Features of frozen towers that were embedded are kept." if kept else ""
        return (
            f"{config.output_dir} holds no complete checkpoint to go on from; training.save_strategy asks for them."
            f"{features}"
        )
    return f"{checkpoint} is complete: the same command with resume_from_checkpoint=true goes on from there."


def _repository(config: RunConfig) -> str | None:
    """Where `push_to_hub` will publish to; None without it. Said now if it can't: not after hours of training."""
    settings = config.training
    if not settings.get("push_to_hub"):
        return None
    _check_destination(settings)
    base = config.model.checkpoint
    if config.lora is not None and not config.lora.merge and (base is None or is_local(base) or is_adapter(base)):
        raise ValueError(
            "training.push_to_hub: an adapter alone is of use to others only if its base model is on the Hub. Publish "
            f"that (gap-closed-clip publish {base or 'FOLDER'} owner/name) and give checkpoint=owner/name, or set "
            "lora.merge=true."
        )
    name = settings.get("hub_model_id") or Path(config.output_dir).name
    return check_access(name, settings.get("hub_token"), settings.get("hub_private_repo"))


def _check_destination(settings: dict[str, Any]) -> None:
    """Refuses what a Trainer would push elsewhere, or earlier, than a publication goes."""
    revision, strategy = settings.get("hub_revision"), settings.get("hub_strategy")
    if revision not in (None, "main"):
        raise ValueError(
            f"training.hub_revision is {revision!r}, and a publication goes to main: leave it out, or name another "
            "repository for it in training.hub_model_id."
        )
    if strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"training.hub_strategy is {strategy!r}, and checkpoints, which hold pickled states, are not sent to the "
            "Hub: leave it out, and have training.output_dir on a disk that stays."
        )


__all__ = ["after_interrupt", "parse", "run"]
