"""What a plan of `evidence.py` says, checked before anything is loaded: types, names of methods, fields of budgets."""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_origin

from gap_closed_clip.messages import did_you_mean
from gap_closed_clip.training.config_fields import check_field, parse_override


if TYPE_CHECKING:
    from evidence_plan import Plan

    from gap_closed_clip.training import RunConfig


KINDS = {tuple: "a list, in brackets", dict: "a mapping", int: "a whole number", str: "a text"}
WEIGHTS = ("align_weight", "uniformity_weight")
SEEDS = 2**32  # what numpy takes
EPOCHS = "num_train_epochs"


def check_types(where: str, plan: type, values: dict[str, Any]) -> None:
    """
    Checks the fields of a plan, or of a method, as they were read, lists as tuples.

    Raises:
        ValueError: one is of another type.
    """
    for each in fields(plan):
        kind = get_origin(each.type) or each.type
        value = values.get(each.name)
        if each.name not in values or kind not in KINDS:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{where}: {each.name} is {shown!r}; give {KINDS[kind]}.")
    texts = ("methods", "shown", "words", "templates", "files")
    for name, kind in (("seeds", int), *((name, str) for name in texts)):
        for value in values.get(name, ()):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{where}: {name} holds {value!r}; each is to be {KINDS[kind]}.")


def check_budgets(plan: "Plan", trainable: Collection[str]) -> None:
    """
    Checks all that says how long, and with which settings, something is trained.

    Args:
        trainable: names of all methods that are trained, whether the plan has them or not.

    Raises:
        ValueError: an unknown method or field, a value that a field can't have, something that is left out.
    """
    _check_budget(f"{plan.name}: shared", plan.shared)
    for name, budgets in (("own", plan.own), ("start_budgets", plan.start_budgets)):
        for method, budget in budgets.items():
            _check_method(f"{plan.name}: {name}", method, trainable)
            _check_budget(f"{plan.name}: {name}, {method}", budget)
    for method in plan.trained:
        if plan.own and method not in plan.own:
            raise ValueError(f"{plan.name}: own has no budget for {method!r}: give one, which may be {{}}.")
    if plan.start_budgets and not plan.start:
        raise ValueError(f"{plan.name}: start_budgets are those of a first stage: name its configuration in `start`.")
    for name, values in plan.grid.items():
        _check_list(f"{plan.name}: grid, {name}", values)
        for value in values:
            _check_budget(f"{plan.name}: grid", {name: value})
    _check_keys(f"{plan.name}: weight_map", plan.weight_map, WEIGHTS)
    for name, values in plan.weight_map.items():
        _check_list(f"{plan.name}: weight_map, {name}", values, float)
    _check_keys(f"{plan.name}: robustness", plan.robustness, ("methods", "num_train_epochs"))
    if plan.robustness:
        _check_list(f"{plan.name}: robustness, methods", plan.robustness["methods"])
        _check_list(f"{plan.name}: robustness, num_train_epochs", plan.robustness["num_train_epochs"], float)
        for method in plan.robustness["methods"]:
            _check_method(f"{plan.name}: robustness", method, trainable)


def check_seeds(where: str, seeds: Collection[int]) -> None:
    """
    Raises:
        ValueError: a number that is no seed; one that is there twice, which would count as two trainings.
    """
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ValueError(f"{where}: seeds holds {seed}; each is to be a whole number from 0 to {SEEDS - 1}.")
    if len({*seeds}) < len(seeds):
        raise ValueError(f"{where}: seeds is {[*seeds]}; name each once, as trainings with one seed are the same.")


def check_folds(plan: "Plan") -> None:
    """
    Raises:
        ValueError: a grid, and folds that no budget can be chosen by.
    """
    if not plan.grid or plan.own:
        return
    if plan.num_folds < 2:
        raise ValueError(f"{plan.name}: num_folds is {plan.num_folds}; cut the training cases into 2 folds or more.")
    if not 1 <= plan.folds <= plan.num_folds:
        raise ValueError(
            f"{plan.name}: folds is {plan.folds}; of the num_folds={plan.num_folds} that the training cases are cut "
            f"into, 1 to {plan.num_folds} are held out in turn."
        )


