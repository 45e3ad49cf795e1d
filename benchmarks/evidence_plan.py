"""What `evidence.py` is asked to do: a plan in YAML, a configuration of train.py, or nothing but a set of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from comparison import CONFIGS
from evidence_checks import (
    check_budgets,
    check_folders,
    check_folds,
    check_lengths,
    check_seeds,
    check_templates,
    check_types,
)

from gap_closed_clip.evaluation import post_hoc
from gap_closed_clip.messages import did_you_mean
from gap_closed_clip.training import RunConfig, load_config
from gap_closed_clip.training.config_fields import SECTIONS
from gap_closed_clip.training.yaml_files import read_yaml


PLANS = Path(__file__).parent / "evidence"
SHARED, OWN, GIVEN = "shared", "own", "given"  # the kinds of budgets; the last one of models that are there
# What a decoder learns from; one of text may do so without noise on the embeddings.
IMAGE, TEXT, NOISELESS = "image", "text", "text_noiseless"
DECODERS = {
    IMAGE: ("captioning.train_on=image",),
    TEXT: ("captioning.train_on=text",),
    NOISELESS: ("captioning.train_on=text", "captioning.noise=0"),
}
FIRST = CONFIGS / "radiology_small.yaml"  # what a set of pairs is trained with: published towers, frozen
# Fields of a plan that say how something is trained.
OF_TRAININGS = {
    "shared",
    "own",
    "grid",
    "num_folds",
    "folds",
    "weight_map",
    "robustness",
    "start",
    "start_budgets",
    "captions",
}


@dataclass(frozen=True)
class Method:
    """
    A way to close the gap.

    Args:
        about, source: what it is, in a sentence, and where it comes from.
        files: configuration files over those of the plan.
        words: overrides as for train.py.
        post_hoc: name of a method of `evaluation/post_hoc.py`, fitted on training embeddings of the plan's baseline.
    """

    about: str
    source: str
    files: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    post_hoc: str | None = None


@dataclass(frozen=True)
class CaptionPlan:
    """
    Captions of the held-out images, by decoders on the plan's trained encoders, which stay as they are.

    Args:
        methods: whose encoders, among those that the plan trains; by default all of these.
        seeds: of encoders and decoders; by default the plan's.
        config: configuration files of a decoder; the pairs are the plan's.
        words: overrides as for train.py, for all decoders.
        without_noise: whether one more decoder is trained on text, without noise.
        scorer, scorer_seed: the method of one more encoder, and its seed, which gives the CLIPScore of all captions.
    """

    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    config: tuple[str, ...] = ("captioning.yaml",)
    words: tuple[str, ...] = ()
    without_noise: bool = False
    scorer: str = "papers, scheduled"
    scorer_seed: int = 100

    def __post_init__(self):
        for name in ("methods", "seeds", "config", "words"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"captions: {name} is {getattr(self, name)!r}; give a list.")
        if not all(isinstance(seed, int) for seed in (*self.seeds, self.scorer_seed)):
            raise ValueError(f"captions: seeds are whole numbers, not {[*self.seeds, self.scorer_seed]}.")
        check_seeds("captions", self.seeds)
        if not isinstance(self.without_noise, bool):
            raise ValueError(f"captions: without_noise is {self.without_noise!r}; give true or false.")

    def decoder_config(self, kind: str, before: Sequence[str] = (), after: Sequence[str] = ()) -> RunConfig:
        """The configuration of a decoder of a kind (`DECODERS`), with overrides before and after the plan's words."""
        words = [*before, *self.words, *DECODERS[kind], *after]
        return load_config([_packaged(file) for file in self.config], words)


