"""A small results file of evidence.py, whose numbers are easy to do by hand."""

from typing import Any


def metrics(recall: float, ranks: tuple[float, float], knn: tuple[float, float], gap: float, margin: float) -> dict:
    return {
        "recall@10": recall,
        "chance_recall@10": 0.05,
        "text_to_image_median_rank": ranks[0],
        "image_to_text_median_rank": ranks[1],
        "knn_accuracy_image_to_text": knn[0],
        "knn_accuracy_text_to_image": knn[1],
        "majority_accuracy_image_to_text": 0.2,
        "majority_accuracy_text_to_image": 0.3,
        "modality_gap": gap,
        "margin": margin,
        "v_measure": None,  # nan, as JSON has it
    }


def run(method: str, budget: str, seed: int, found: dict, curve: list[list[float]], scope: str) -> dict[str, Any]:
    return {"method": method, "budget": budget, "seed": seed, "curve": curve, "metrics": {scope: found}}


def comparison(method: str, metric: str, difference: float, p_holm: float, scope: str, **kwargs) -> dict[str, Any]:
    entry = {"budget": "own", "scope": scope, "metric": metric, "method": method, "baseline": "CLIP (LT)"}
    entry |= {"difference": difference, "low": difference - 0.02, "high": difference + 0.02, "p": p_holm / 2}
    return entry | {"p_holm": p_holm, "test": "bootstrap over cases", "groups": 402, "seeds": 2} | kwargs


def example(scope: str = "mean of the sources") -> dict[str, Any]:
    """Three methods, one seed at the shared budget and two at their own; all metrics in one scope."""
    curve = [[0.0, 0.8, 0.1], [1.0, 0.2, 0.4]]
    runs = [
        run("CLIP (LT)", "shared", 0, metrics(0.42, (9, 9), (0.6, 0.6), 0.20, 0.20), curve, scope),
        run("ours", "shared", 0, metrics(0.50, (8, 8), (0.6, 0.6), 0.10, 0.30), curve, scope),
        run("CLIP (LT)", "own", 0, metrics(0.50, (6, 8), (0.6, 0.7), 0.20, 0.30), curve, scope),
        run("CLIP (LT)", "own", 1, metrics(0.52, (8, 8), (0.6, 0.7), 0.22, 0.34), curve, scope),
        run("ours", "own", 1, metrics(0.60, (6, 6), (0.7, 0.8), 0.12, 0.48), curve, scope),
        run("ours", "own", 0, metrics(0.56, (6, 6), (0.7, 0.8), 0.09, 0.48), curve, scope),
        run("CLIP, centered", "own", 0, metrics(0.50, (7, 7), (0.6, 0.6), 0.05, 0.30), [], scope),
        run("CLIP, centered", "own", 1, metrics(0.50, (7, 7), (0.6, 0.6), 0.05, 0.30), [], scope),
    ]
    comparisons = [
        comparison("ours", "recall@10", 0.07, 0.0004, scope),
        comparison("CLIP, centered", "recall@10", -0.01, 1.0, scope),
        comparison("ours", "knn_accuracy_image_to_text", 0.1, 0.01, scope),
        comparison("ours", "knn_accuracy_text_to_image", 0.1, 0.2, scope),
        comparison("ours", "margin", 0.16, 0.03, scope, test="paired t over seeds", groups=None),
    ]
    weights = [(0, 0, 0.50, 0.30, 0.06), (6, 0, 0.10, 0.02, 0.90), (0, 4, 0.40, 0.10, 0.01), (6, 4, 0.52, 0.45, 0.05)]
    return {
        "name": "small",
        "title": "A small one",
        "found": ["40 training and 20 test pairs.", "No labels."],
        "command": "python benchmarks/evidence.py small.yaml",
        "machine": "a machine",
        "versions": "torch 2.11",
        "date": "2026-11-26",
        "minutes": 1.5,
        "baseline": "CLIP (LT)",
        "methods": {
            "CLIP (LT)": {"kind": "trained", "about": "Learnable temperature.", "source": "arXiv 2103.00020"},
            "CLIP, centered": {"kind": "post-hoc", "about": "Means | taken away.", "source": ""},
            "ours": {"kind": "trained", "about": "This package's.", "source": "this repository"},
        },
        "budgets": {
            "shared": {"num_train_epochs": 24},
            "own": {
                "CLIP (LT)": {"num_train_epochs": 6, "learning_rate": 0.003},
                "ours": {"num_train_epochs": 12, "learning_rate": 0.001},
            },
        },
        "grid": {
            "score": "recall@10",
            "folds": 2,
            "trials": {
                "CLIP (LT)": [{"budget": {"a": 1}, "score": 0.40}, {"budget": {"a": 2}, "score": 0.30}],
                "ours": [{"budget": {"a": 1}, "score": 0.42}, {"budget": {"a": 2}, "score": 0.40}],
            },
        },
        "runs": runs,
        "comparisons": comparisons,
        "weight_map": [
            {
                "align_weight": align,
                "uniformity_weight": uniformity,
                "metrics": {
                    "recall@10": recall,
                    "chance_recall@10": 0.05,
                    "margin": margin,
                    "random_pair_cosine": random,
                },
            }
            for align, uniformity, recall, margin, random in weights
        ],
        "robustness": [
            {"method": method, "num_train_epochs": epochs, "metrics": {"recall@10": recall}}
            for method, epochs, recall in (
                ("ours", 24, 0.48),
                ("CLIP (LT)", 24, 0.40),
                ("CLIP (LT)", 6, 0.50),
                ("ours", 6, 0.47),
            )
        ],
        "figures": {"curves": "evidence_small_curves.png"},
    }


def with_captions() -> dict[str, Any]:
    """The same, with captions of two kinds with two encoders."""
    scores = {
        ("CLIP (LT)", 0): ((0.30, 0.20), (0.50, 0.24)),
        ("CLIP (LT)", 1): ((0.32, 0.22), (0.54, 0.24)),
        ("ours", 0): ((0.31, 0.20), (0.60, 0.30)),
        ("ours", 1): ((0.31, 0.24), (0.64, 0.30)),
    }
    kinds = ("nearest caption", "text-only")
    runs = [
        {
            "method": method,
            "budget": "own",
            "seed": seed,
            "metrics": {
                kind: {"cider_d": cider, "rouge_l": rouge} for kind, (cider, rouge) in zip(kinds, found, strict=True)
            },
        }
        for (method, seed), found in scores.items()
    ]
    comparisons = [
        comparison("ours", "cider_d", 0.0, 1.0, kinds[0]),
        comparison("ours", "cider_d", 0.1, 0.004, kinds[1]),
        comparison("ours", "rouge_l", 0.06, 0.03, kinds[1], test="paired t over seeds", groups=None),
    ]
    settings = {
        "config": ["captioning.yaml"],
        "words": ["max_caption_tokens=48"],
        "max_caption_tokens": 48,
        "precision": "float32",
        "cache_images": None,
        "noise": 1.0,
        "without_noise": False,
        "scorer": "papers, scheduled",
        "scorer_seed": 100,
        "split": "test",
        "images": 20,
    }
    return example() | {"captions": {"settings": settings, "runs": runs, "comparisons": comparisons}}


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its rule."""
    rows = [[text.strip() for text in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]
