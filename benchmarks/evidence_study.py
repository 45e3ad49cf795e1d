"""The plan of `evidence.py`, carried out: budgets, runs, post-hoc methods, comparisons."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from comparison import digest_of_folder, digest_of_start
from evidence_cases import queries_of
from evidence_compare import comparisons
from evidence_measure import mapped, mean_of, measure
from evidence_plan import GIVEN, OWN, SHARED, Method, Plan
from evidence_runs import FeatureRuns, Runs, Trained
from evidence_store import Store

from gap_closed_clip.disk import replacing
from gap_closed_clip.evaluation import PairEmbeddings, evaluate_embeddings
from gap_closed_clip.training import RunConfig


class Evidence:
    """
    Runs a plan.

    Args:
        plan: what is asked for.
        runs: how it is trained.
        results: what was found before.
    """

    def __init__(self, plan: Plan, runs: Runs, results: Store):
        self.plan, self.runs, self.results = plan, runs, results
        self.seconds = 0.0
        self.arrays: dict[str, Path] = {}  # by method, of the first seed at the last kind of budget
        self.post_hoc = [name for name, method in plan.known_methods.items() if method.post_hoc]
        self.budgets = [tuple(zip(plan.grid, values, strict=True)) for values in product(*plan.grid.values())]
        if not plan.grid or plan.own:
            self.budgets = []
        if self.budgets and not isinstance(runs, FeatureRuns):
            raise ValueError("grid: budgets are chosen on frozen towers alone; give `grid: {}` and `own`.")
        kinds = [SHARED] if not (plan.own or self.budgets) else [SHARED, OWN] if plan.shared else [OWN]
        self.kinds = kinds = [GIVEN] if plan.folders else kinds
        trained = len(plan.trained)
        results.total = trained * (len(self.budgets) * plan.folds + len(kinds) * len(plan.seeds))
        results.total += len(list(self.points())) + len(list(self.lengths()))

    def found(self) -> dict[str, Any]:
        """All results, as evidence_NAME.json has them."""
        plan = self.plan
        grid = self.grid()
        budgets = self.chosen(grid)
        with_hits = [run for kind in self.kinds for run in self.of_budget(kind, budgets)]
        ones = np.ones((len(self.runs.test_pairs), 1), np.float32)  # which is found does not matter
        queries = queries_of(PairEmbeddings(ones, ones, *self.runs.columns[:4]), self.runs.groups)
        known = plan.known_methods
        content = {
            "methods": {
                name: {"kind": self._kind(each), "about": each.about, "source": each.source}
                for name, each in known.items()
            },
            "baseline": plan.baseline,
            "budgets": budgets,
            "runs": [{key: value for key, value in run.items() if key != "hits"} for run in with_hits],
            "comparisons": comparisons(with_hits, plan, queries),
        }
        if grid:
            content["grid"] = {"score": "recall@10", "folds": plan.folds, "trials": grid}
        content["weight_map"] = [self.at_point(point, budgets) for point in self.points()]
        content["robustness"] = [self.at_length(method, epochs) for method, epochs in self.lengths()]
        return {name: value for name, value in content.items() if value}

    def grid(self) -> dict[str, list[dict[str, Any]]]:
        """Every method's trials; empty where the plan has no grid."""
        return {method: self.trials(method) for method in self.plan.trained} if self.budgets else {}

    def chosen(self, grid: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The budgets of each kind; own ones are the grid's best."""
        plan = self.plan
        own = {method: dict(plan.own.get(method, {})) for method in plan.trained} if plan.own else {}
        own |= {method: max(trials, key=lambda each: each["score"])["budget"] for method, trials in grid.items()}
        budgets: dict[str, Any] = {SHARED: plan.shared, OWN: own, GIVEN: {}}
        return {kind: budgets[kind] for kind in self.kinds}

    def steps(self) -> Iterator[list[Callable[[], object]]]:
        """Calls that make one training each, those of one list in any order; the second needs what the first found."""
        plan = self.plan
        trials = list(product(plan.trained, self.budgets, range(plan.folds)))
        yield [partial(self.trial, method, dict(budget), fold) for method, budget, fold in trials]
        budgets = self.chosen(self.grid())
        runs = product(self.kinds, plan.seeds, plan.trained)
        yield [
            *(partial(self.run, kind, budgets, seed, method) for kind, seed, method in runs),
            *(partial(self.at_point, point, budgets) for point in self.points()),
            *(partial(self.at_length, method, epochs) for method, epochs in self.lengths()),
        ]

    def _kind(self, method: Method) -> str:
        return "post-hoc" if method.post_hoc else GIVEN if self.plan.folders else "trained"

    def trials(self, method: str) -> list[dict[str, Any]]:
        """The score of every budget of the grid, a mean over folds of the mean over sources."""
        found = []
        for budget in map(dict, self.budgets):
            scores = [self.trial(method, budget, fold) for fold in range(self.plan.folds)]
            found.append({"budget": budget, "score": round(float(np.mean(scores)), 6)})
        return found

    def trial(self, method: str, budget: dict[str, Any], fold: int) -> float:
        """The score of a budget on one fold."""
        words = ", ".join(
            f"{key}={value:g}" if isinstance(value, int | float) else f"{key}={value}" for key, value in budget.items()
        )
        name = f"{method}, {words}, fold {fold}"
        content = self._get(name, method, budget, fold, lambda t, _: {"score": score(t)}, fold=fold)
        return content["result"]["score"]

    def of_budget(self, kind: str, budgets: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """All methods over all seeds at one kind of budget; post-hoc ones with the baseline's."""
        plan = self.plan
        each: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.known_methods}
        for seed in plan.seeds:
            for method in plan.trained:
                content = self.run(kind, budgets, seed, method)
                result = content["result"]
                if seed == plan.seeds[0]:
                    self.arrays[method] = content["arrays"]
                for name, found in result["methods"].items():
                    about = {"method": name or method, "budget": kind, "seed": seed}
                    curve = [] if name else result["curve"]
                    each[name or method].append({**about, "curve": curve, **found})
        return (run for runs in each.values() for run in runs)

    def run(self, kind: str, budgets: dict[str, Any], seed: int, method: str) -> dict[str, Any]:
        """One method at one kind of budget, and what post-hoc methods make of it, if it is the baseline."""
        budget = budgets[OWN][method] if kind == OWN else budgets[kind]
        post_hoc = self.post_hoc if method == self.plan.baseline else []

        def compute(trained: Trained, arrays: Path) -> dict[str, Any]:
            return self._measured(trained, post_hoc, arrays)

        return self._get(f"{method}, {kind}, seed {seed}", method, budget, seed, compute, bool(post_hoc))

    def points(self) -> Iterator[tuple[float, float]]:
        """Weights of alignment and uniformity of the map."""
        given = self.plan.weight_map
        return product(given.get("align_weight", []), given.get("uniformity_weight", []))

    def at_point(self, point: tuple[float, float], budgets: dict[str, Any]) -> dict[str, Any]:
        align, uniformity = point
        own = budgets.get(OWN, {})
        budget = own["ours"] if "ours" in own else self.plan.shared  # its own may be {}, that of the configuration
        weights = {"align_weight": align, "uniformity_weight": uniformity, "center_projections": True}
        name = f"weights {align:g} and {uniformity:g}"
        result = self._get(name, "ours", {**budget, **weights}, self.plan.seeds[0], self._alone)["result"]
        metrics = next(iter(result["methods"][""]["metrics"].values()))
        return {"align_weight": align, "uniformity_weight": uniformity, "metrics": metrics}

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Methods and numbers of epochs of the trainings that are too long."""
        given = self.plan.robustness
        return product(given.get("methods", []), given.get("num_train_epochs", []))

    def at_length(self, method: str, epochs: int) -> dict[str, Any]:
        name = f"{method}, {epochs} epochs"
        result = self._get(name, method, self.plan.lasting(epochs), self.plan.seeds[0], self._alone)["result"]
        metrics = next(iter(result["methods"][""]["metrics"].values()))
        return {"method": method, "num_train_epochs": epochs, "metrics": metrics}

    def _alone(self, trained: Trained, _: Path) -> dict[str, Any]:
        return self._measured(trained, [], None)

    def _measured(self, trained: Trained, post_hoc: list[str], kept: Path | None) -> dict[str, Any]:
        """
        What a training gave, under "", and what post-hoc methods make of it, under their names.

        Args:
            kept: file for the embeddings of the held-out pairs.
        """
        found = {"": trained} | {name: mapped(trained, self.plan.known_methods[name]) for name in post_hoc}
        if kept is not None:
            arrays = {
                f"{name}/{modality}": each.test.embeds(modality).astype(np.float16)
                for name, each in found.items()
                for modality in ("image", "text")
            }
            with replacing(kept) as draft, open(draft, "wb") as file:
                np.savez(file, **arrays)
        curve = [[round(float(value), 4) for value in point] for point in trained.curve]
        return {"curve": curve, "methods": {name: measure(each, self.runs.classes) for name, each in found.items()}}

    def _get(self, name, method, budget, seed, compute, embed_train=False, fold=None) -> dict[str, Any]:
        config = self.plan.run_config(method, budget, seed)
        about = {
            "config": but_for_output(config),
            "fold": fold,
            "pairs": self.runs.pairs_digest,
            "templates": list(self.plan.templates),
        }
        if fold is not None:
            about["folds"] = self.runs.folds_digest
        if embed_train:
            about["post_hoc"] = {name: self.plan.known_methods[name].post_hoc for name in self.post_hoc}
        if self.plan.start:
            about["start"] = but_for_output(self.plan.start_config(method, seed))
        elif start := digest_of_start(config):
            about["start"] = start
        if self.plan.folders:
            about["model"] = digest_of_folder(self.plan.model_folder(method, seed))
        content = self.results.get(
            name, about, lambda arrays: compute(self.runs.train(method, budget, seed, fold, embed_train), arrays)
        )
        self.seconds += content["seconds"]
        return content

    def spaces(self) -> tuple[dict[str, PairEmbeddings], dict[str, dict[str, float]]]:
        """The held-out pairs in the spaces that are shown, of the first seed and the last budgets; and metrics."""
        spaces = {}
        for method in self.plan.trained:
            with np.load(self.arrays[method]) as arrays:
                for name in dict.fromkeys(key.rpartition("/")[0] for key in arrays):
                    images, texts = (arrays[f"{name}/{part}"].astype(np.float32) for part in ("image", "text"))
                    spaces[name or method] = PairEmbeddings(images, texts, *self.runs.columns[:4])
        known = [*self.plan.known_methods]
        # The command line may name other methods than those to show.
        spaces = {name: spaces[name] for name in [name for name in known if name in self.plan.shown] or known}
        return spaces, {name: evaluate_embeddings(each, grouping=False) for name, each in spaces.items()}


def score(trained: Trained) -> float:
    """R@10, the mean over the sources."""
    sources = trained.test.by_source() or {"": trained.test}
    each = {name: evaluate_embeddings(part, grouping=False) for name, part in sources.items()}
    return mean_of(each)["recall@10"]


def but_for_output(config: RunConfig) -> dict[str, Any]:
    """The settings without the output folder, which no number depends on."""
    found = config.to_dict()
    found["training"].pop("output_dir", None)
    return found
