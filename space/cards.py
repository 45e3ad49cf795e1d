"""Writes results as HTML. Every text in it comes from a gallery or a visitor, and so every text is escaped."""

from html import escape

from search import Gallery, Hit


TOP, STRIP = 12, 60
NAMES = {"image": "image", "text": "caption"}


def results(title: str, hits: list[Hit], gallery: Gallery, kinds: tuple[str, ...], mixing: float) -> str:
    """
    One model's answer: a grid of images, a list of captions, or both in one list under a strip that shows their kinds.

    Args:
        title: the model's name.
        hits: the gallery's items, the best first.
        gallery: that they are from.
        kinds: that were looked for.
        mixing: `Engine.mixing(TOP)`, which one query alone cannot tell.
    """
    best = hits[:TOP]
    if kinds == ("image",):
        body = f'<div class="grid">{"".join(image_card(hit, gallery) for hit in best)}</div>'
    else:
        body = f'<ol class="hits">{"".join(row(rank, hit, gallery) for rank, hit in enumerate(best, 1))}</ol>'
    mixed = ""
    if len(kinds) > 1:
        queries = len(gallery.images) + len(gallery.captions)
        mixed = (
            f'{strip(hits)}<p class="overall">Over all {queries} items of the gallery as queries, {mixing:.0%} of the '
            f"first {TOP} are of the other kind.</p>"
        )
    return f'<section class="model"><h3>{escape(title)}</h3>{mixed}{body}</section>'


def image_card(hit: Hit, gallery: Gallery) -> str:
    """An image of the gallery with its score and caption."""
    caption = escape(gallery.caption_of(hit.index))
    return (
        f'<figure title="{caption}"><img src="{gallery.thumbnails[hit.index]}" alt="{caption}">'
        f'<figcaption><b class="score">{hit.score:.3f}</b><span>{caption}</span></figcaption></figure>'
    )


def row(rank: int, hit: Hit, gallery: Gallery) -> str:
    """An item of either kind as a line of the list."""
    if hit.kind == "image":
        caption = escape(gallery.caption_of(hit.index))
        item = f'<img src="{gallery.thumbnails[hit.index]}" alt="{caption}"><span class="caption">{caption}</span>'
    else:
        item = f"<span>{escape(gallery.captions[hit.index])}</span>"
    return (
        f'<li><b class="rank">{rank}</b><i class="kind {hit.kind}">{NAMES[hit.kind]}</i>'
        f'{item}<b class="score">{hit.score:.3f}</b></li>'
    )


def strip(hits: list[Hit]) -> str:
    """The kinds of the first hits as coloured cells, and the rank at which the later kind first comes."""
    cells = "".join(
        f'<i class="{hit.kind}" title="{rank}: {NAMES[hit.kind]}"></i>' for rank, hit in enumerate(hits[:STRIP], 1)
    )
    counts = {kind: sum(hit.kind == kind for hit in hits[:TOP]) for kind in NAMES}
    late = max(next((rank for rank, hit in enumerate(hits, 1) if hit.kind == kind), 0) for kind in NAMES)
    missing = NAMES[hits[late - 1].kind]
    shown = min(TOP, len(hits))
    return (
        f'<p class="mix">Among the first {shown}: <b class="image">{counts["image"]} images</b> and '
        f'<b class="text">{counts["text"]} captions</b>. The first {missing} is number {late}.</p>'
        f'<div class="strip" role="img" aria-label="Kinds of the first {min(STRIP, len(hits))} results">{cells}</div>'
    )


def numbers(title: str, measured: dict[str, float]) -> str:
    """One model's figures of the gap, as `projection.measure` gives them."""
    shown = (
        ("gap ↓", "debiased_modality_gap"),
        ("true-pair cosine ↑", "true_pair_cosine"),
        ("random-pair cosine", "random_pair_cosine"),
        ("margin ↑", "margin"),
    )
    cells = "".join(f"<div><b>{measured[key]:.2f}</b><span>{name}</span></div>" for name, key in shown)
    return f'<section class="model"><h3>{escape(title)}</h3><div class="numbers">{cells}</div></section>'
