"""Close the gap of a trained model without training it, by one of the published post-hoc methods.

    gap-closed-clip center outputs/clip                                  # into outputs/clip-centering
    gap-closed-clip center outputs/clip method=all                       # all methods side by side; nothing is saved
    gap-closed-clip center owner/name data.source=/data/my_pairs method=whitening output=outputs/mine

In a checkout, `python center.py` is the same. MODEL is a folder that `gap-closed-clip train` wrote, a Hub id, or a
CLIP of another library. All training pairs are embedded once, the method is fitted on them, and an ordinary model
folder is saved that gives the changed embeddings everywhere. A table shows the held-out pairs before and after. The
pairs are those of the model's train_config.yaml; `data.FIELD=VALUE` changes them. Other settings, as KEY=VALUE:

    method       centering    each modality loses its mean, before it is normalised (the model's own centering)
                 mean_shift   both modalities move half of the gap towards each other (Liang et al. 2022)
                 realign      texts take the place and the spread of the images (ReAlign, arXiv 2602.07026)
                 whitening    each modality gets mean 0 and the same spread in all directions (ZCA, Ledoit-Wolf)
                 procrustes   centered, and texts turned onto their images by an orthogonal matrix
                 all          all of them, beside the model as it is
                 (default: centering)
    output       folder of the new model and of metrics.json, metrics.md and figures (default: MODEL-METHOD, of a
                 Hub id outputs/NAME-METHOD)
    split        pairs to fit on (default: train)
    eval_split   pairs to evaluate on (default: validation). Of a source that has none, it is those of the fit, on
                 which a gap is closed by construction; the table says so
    save         with method=all: also save every model, as OUTPUT/METHOD (default: false)
    overwrite    replace the model in the output folder (default: false)
    batch_size   images or captions at once (default: 64)
    num_workers  processes that decode the images (default: 2)
    bf16         compute in bfloat16 where that is safe (default: false)
    allow_pickle  read pickled weights of a CLIP of another library, by torch.load(weights_only=True) (default: false)

It can cost. The methods know nothing of what a direction means: where the pairs are from another field than the
model, the mean that is taken away tells them apart from it, too. In a trial on a foreign domain centering lowered R@10
from 10.2% to 4.7%. Look at recall beside the gap; the command says where it fell.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError

from ..checkpoint import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    RUN_FILE,
    check_model_name,
    check_writable,
    is_captioner,
    is_local,
    load_checkpoint,
)
from ..data import load_checked_pairs
from ..data.pairs import MissingSplitError
from ..disk import writing
from ..evaluation import Evaluation, PairEmbeddings, embed_pairs, evaluate_embeddings, load_metric, write_report
from ..evaluation.post_hoc import METHODS, PostHocMaps, unit
from ..evaluation.precision import autocast_dtype
from ..messages import did_you_mean
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..training import RunConfig, close_gap, fit_post_hoc
from ..training.close_gap import check_can_close, weights_after
from ..training.encoder import with_config
from ..training.seen_pairs import count_seen, note_fitted, told_seen
from . import CommandParser, keep_freed_memory
from .evaluate import config_of_the_pairs, split_words


ALL = "all"
FALL = 0.005  # of R@10 (mean of both directions), that is worth a line


@dataclass
class CenterSettings:
    """
    How a gap is closed; the module's docstring says what each is.

    Raises:
        ValueError: an unknown method, or a number out of its range.
    """

    method: str = "centering"
    output: str = ""
    split: str = "train"
    eval_split: str = ""
    save: bool = False
    overwrite: bool = False
    batch_size: int = 64
    num_workers: int = 2
    bf16: bool = False
    allow_pickle: bool = False

    def __post_init__(self):
        if self.method not in (ALL, *METHODS):
            raise ValueError(f"There is no method '{self.method}'{did_you_mean(self.method, [ALL, *METHODS])}")
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    @property
    def methods(self) -> list[str]:
        """The methods to fit."""
        return list(METHODS) if self.method == ALL else [self.method]

    def folder_of(self, method: str) -> Path | None:
        """Where a method's model is saved; None where it is not."""
        if self.method != ALL:
            return Path(self.output)
        return Path(self.output) / method if self.save else None


@dataclass
class CenterCommand:
    """
    A checked command line.

    Args:
        model: folder or Hub id.
        settings: with the output folder.
        config: the model's configuration, whose data section says which pairs.
    """

    model: str
    settings: CenterSettings
    config: RunConfig