@dataclass(frozen=True)
class Plan:
    """
    Which methods are compared on which pairs, and how.

    Args:
        name, title: of the report.
        config: configuration files of train.py.
        words: overrides as for train.py, for all methods.
        methods: names in methods.yaml; by default all.
        baseline: the method that the others are tested against, and that post-hoc methods start from.
        seeds: of the runs with either budget.
        shared: the budget that all methods share: fields of the configuration.
        own: {method: budget}, where it is known and need not be chosen.
        grid: {field: values} of the budgets that each method's own is chosen from, by cross-validation over training
            cases; without it, and without `own`, there is the shared budget alone.
        num_folds, folds: how many folds the training cases are cut into, and how many of those are held out in turn.
        templates: of zero-shot prompts; the first one counts alone, and all of them as an ensemble.
        weight_map: `align_weight` and `uniformity_weight`, the values of both terms; every combination is trained
            once, with centered projections, at the budget of `ours`.
        robustness: `methods` and `num_train_epochs`, numbers of epochs to train each for, else at the shared budget.
        shown: methods in the figures of spaces; default: all.
        start: configuration files of a first stage, whose model each run starts from (towers that train).
        start_budgets: {method: budget} of that stage.
        captions: decoders on the trained encoders at the last kind of budget, and what they write; default: none.
        folders: {method: model folders, one for each seed, with {seed} in their name}: models that are there are
            measured, and nothing is trained. They may have any name.
    """

    name: str
    title: str
    config: tuple[str, ...] = (str(FIRST),)
    words: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    baseline: str = "CLIP (LT)"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    shared: dict[str, Any] = field(
        default_factory=lambda: {"num_train_epochs": 24, "learning_rate": 1e-3, "projection_dropout": 0.1}
    )
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list] = field(
        default_factory=lambda: {
            "num_train_epochs": [6, 12, 24],
            "learning_rate": [1e-3, 3e-3],
            "projection_dropout": [0.1, 0.5],
        }
    )
    num_folds: int = 4
    folds: int = 2
    templates: tuple[str, ...] = (
        "Medical image of {}.",
        "Radiology image of the {}.",
        "An image showing {}.",
        "{}",
    )
    weight_map: dict[str, list[float]] = field(default_factory=dict)
    robustness: dict[str, list] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    start_budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    captions: CaptionPlan | None = None
    folders: dict[str, str] = field(default_factory=dict)

    @property
    def possible_methods(self) -> dict[str, Method]:
        """What a plan may name: the methods of methods.yaml or, with `folders`, those and the post-hoc ones."""
        everything = all_methods()
        if not self.folders:
            return everything
        given = {name: Method("Models that were trained before.", folder) for name, folder in self.folders.items()}
        return given | {name: method for name, method in everything.items() if method.post_hoc}

    @property
    def known_methods(self) -> dict[str, Method]:
        """The plan's methods by name, in the order of those that are possible."""
        everything = self.possible_methods
        chosen = self.methods or tuple(everything)
        return {name: everything[name] for name in everything if name in chosen}

    @property
    def trained(self) -> list[str]:
        """Names of the methods that are trained."""
        return [name for name, method in self.known_methods.items() if method.post_hoc is None]

    def lasting(self, epochs: float) -> dict[str, Any]:
        """The shared budget for so many epochs."""
        rest = {name: value for name, value in self.shared.items() if name != "max_steps"}
        return {**rest, "num_train_epochs": epochs}

    def model_folder(self, method: str, seed: int) -> Path:
        """Where the model of `folders` lies."""
        return Path(self.folders[method].replace("{seed}", str(seed)))

    def run_config(self, method: str, budget: dict[str, Any], seed: int) -> RunConfig:
        """The configuration of one training."""
        found = self.known_methods.get(method) or all_methods()[method]  # captions may be scored by one more
        words = [*self.words, *found.words, *(f"{key}={value}" for key, value in budget.items())]
        return load_config([*self.config, *map(_packaged, found.files)], [*words, f"training.seed={seed}"])

    def start_config(self, method: str, seed: int) -> RunConfig:
        """The configuration of the first stage of a training: on the same pairs."""
        first = Plan(self.name, "", config=self.start).run_config(method, self.start_budgets.get(method, {}), seed)
        return replace(first, data=self.run_config(method, {}, seed).data)


