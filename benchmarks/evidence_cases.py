"""Which held-out queries of `evidence.py` belong together, and whether they are enough to compare methods by."""

import numpy as np

from gap_closed_clip.evaluation import PairEmbeddings
from gap_closed_clip.evaluation.pair_embeddings import Columns
from gap_closed_clip.evaluation.statistics import (
    Queries,
    joined_groups,
    paired_permutation,
    retrieval_hits,
    stack_queries,
)


def queries_of(test: PairEmbeddings, cases: list[str]) -> Queries:
    """
    Groups and parts of the queries, in the order of the hits: what shares a case, an image or a caption is one group.

    Args:
        test: the held-out pairs; their embeddings don't matter.
        cases: ids of the pairs' cases.
    """
    parts = test.by_source()
    if len(parts) < 2:
        parts = {"": test}
    groups = np.asarray(joined_groups(cases, test.image_ids, test.caption_ids))
    rows = {name: np.flatnonzero(np.array(test.sources) == name) if name else np.arange(len(test)) for name in parts}
    found = []
    for name, part in parts.items():
        hits = retrieval_hits(part.image_embeds, part.text_embeds, part.image_ids, part.caption_ids, k=10)
        found.append(hits.queries(groups[rows[name]]))
    return stack_queries(found)


def check_cases(columns: Columns, cases: list[str]) -> None:
    """
    Checks that methods can be compared on the held-out pairs, before anything is trained.

    Args:
        columns: of the held-out pairs.
        cases: ids of the pairs' cases.

    Raises:
        ValueError: all of them, or all of a source, belong together.
    """
    ones = np.ones((len(cases), 1), np.float32)
    queries = queries_of(PairEmbeddings(ones, ones, *columns[:4]), cases)
    try:
        paired_permutation(queries.scores, queries.scores, queries.groups, queries.parts, num_resamples=1)
    except ValueError as error:
        raise ValueError(
            f"The {len(cases)} held-out pairs, or those of one source, are a single case: all share a case, an image "
            "or a caption, directly or through others, so nothing tells how cases vary, and methods can't be "
            "compared. Hold out more pairs, of several cases (data.fold_column, data.folds) and with different "
            "captions."
        ) from error
