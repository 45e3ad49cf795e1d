"""A Space that searches images by text and texts by image in two models' spaces, side by side.

    MODEL_ID=outputs/demo CLIP_MODEL_ID=outputs/clip python space/app.py

Variables (on the Hub: the Space's settings):

    MODEL_ID              Hub id or folder of the model whose gap is closed
    CLIP_MODEL_ID         the same towers as plain CLIP, to compare with; may be left out
    MODEL_REVISION, CLIP_MODEL_REVISION   a commit to pin. The models' own Python files are run (`load_pipeline`), so
                          pin one for models that are not your own
    GALLERY               folder that build_gallery.py wrote (default: gallery beside this file)

A private model needs the secret HF_TOKEN.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr  # noqa: E402
from cards import TOP, numbers, results  # noqa: E402
from projection import draw, fit_view, measure, window_of  # noqa: E402
from records import RecordForm  # noqa: E402
from search import (  # noqa: E402
    Engine,
    Gallery,
    InputError,
    SetupError,
    check_query,
    check_template,
    load_engines,
    open_image,
    parse_labels,
)


HERE = Path(__file__).parent
TITLE = "Gap-closed CLIP: images and texts in one space"
BY_TEXT, BY_IMAGE, BY_RECORD, BY_BOTH = "a text", "an image", "a record", "an image and a record"
SHOWN_BY = (BY_TEXT,), (BY_IMAGE, BY_BOTH), (BY_RECORD, BY_BOTH)  # of the three columns of inputs
WANTED = {"images and captions together": ("image", "text"), "images": ("image",), "captions": ("text",)}
QUERIES = [
    "Chest radiograph with pleural effusion.",
    "Brain MRI showing a glioma with oedema.",
    "Ultrasound of the liver with metastases.",
    "Mammogram with a spiculated mass.",
    "Axial chest CT showing a pulmonary nodule.",
]
LABELS = "chest radiograph, chest CT, brain MR, ultrasound, mammogram"
INTRODUCTION = (
    "After CLIP training, images and captions sit in two separate regions of the sphere, the *modality gap*. The same "
    "towers, trained to close it, can rank both kinds by one query."
)
SOFTMAX = (
    "A softmax over *these* labels at each model's own temperature: one of them always wins, and no score is a "
    "probability of disease."
)
MAP = (
    "Both modalities of the gallery's {pairs} pairs. Horizontal: from the mean caption to the mean image, so a gap is "
    "drawn at its own length. Vertical: the direction in which the rest varies most. The axes are fitted on half of "
    "the captions, and the pairs of the *other* half are drawn. The numbers are of all pairs; the gap is the debiased "
    "one."
)
MARGIN = (
    "A closed gap alone proves nothing: when everything crowds into one cone the gap closes, too. Look at the margin, "
    "how much closer true pairs are than random ones."
)
PICKS, PICK_HEIGHT = 24, 250
UPLOAD = "Upload an image (PNG or JPEG), or pick one of the gallery."
# One at a time: two requests share the models' tokenizers, which cannot pad for both at once.
EVENT = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
LAUNCH = {
    "theme": gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ),
    "css_paths": HERE / "style.css",
    "footer_links": ["gradio"],
    "max_file_size": "10mb",
    "run_history": False,
    "ssr_mode": False,
}


class Handlers:
    """What the buttons do: each method takes a visitor's inputs and gives a value for each model's panel."""

    def __init__(self, engines: list[Engine], gallery: Gallery):
        self.engines, self.gallery, self.form = engines, gallery, RecordForm.of(engines)
        self.mixing = [engine.mixing(TOP) for engine in engines]
        self.pairs = [(e.image_embeds[gallery.pairs[:, 0]], e.text_embeds[gallery.pairs[:, 1]]) for e in engines]
        self.views = [fit_view(image, text, gallery.pairs[:, 1]) for image, text in self.pairs]

    def search(self, by: str, text: str, image: str | None, wanted: str, *fields) -> list[str]:
        query = check_query(text) if by == BY_TEXT else None if by == BY_RECORD else open_image(image)
        if self.form and by in (BY_RECORD, BY_BOTH):
            query = {**({} if query is None else {"image": query}), self.form.name: self.form.read(fields)}
        kinds = WANTED[wanted]
        return [
            results(engine.title, engine.search(query, kinds), self.gallery, kinds, mixing)
            for engine, mixing in zip(self.engines, self.mixing, strict=True)
        ]

    def classify(self, image: str | None, labels: str, template: str) -> list[dict[str, float]]:
        opened, named, template = open_image(image), parse_labels(labels), check_template(template)
        return [engine.classify(opened, named, template) for engine in self.engines]

    def figures(self, text: str | None = None) -> list:
        queries = [engine.embed([check_query(text)])[0] if text is not None else None for engine in self.engines]
        drawn = []
        for view, pair, query in zip(self.views, self.pairs, queries, strict=True):
            drawn += [view(part[view.rows]) for part in pair]
            drawn += [] if query is None else [view(query[None])]
        window = window_of(drawn)
        return [
            draw(*pair, view, window, query) for view, pair, query in zip(self.views, self.pairs, queries, strict=True)
        ]

    def numbers(self) -> list[str]:
        return [numbers(e.title, measure(*pair)) for e, pair in zip(self.engines, self.pairs, strict=True)]


def friendly(handler: Callable) -> Callable:
    """
    Show what a visitor can change as a message, and leave the panels as they are.

    A handler that has one panel then returns its value, not a list with it, as Gradio asks.
    """

    @wraps(handler)
    def handle(*inputs):
        try:
            values = handler(*inputs)
        except InputError as error:
            gr.Warning(str(error))
            return gr.skip()
        return values[0] if len(values) == 1 else values

    return handle


def image_input(value: Path | None = None) -> gr.Image:
    """A field for an upload. Reading the file is left to `open_image`, whose messages are meant for visitors."""
    image = gr.Image(
        value and str(value),
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="Image",
        height=PICK_HEIGHT,
        buttons=[],
    )
    gradio_preprocess = image.preprocess

    def preprocess(payload):
        try:
            return gradio_preprocess(payload)
        except Exception:  # a damaged file; Gradio would answer with a bare "Error"
            return payload.path

    image.preprocess = preprocess
    return image


def picker(gallery: Gallery, image: gr.Image):
    """Some images of the gallery, of which the chosen one goes into `image`. Returns the event of choosing."""
    files = [str(gallery.images[row]) for row in gallery.spread(PICKS)]
    offered = gr.Gallery(
        files,
        show_label=False,
        columns=6,
        height=PICK_HEIGHT,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_classes="picks",
    )

    def pick(event: gr.SelectData) -> str:
        return files[event.index]

    return offered.select(pick, None, image, api_visibility="private", show_progress="hidden")


def search_tab(handlers: Handlers) -> None:
    gallery = handlers.gallery
    with gr.Row():
        ways = [BY_TEXT, BY_IMAGE, *([BY_RECORD, BY_BOTH] if handlers.form else [])]
        by = gr.Radio(ways, value=BY_TEXT, label="Search by", elem_id="by")
        wanted = gr.Radio(list(WANTED), value=next(iter(WANTED)), label="Look for", elem_id="wanted", scale=2)
    with gr.Column() as text_column:
        with gr.Row(equal_height=True, elem_classes="ask"):
            text = gr.Textbox(QUERIES[0], label="Text", max_lines=3, elem_id="query", scale=5, min_width=260)
            ask = gr.Button("Search", variant="primary", min_width=120, elem_id="ask")
        examples = gr.Examples([[query] for query in QUERIES], text, label="Examples")
    with gr.Column(visible=False) as image_column:
        gr.Markdown(UPLOAD)
        with gr.Row():
            with gr.Column(min_width=240):
                image = image_input()
            with gr.Column(min_width=300, scale=2):
                picked = picker(gallery, image)
        go = gr.Button("Search", variant="primary", elem_id="go")
    with gr.Column(visible=False) as record_column:
        fields = handlers.form.inputs() if handlers.form else []
        seek = gr.Button("Search", variant="primary", elem_id="seek")
    inputs = [by, text, image, wanted, *fields]
    first = handlers.search(BY_TEXT, QUERIES[0], None, wanted.value)
    with gr.Row(elem_id="found"):
        outputs = []
        for value in first:
            with gr.Column(min_width=340):
                outputs.append(gr.HTML(value))
    by.change(
        lambda value: [gr.update(visible=value in shown) for shown in SHOWN_BY],
        by,
        [text_column, image_column, record_column],
        api_visibility="private",
        show_progress="hidden",
    )
    search = friendly(handlers.search)
    chosen = (wanted.input, picked.success, examples.load_input_event.success)
    for start in (text.submit, ask.click, go.click, seek.click, *chosen):
        start(search, inputs, outputs, **EVENT)


def zero_shot_tab(handlers: Handlers) -> None:
    gallery, template = handlers.gallery, handlers.engines[-1].template
    value = gallery.images[gallery.spread(PICKS)[0]]
    gr.Markdown(UPLOAD)
    with gr.Row():
        with gr.Column(min_width=240):
            image = image_input(value)
        with gr.Column(min_width=300, scale=2):
            picked = picker(gallery, image)
    with gr.Row():
        labels = gr.Textbox(
            LABELS, label="Labels, separated by commas or new lines", lines=2, elem_id="labels", scale=2, min_width=280
        )
        form = gr.Textbox(template, label="Template: {} is where a label goes", elem_id="template", min_width=280)
    go = gr.Button("Classify", variant="primary", elem_id="classify")
    inputs = [image, labels, form]
    first = handlers.classify(str(value), LABELS, template)
    with gr.Row():
        outputs = []
        for engine, scores in zip(handlers.engines, first, strict=True):
            with gr.Column(min_width=320):
                outputs.append(gr.Label(scores, num_top_classes=10, label=engine.title, elem_classes="scores"))
    gr.Markdown(SOFTMAX)
    for start in (go.click, labels.submit, form.submit, picked.success):
        start(friendly(handlers.classify), inputs, outputs, **EVENT)


def map_tab(handlers: Handlers) -> None:
    gr.Markdown(MAP.format(pairs=len(handlers.gallery.pairs)))
    with gr.Row():
        panels = []
        for value, figure in zip(handlers.numbers(), handlers.figures(), strict=True):
            with gr.Column(min_width=340):
                gr.HTML(value)
                panels.append(gr.Plot(figure, format="png", show_label=False, elem_classes="map"))
    with gr.Row(equal_height=True, elem_classes="ask"):
        text = gr.Textbox(
            label="Put a text of your own into both figures",
            placeholder=QUERIES[3],
            max_lines=3,
            elem_id="map_query",
            scale=5,
            min_width=260,
        )
        show = gr.Button("Show", variant="primary", min_width=120, elem_id="show")
    gr.Markdown(MARGIN)
    for start in (text.submit, show.click):
        start(friendly(handlers.figures), text, panels, **EVENT)


def about(gallery: Gallery) -> str:
    """The text of the last tab, with the gallery's source and the names of the models filled in."""
    source = gallery.about.get("source", "pairs of the Space's owner")
    images = (
        "**phantoms: images drawn by a program, with made-up captions. They are not medical images** and hold no "
        "patient's data."
        if gallery.drawn
        else f"pairs of `{source}`."
    )
    text = (HERE / "about.md").read_text(encoding="utf-8")
    words = {
        "IMAGES": images,
        "MODEL": os.environ.get("MODEL_ID", ""),
        "CLIP": os.environ.get("CLIP_MODEL_ID") or "none",
    }
    for name, value in words.items():
        text = text.replace(f"[{name}]", value)
    return text