def all_methods() -> dict[str, Method]:
    """
    All methods of methods.yaml.

    Raises:
        ValueError: one has an unknown field, lacks one, or has a text where a list is to be.
    """
    return _methods_in(PLANS / "methods.yaml")


@cache
def _methods_in(path: Path) -> dict[str, Method]:
    found = {}
    for name, entry in read_yaml(path).items():
        where = f"{path.name}, {name}"
        values = _values(where, Method, entry)
        if missing := [key for key in ("about", "source") if key not in values]:
            raise ValueError(f"{where}: {missing[0]} is left out; give a text.")
        check_types(where, Method, values)
        found[name] = Method(**values)
    return found


def plan_of_ours(what: str) -> Path | None:
    """The plan in benchmarks/evidence that is meant, by its path or its name; None if that is none of them."""
    path = Path(what)
    if path.is_file():
        return path if path.resolve().parent == PLANS.resolve() else None
    named = PLANS / f"{path.stem}.yaml"
    return named if named.is_file() and path.suffix in ("", ".yaml") and path.parent == Path(".") else None


def read_plan(what: str, words: list[str], seeds: list[int] | None = None, methods: list[str] | None = None) -> Plan:
    """
    The plan that the command line asks for.

    Args:
        what: a plan, or the name of one in benchmarks/evidence; a configuration file of train.py; or a source of
            pairs, as `data.source` is.
        words: overrides `key=value` for all methods.
        seeds, methods: instead of the plan's.

    Raises:
        FileNotFoundError, ValueError: there is no such file; an unknown field or method.
    """
    path = plan_of_ours(what) or Path(what)
    if path.suffix not in (".yaml", ".yml"):
        name = "".join(c if c.isalnum() else "_" for c in path.stem.lower())
        plan = Plan(name, f"{what}: published towers, frozen", words=(f"data.source={quoted(what)}",))
    else:
        if not path.is_file():
            raise FileNotFoundError(f"There is no plan {what}, and no file of that name.")
        content = read_yaml(path) or {}
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no mapping: a plan has fields such as title, config and seeds.")
        if set(content) & set(SECTIONS):
            plan = _of_config(path, words)
        else:
            plan = _from_content(path, content)
    changes: dict[str, Any] = {"words": (*plan.words, *words)}
    if seeds is not None:
        changes["seeds"] = tuple(seeds)
    if methods is not None:
        changes["methods"] = tuple(methods)
    if plan.captions is not None:
        changes["captions"] = _fewer(plan.captions, seeds, methods)
    plan = replace(plan, **changes)
    _check(plan)
    return plan


def _of_config(path: Path, words: list[str]) -> Plan:
    """Of a configuration: at its own budget where towers train, which takes long."""
    model = load_config([path], words).model
    frozen = model.freeze_vision and model.freeze_text
    budgets: dict[str, Any] = {} if frozen else {"shared": {}, "grid": {}, "seeds": (0, 1, 2)}
    return Plan(path.stem, path.stem, config=(str(path),), **budgets)


def _fewer(captions: CaptionPlan, seeds: list[int] | None, methods: list[str] | None) -> CaptionPlan | None:
    """Captions by the seeds and methods alone that the command line names; None where that leaves none."""
    kept = tuple(name for name in captions.methods if methods is None or name in methods)
    if captions.methods and not kept:
        return None
    return replace(captions, methods=kept, seeds=captions.seeds if seeds is None else tuple(seeds))