def parse(words: list[str]) -> CenterCommand:
    """
    The model, the settings and the pairs that a command line names.

    Raises:
        FileNotFoundError, ValueError: a model that isn't there, an unknown setting or a value of the wrong type; not
            one model, or nothing that says which pairs.
    """
    words = CommandParser("center", __doc__).parse_words(words, "MODEL or KEY=VALUE", at_least_one=True)
    models, settings, overrides = split_words(words, CenterSettings)
    if len(models) != 1:
        raise ValueError(
            f"{len(models)} models are named: give one, a folder that `gap-closed-clip train` wrote or a Hub id."
        )
    (model,) = models
    check_model_name(model)
    if not settings.output:
        settings = replace(settings, output=_default_output(model, settings.method))
    return CenterCommand(model, settings, config_of_the_pairs(models, overrides))


def run(command: CenterCommand) -> None:
    """
    Embeds, fits, evaluates, saves, and prints the table.

    Raises:
        ValueError, OSError: as `load_checkpoint` and `load_checked_pairs`; a captioner, or a model that has a map
            already; an output folder that holds a model or can't be written.
    """
    settings, data = command.settings, command.config.data
    _check_output(command)
    load_metric("modality_gap")  # the cache of metrics may not be writable
    model, processor = _load(command.model, settings.allow_pickle)
    fitted, held_out, eval_split = _load_pairs(command)
    keep_freed_memory()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    embedding_settings: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "autocast_dtype": autocast_dtype(settings.bf16, device),
        "max_length": data.max_caption_tokens,
        "window": data.window,
        "normalize": False,
    }
    model.to(device)
    features = embed_pairs(model, processor, fitted, **embedding_settings)
    held_out_features = features if held_out is None else embed_pairs(model, processor, held_out, **embedding_settings)
    model.cpu()
    maps = _fit(settings.methods, features)
    for method, found in maps.items():
        if (folder := settings.folder_of(method)) is None:
            continue
        with writing(folder, f"The model after {method}"):
            _save(close_gap(model, method, found), processor, command, folder)
    weights = {method: weights_after(model.config, method) for method in ("", *maps)}
    table, evaluations = _report(command, maps, held_out_features, held_out, eval_split, weights)
    what = f"{len(held_out_features)} pairs, split '{eval_split}' of {data.title}"
    print(f"\n{what}; fitted on {len(features)} pairs, split '{settings.split}'\n\n{table}\n")
    _say_what_it_did(command, evaluations)


def after_interrupt(command: CenterCommand) -> str:
    """What Ctrl-C leaves behind."""
    return f"{command.settings.output} may be incomplete; {command.model} is as it was."


def _default_output(model: str, method: str) -> str:
    folder = Path(model).resolve() if is_local(model) else Path("outputs") / Path(model).name
    parent = Path(model).parent if is_local(model) and Path(model).name == folder.name else folder.parent
    return str(parent / f"{folder.name}-{method}")


def _check_output(command: CenterCommand) -> None:
    settings = command.settings
    saved = [folder for method in settings.methods if (folder := settings.folder_of(method)) is not None]
    for folder in (Path(settings.output), *saved):
        if is_local(command.model) and Path(command.model).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"output {folder} is the model's folder, or around it: name another one.")
        if any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG)) and not settings.overwrite:
            raise ValueError(f"output {folder} holds a model: name another folder, or add overwrite=true.")
    check_writable(settings.output, "output")


def _load(name: str, allow_pickle: bool) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    if is_captioner(name):
        raise ValueError(
            f"{name} is a captioner, and its decoder knows the space as it is: center the encoder that it was trained "
            "on, and train a decoder on that."
        )
    model, processor = load_checkpoint(name, allow_pickle=allow_pickle)
    check_can_close(model)
    # The new model computes in float32, whatever this one is stored in: so do the features that a method is fitted on.
    return model if model.dtype == torch.float32 else with_config(model, {}, name), processor


def _load_pairs(command: CenterCommand) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None, str]:
    """Pairs to fit on, pairs to evaluate on (None where they are the same), and the split of the latter."""
    settings, data = command.settings, command.config.data
    fitted = load_checked_pairs(data, settings.split, settings.num_workers)
    eval_split = settings.eval_split or "validation"
    reason = f"split and eval_split are both '{eval_split}'"
    if eval_split != settings.split:
        has_split = any(source.has_split(eval_split) for source in data.sources().values())
        reason = f"{data.title} has no {eval_split} split"
        try:
            if has_split or settings.eval_split:
                return fitted, load_checked_pairs(data, eval_split, settings.num_workers), eval_split
        except MissingSplitError as error:
            if settings.eval_split:
                raise
            reason = str(error)
    print(
        "Warning: fitted and evaluated on the same pairs, where a gap is closed by construction: "
        f"{reason.rstrip('.')}. With data.folds=5 a fifth of the pairs is held out."
    )
    return fitted, None, settings.split


