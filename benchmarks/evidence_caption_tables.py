"""The captions in a report of evidence.py: what was written how, the table, and the comparisons."""

from collections.abc import Mapping
from typing import Any

from evidence_results import BUDGET_WORDS, CAPTION_METRICS, LEVEL, Evidence, column_of, known_name
from evidence_tables import COMPARISON_HEAD, NOT_SEPARABLE, NOT_TESTED, comparison_rows, escaped, marked
from measure import markdown_table

from gap_closed_clip.evaluation.tables import cell


def captions_table(evidence: Evidence, names: str = "") -> str:
    """
    A row for each encoder and kind of captions, means ± standard deviations over seeds; no captions, no table.

    Args:
        names: of metrics, parted by commas; by default all that there are.

    Raises:
        ValueError: there is no such metric of captions.
    """
    captions = evidence.captions
    if captions is None:
        return ""
    (budget,), kinds = captions.budgets, captions.scopes
    there = [column_of(name) for name in CAPTION_METRICS]
    there = [column for column in there if captions.present([column], kinds[0])]
    if names:
        known = [column.name for column in there]
        there = [column_of(known_name(name.strip(), known, "metric of captions")) for name in names.split(",")]
    others = [method for method in captions.methods(budget) if method != captions.baseline]
    rows = []
    for method in captions.methods(budget):
        for kind in kinds:
            row = [escaped(method), kind]
            for column in there:
                text = cell(captions.values(method, budget, kind, column), column.form)
                tested = any(captions.separable(name, budget, kind, column) is not None for name in others)
                if method in others and tested:
                    text = marked(text, captions.separable(method, budget, kind, column))
                row.append(text)
            rows.append(row)
    return markdown_table(["encoder", "captions", *(column.label for column in there)], rows, left=2)


def caption_parts(evidence: Evidence) -> list[str]:
    """The section of the report: how the captions were written, the table, and the comparisons."""
    captions = evidence.captions
    if captions is None:
        return []
    parts = ["## Captions", _how(captions, captions.results["settings"]), captions_table(evidence)]
    found = captions.results.get("comparisons", [])
    if not found:
        return [*parts, f"Nothing was tested against captions with the encoder of {captions.baseline}."]
    marks = (
        f"{NOT_SEPARABLE}: not separable from the same kind of captions with the encoder of {captions.baseline} "
        f"(Holm's p of {LEVEL} or more, over kinds and encoders); {NOT_TESTED}: not tested."
    )
    rows = []
    for kind in captions.scopes:
        of_kind = [entry for entry in found if entry["scope"] == kind]
        rows += [[kind, *row] for row in comparison_rows(of_kind, captions.baseline)]
    head = ["captions", *COMPARISON_HEAD]
    title = f"### Captions against those with the encoder of {captions.baseline}"
    return [*parts, marks, title, markdown_table(head, rows, left=3)]


def _how(captions: Evidence, settings: Mapping[str, Any]) -> str:
    """What each kind of captions is, in sentences."""
    (budget,) = captions.budgets
    seeds = sorted({run["seed"] for run in captions.runs})
    spread = f"means over {len(seeds)} seeds ± standard deviations" if len(seeds) > 1 else "one seed"
    words = "".join(f" `{word}`" for word in settings["words"])
    precision = f", in {settings['precision']}" if "precision" in settings else ""  # older results lack it
    size, limit = settings["cache_images"], settings["max_caption_tokens"]
    cut = "where the text tower's input ends" if limit is None else f"after {limit} tokens"
    without = " *No noise*: one more text-only decoder, without." if settings["without_noise"] else ""
    lines = [
        f"Captions of the {settings['images']} images of the {settings['split']} split, by decoders on encoders that "
        f"stay as they are, trained anew as whole models at {BUDGET_WORDS[budget]}; {spread}.",
        f"Decoders as in {' and '.join(f'`{name}`' for name in settings['config'])}, with{words or ' nothing else'}"
        f"{precision}: the same for all encoders. Captions are cut {cut}"
        + (f", images reduced to {size} pixels on their shorter side" if size else "")
        + "; decoding is greedy.",
        "*Nearest caption*: the training caption whose embedding is the nearest to the image's. *Image-trained*: a "
        "decoder that attends to the image's patches and its embedding. *Text-only*: one that learned to write "
        f"captions back from their own embeddings, with noise of length {settings['noise']:g}, never saw an image, "
        "and is given the image's embedding. *Mean shift*: that is moved by mean text minus mean image "
        "embedding of the training pairs. *From the true caption*: the text-only decoder is given the embedding of "
        f"the true caption, which no image gives: the ceiling.{without}",
        f"CLIPScore, RefCLIPScore and the cosine of image and caption are by one more encoder ({settings['scorer']}, "
        f"seed {settings['scorer_seed']}). BLEU, ROUGE-L and CIDEr-D are those of COCO's evaluation but for the "
        "tokenizer; a CIDEr-D of 1 is the 100 of published tables. METEOR is left out where WordNet is not installed.",
    ]
    return "\n".join(f"- {line}" for line in lines)