def _from_content(path: Path, content: dict[str, Any]) -> Plan:
    values = _values(str(path), Plan, content)
    check_types(str(path), Plan, {name: value for name, value in values.items() if name != "folders"})
    if values.get("captions") is not None:
        values["captions"] = CaptionPlan(**_values(f"{path}, captions", CaptionPlan, values["captions"]))
    for key in ("config", "start"):
        if key in values:
            values[key] = tuple(str(_packaged(file)) for file in values[key])
    if values.get("folders"):
        folders = values["folders"]
        if not isinstance(folders, dict) or not all(isinstance(each, str) for each in folders.values()):
            raise ValueError(
                f"{path}: folders is {folders!r}; give a name and a path for each method, with {{seed}} where its "
                "folders differ: `mine: outputs/mine-seed{seed}`."
            )
        useless = sorted(set(values) & OF_TRAININGS)
        if useless:
            raise ValueError(f"{path}: with folders nothing is trained: leave out {', '.join(useless)}.")
        values |= {"shared": {}, "grid": {}}
    return Plan(**{"name": path.stem, "title": path.stem, **values})


def _values(where: str, kind: type, content: Any) -> dict[str, Any]:
    """The fields of a plan or of a part of one, lists as tuples."""
    known = {each.name for each in fields(kind)} - {"name"}
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no mapping but {content!r}; its fields are {', '.join(sorted(known))}.")
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown field {key!r}{did_you_mean(key, known)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _check_captions(plan: Plan, captions: CaptionPlan) -> None:
    """Checks all that can be known of the decoders before the encoders are there."""
    where = f"{plan.name}, captions"
    for name in captions.methods:
        if name not in plan.trained:
            raise ValueError(f"{where}: the plan trains no method {name!r}{did_you_mean(name, plan.trained)}")
    known = [name for name, method in all_methods().items() if method.post_hoc is None]
    if captions.scorer not in known:
        raise ValueError(f"{where}: scorer: nothing trains {captions.scorer!r}{did_you_mean(captions.scorer, known)}")
    try:
        config = [captions.decoder_config(kind) for kind in DECODERS][0]
    except (ValueError, OSError) as error:
        raise type(error)(f"{where}: {error}") from error
    if config.captioning is None or config.captioning.encoders != "frozen":
        raise ValueError(f"{where}: captioning.encoders has to be frozen: the spaces are compared as they are.")


def _check(plan: Plan) -> None:
    known = plan.possible_methods
    for name in (*plan.methods, plan.baseline, *plan.shown):
        if name not in known:
            where = "folders" if plan.folders else "methods.yaml"
            raise ValueError(f"{plan.name}: there is no method {name!r} in {where}{did_you_mean(name, known)}")
    if not plan.seeds:
        raise ValueError(f"{plan.name}: seeds is empty: name one at least.")
    check_seeds(plan.name, plan.seeds)
    check_folds(plan)
    check_templates(plan)
    if plan.baseline not in plan.trained:
        raise ValueError(
            f"{plan.name}: the baseline {plan.baseline!r} is not among the methods that are trained. `baseline` is "
            f"to be one of {', '.join(plan.trained)}."
        )
    check_folders(plan)
    check_budgets(plan, [name for name, method in all_methods().items() if method.post_hoc is None])
    if not plan.folders:
        check_lengths(plan)
    for name, method in plan.known_methods.items():
        if method.post_hoc is not None and method.post_hoc not in post_hoc.METHODS:
            raise ValueError(f"methods.yaml, {name}: there is no post-hoc method {method.post_hoc!r}.")
    if plan.captions is not None:
        _check_captions(plan, plan.captions)


def quoted(text: str) -> str:
    """The text as YAML reads it back, whatever it would take it for: a number, or a comment behind " #"."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31).strip()


def _packaged(file: str) -> Path:
    """A configuration file: the path itself, or the one of that name in configs/."""
    path = Path(file)
    return path if path.is_file() else CONFIGS / path.name


__all__ = ["GIVEN", "OWN", "SHARED", "CaptionPlan", "Method", "Plan", "all_methods", "plan_of_ours", "read_plan"]
