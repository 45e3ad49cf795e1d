"""What a report tells of more than two modalities: every two of them, queries of two, and the fields of records."""

import re
from collections.abc import Mapping, Sequence

from .every_pair import MEAN, name_for, pairs_of_modalities
from .queries import PLAIN, WEIGHTED, queries_of_two, query_name
from .tables import Metrics, cell_of, runs_of, table


# Metric, by its name for images and captions: (what the table of pairs calls it, format of its value).
ROWS_OF_PAIRS = {
    "modality_gap": ("modality gap ↓", "{:.3f}"),
    "debiased_modality_gap": ("debiased modality gap ↓", "{:.3f}"),
    "true_pair_cosine": ("true-pair cosine ↑", "{:.3f}"),
    "random_pair_cosine": ("random-pair cosine", "{:.3f}"),
    "margin": ("margin (true - random) ↑", "{:.3f}"),
    **{
        f"{direction}_{metric}": (f"{label}, {name}", form)
        for direction, label in (("image_to_text", "first to second"), ("text_to_image", "second to first"))
        for metric, name, form in (
            ("recall@1", "R@1 ↑", "{:.1%}"),
            ("recall@5", "R@5 ↑", "{:.1%}"),
            ("recall@10", "R@10 ↑", "{:.1%}"),
            ("median_rank", "median rank ↓", "{:.1f}"),
        )
    },
    "recall@10": ("R@10, mean of both directions ↑", "{:.1%}"),
    "chance_recall@10": ("chance: R@10, mean of both directions", "{:.1%}"),
    "v_measure": ("V-measure, both stacked ↑", "{:.1%}"),
    "ari": ("adjusted Rand index, both stacked ↑", "{:.3f}"),
    "num_pairs": ("samples that have both", "{:.0f}"),
}
FIELD = re.compile(r"text_to_(?P<name>[a-z0-9_]+?)\[(?P<field>.+)\]_(?P<metric>[^\]]+)")
TOLD = re.compile(r"caption_tells_(?P<name>[a-z0-9_]+?)\[(?P<field>.+)\]")


def modalities_of(metrics: Metrics) -> tuple[str, ...]:
    """The names of the modalities that metrics are of, in the model's order."""
    names = [name.removeprefix("mean_cosine_") for name in metrics if name.startswith("mean_cosine_")]
    return tuple(sorted(dict.fromkeys(names), key=lambda name: {"image": 0, "text": 1}.get(name, 2)))


def modality_report(
    results: Mapping[str, Metrics | Sequence[Metrics]], sources: Mapping[str, Mapping[str, Metrics]] | None = None
) -> str:
    """
    Tables with headings, of each model that has more than two modalities; "" if there is none.

    Args:
        results: {model name: its metrics of all pairs, or those of several runs}.
        sources: {source: {model name: its metrics of the source's own pairs}}, of several sources.
    """
    parts = []
    for model, found in results.items():
        scopes: dict[str, Metrics | Sequence[Metrics]] = {model: found}
        if sources and len(sources) > 1:
            scopes |= {f"{model}, {source}": by_model.get(model, {}) for source, by_model in sources.items()}
        for title, metrics in scopes.items():
            parts += _of_one(title, runs_of(metrics))
    return "\n\n".join(parts)


def _of_one(title: str, runs: list[Metrics]) -> list[str]:
    if not runs or "num_samples" not in runs[0]:
        return []
    tables = {
        "every two modalities": _pairs(runs),
        "two modalities as one query, R@10": _queries(runs),
        "fields of the record from the caption, by the nearest records": _fields(runs),
    }
    return [f"### {title}: {what}\n\n{table(rows)}" for what, rows in tables.items() if len(rows) > 1]


def _pairs(runs: list[Metrics]) -> list[list[str]]:
    """A column for every two modalities, and the mean over them."""
    pairs = [
        pair
        for pair in pairs_of_modalities(modalities_of(runs[0]))
        if all(name_for("margin", *pair) in run for run in runs)
    ]
    rows = [["metric", *(f"{first} - {second}" for first, second in pairs), "mean"]]
    for metric, (label, form) in ROWS_OF_PAIRS.items():
        cells = [cell_of(runs, name_for(metric, *pair), form) for pair in pairs]
        if any(text != "-" for text in cells):
            rows.append([label, *cells, cell_of(runs, f"{MEAN}{metric}", form)])
    return rows


def _queries(runs: list[Metrics]) -> list[list[str]]:
    """A row for every two modalities and what they search for."""
    head = [
        "query",
        "first alone",
        "second alone",
        "both, plain mean",
        "both, weighted",
        "chance",
        "weight of the first",
    ]
    rows = [[*head, "samples"]]
    for first, second, target in queries_of_two(modalities_of(runs[0])):
        begin = query_name(first, second, target)
        if f"{begin}num_pairs" not in runs[0]:
            continue
        ways = [cell_of(runs, f"{begin}{way}_recall@10", "{:.1%}") for way in (first, second, PLAIN, WEIGHTED)]
        chance = cell_of(runs, f"{begin}chance_recall@10", "{:.1%}")
        share = cell_of(runs, f"{begin}weight_{first}", "{:.2f}")
        number = cell_of(runs, f"{begin}num_pairs", "{:.0f}")
        rows.append([f"{first} + {second} to {target}", *ways, chance, share, number])
    return rows


def _fields(runs: list[Metrics]) -> list[list[str]]:
    """A row for each figure of each field, beside what it has to beat and how often the caption tells the value."""
    rows = [["field", "figure", "nearest", "nearest 10", "to beat", "told in captions"]]
    found = [match for name in runs[0] if (match := FIELD.fullmatch(name))]
    for name, field in dict.fromkeys((match["name"], match["field"]) for match in found):
        begin = f"text_to_{name}[{field}]_"
        told = cell_of(runs, f"caption_tells_{name}[{field}]", "{:.0%}")
        for figure, label, form, baseline in (
            ("mae", "mean absolute error ↓", "{:.3g}", "median_mae"),
            ("accuracy", "accuracy ↑", "{:.1%}", "majority_accuracy"),
            ("balanced_accuracy", "balanced accuracy ↑", "{:.1%}", "chance_balanced_accuracy"),
        ):
            if f"{begin}{baseline}" in runs[0]:
                cells = [cell_of(runs, f"{begin}{what}", form) for what in (f"{figure}@1", f"{figure}@10", baseline)]
                rows.append([f"{name}.{field}", label, *cells, told])
    return rows


def what_captions_tell(metrics: Metrics) -> str:
    """One sentence on how often captions tell the fields of records word for word, or ""."""
    told = {match["field"]: metrics[name] for name in metrics if (match := TOLD.fullmatch(name))}
    if not told:
        return ""
    listed = ", ".join(f"'{field}' in {share:.0%}" for field, share in sorted(told.items(), key=lambda each: -each[1]))
    return (
        f"Captions tell, word for word, of the pairs with both: {listed}. The more is told, the less retrieval says."
    )


__all__ = ["modalities_of", "modality_report", "what_captions_tell"]