def _fit(methods: Sequence[str], features: PairEmbeddings) -> dict[str, PostHocMaps]:
    """The maps of each method; one of several that can't be fitted is left out, with a line that says why."""
    if len(features) < 2:
        raise ValueError("There is one pair to fit on, whose mean is the pair itself: give more.")
    maps = {}
    for method in methods:
        try:
            maps[method] = fit_post_hoc(method, features)
        except ValueError as error:
            if len(methods) == 1:
                raise
            print(f"{method} is left out: {error}")
    if not maps:
        raise ValueError("None of the methods can be fitted on these pairs.")
    return maps


def _save(model: GapClosedClipModel, processor: GapClosedClipProcessor, command: CenterCommand, folder: Path) -> None:
    """
    An ordinary model folder, with what the origin says of its training. It is written aside first: a model that was
    there is replaced by a whole one, and what else lies there stays; where it can't be written (OSError), all does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            new = Path(temporary)
            model.save_pretrained(new)
            processor.save_pretrained(new)
            for name in (CONFIG_FILE, RUN_FILE):
                if (known := Path(command.model) / name).is_file():
                    shutil.copyfile(known, new / name)
            origin = command.model if model.config.embedding_map else None  # new means replace those of before
            note_fitted(new, command.config, command.settings.split, origin)
            # Weights may be in other parts than the new ones, and what trained another model says nothing of this one.
            of_others = (ADAPTER_CONFIG, "adapter_model.safetensors", CONFIG_FILE, RUN_FILE)
            for old in (*folder.glob("model*.safetensors*"), *(folder / name for name in of_others)):
                old.unlink(missing_ok=True)
            for path in new.iterdir():
                os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The model could not be written to {folder} ({error}): make room, or name another folder."
        ) from error


def _report(
    command: CenterCommand,
    maps: dict[str, PostHocMaps],
    features: PairEmbeddings,
    held_out: Dataset | IterableDataset | None,
    eval_split: str,
    weights: dict[str, dict[str, float] | None],
) -> tuple[str, dict[str, Evaluation]]:
    """
    Evaluates and writes the report: the table, and {name: evaluation}, of which the first is before.

    Args:
        weights: the `fusion_weights` by method; "" is before.
    """
    settings, origin = command.settings, Path(command.model)
    before = origin.resolve().name if is_local(command.model) else command.model
    before += ", before" if before in (*settings.methods, Path(settings.output).resolve().name) else ""
    measures = {method: partial(evaluate_embeddings, fusion_weights=own) for method, own in weights.items()}
    units = {name: unit(features.embeds(name)).astype("float32") for name in features.modalities}
    evaluations = {before: Evaluation.of(features.with_embeds(units), measures[""])}
    folders = {before: command.model} if is_local(command.model) else {}
    for method, found in maps.items():
        name = method if settings.method == ALL else Path(settings.output).resolve().name
        name = f"{name} (fitted on these pairs)" if held_out is None else name
        evaluations[name] = Evaluation.of(found.apply(features), measures[method])
        if (folder := settings.folder_of(method)) is not None:
            folders[name] = str(folder)
    about: dict[str, Any] = {"method": settings.method, "fitted_on": settings.split}
    if seen := count_seen(held_out, command.config.data, eval_split, command.model):
        about["seen_pairs"] = dict.fromkeys(evaluations, seen)
        print(f"Warning: {told_seen(seen, command.config.data.title, before)}")
    described = command.config.described_data()
    table = write_report(settings.output, evaluations, described, eval_split, folders=folders, settings=about)
    return table, evaluations


def _say_what_it_did(command: CenterCommand, evaluations: dict[str, Evaluation]) -> None:
    """A line for each method that recall (if there are pairs to have one) fell by, and where everything is."""
    settings = command.settings
    (_, before), *after = evaluations.items()
    for name, evaluation in after:
        was, found = (each.metrics.get("recall@10", 0.0) for each in (before, evaluation))
        if found < was - FALL:
            print(f"{name}: R@10 (mean of both directions) fell from {was:.1%} to {found:.1%}.")
    saved = [str(folder) for method in settings.methods if (folder := settings.folder_of(method)) is not None]
    if saved:
        print(f"The model is in {saved[0]}." if len(saved) == 1 else f"The models are in {', '.join(saved)}.")
    print(f"metrics.json, metrics.md and the figures are in {settings.output}")


__all__ = ["CenterCommand", "CenterSettings", "after_interrupt", "parse", "run"]