def build(engines: list[Engine], gallery: Gallery) -> gr.Blocks:
    """Build the app. Uploads are deleted within 20 minutes: every 5 minutes those that are older than 15."""
    handlers = Handlers(engines, gallery)
    drawings = "The images are drawings, not medical images. " if gallery.drawn else ""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, 900)) as app:
        gr.Markdown(f"# {TITLE}\n{INTRODUCTION}")
        gr.HTML(f'<div class="notice"><b>Not a medical device.</b> {drawings}For research only.</div>')
        with gr.Tab("Search"):
            search_tab(handlers)
        with gr.Tab("Zero-shot"):
            zero_shot_tab(handlers)
        with gr.Tab("The space"):
            map_tab(handlers)
        with gr.Tab("About"):
            gr.Markdown(about(gallery))
    return app


def not_ready(reason: str) -> gr.Blocks:
    """Build a page that tells the Space's owner what is missing, in place of a crash."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as app:
        gr.Markdown(f"# {TITLE}\n\n**This Space is not set up yet.**")
        gr.Textbox(reason, label="What is missing", lines=3, interactive=False)
    return app


def main() -> None:
    folder = Path(os.environ.get("GALLERY") or HERE / "gallery").resolve()
    try:
        gallery = Gallery.load(folder)
        app = build(load_engines(os.environ, gallery), gallery)
    except SetupError as error:
        if "SPACE_ID" not in os.environ:  # not on the Hub: the terminal is the place to say it
            sys.exit(f"app.py: {error}")
        print(f"app.py: {error}", file=sys.stderr)
        app = not_ready(str(error))
    app.queue(max_size=32).launch(allowed_paths=[str(folder)], **LAUNCH)  # the gallery is public


if __name__ == "__main__":
    main()