def check_templates(plan: "Plan") -> None:
    """
    Raises:
        ValueError: no template, or one that has no place for a label, or another one.
    """
    if not plan.templates:
        raise ValueError(f"{plan.name}: templates is empty: name one at least, such as 'An image of {{}}.'.")
    for template in plan.templates:
        try:
            differ = template.format("one") != template.format("another")
        except (KeyError, IndexError, ValueError, AttributeError):
            differ = False
        if not differ:
            raise ValueError(
                f"{plan.name}: templates holds {template!r}; each is a text with {{}} in it, where the label goes, "
                "and no other braces."
            )


def check_lengths(plan: "Plan") -> None:
    """
    Raises:
        ValueError: numbers of epochs, in a budget or of `robustness`, where max_steps ends the trainings.
    """
    longer = [plan.lasting(count) for count in plan.robustness.get(EPOCHS, ())]
    for budget in [*_budgets(plan), *longer]:
        steps = plan.run_config(plan.baseline, budget, seed=0).training.get("max_steps", -1)
        if EPOCHS in budget and isinstance(steps, int) and steps > 0:
            raise ValueError(
                f"{plan.name}: {EPOCHS}={budget[EPOCHS]} would change nothing, as trainings end after "
                f"max_steps={steps}: take max_steps out of the configuration, or set max_steps=-1."
            )


def _budgets(plan: "Plan") -> list[dict[str, Any]]:
    """Those of all methods, and each value of the grid by itself."""
    each = [{name: value} for name, values in plan.grid.items() for value in values]
    return [plan.shared, *plan.own.values(), *each]


def check_fixed(plan: "Plan") -> None:
    """
    Checks the budgets of heads on frozen towers, which run once, on the plan's pairs, before any training.

    Raises:
        ValueError: one changes the towers or the pairs, which would change nothing.
    """
    before = _fixed(plan.run_config(plan.baseline, {}, seed=0))
    for name, value in (entry for budget in _budgets(plan) for entry in budget.items()):
        if _fixed(plan.run_config(plan.baseline, {name: value}, seed=0)) != before:
            raise ValueError(
                f"{plan.name}: a budget has {name}={value}, but frozen towers run once, before all trainings, on the "
                "same pairs for all: set it in `words`, and take it out of the budgets."
            )


def _fixed(config: "RunConfig") -> tuple[Any, ...]:
    """What the features of frozen towers depend on."""
    pooling = [config.model.config.get(name) for name in ("image_pooling", "text_pooling")]
    return config.data, config.lora, config.captioning, replace(config.model, config={}), pooling


def check_folders(plan: "Plan") -> None:
    """
    Checks the folders of models that are there.

    Raises:
        ValueError: one folder is named for several seeds.
    """
    for method, folder in plan.folders.items():
        if "{seed}" not in folder and len(plan.seeds) > 1:
            raise ValueError(
                f"{plan.name}, folders, {method}: {folder} is one folder, for {len(plan.seeds)} seeds: put {{seed}} "
                "where their names differ, or say `seeds: [0]`."
            )


def _check_method(where: str, method: Any, trainable: Collection[str]) -> None:
    if method not in trainable:
        raise ValueError(f"{where}: nothing trains a method {method!r}{did_you_mean(method, trainable)}")


def _check_budget(where: str, budget: Any) -> None:
    """Checks fields and the types of values as a configuration does, of which a budget is only a part."""
    if not isinstance(budget, dict):
        raise ValueError(f"{where} is {budget!r}; give a mapping of fields of the configuration to values.")
    try:
        for name, value in budget.items():
            section, (field, *inner), read = parse_override(f"{name}={value}")
            if not inner:
                check_field(section, field, read, "the plan")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(where: str, found: dict[str, Any], wanted: Collection[str]) -> None:
    for key in found:
        if key not in wanted:
            raise ValueError(f"{where}: unknown field {key!r}{did_you_mean(key, wanted)}")
    if found and (missing := [key for key in wanted if key not in found]):
        raise ValueError(
            f"{where}: {missing[0]} is left out, without which nothing is trained: give a list of values."
        )


def _check_list(where: str, values: Any, kind: type | None = None) -> None:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} is {values!r}; give a list of one value or more.")
    for value in values:
        if kind is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where} holds {value!r}; each is to be a number.")


__all__ = [
    "check_budgets",
    "check_fixed",
    "check_folders",
    "check_folds",
    "check_lengths",
    "check_seeds",
    "check_templates",
    "check_types",
]
