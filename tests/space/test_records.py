"""The form of a record: its fields, what they make, and queries with it against the model itself."""

import numpy as np
import pytest
import torch
from conftest import CAPTIONS
from hub.modality_models import embeds_of, model_of_four, processor_of_four

from .conftest import SPACE, write_gallery


search = pytest.importorskip("search", reason=f"{SPACE} is missing")
pytest.importorskip("gradio", reason="gradio is not part of the test extra: pip install gradio")
RECORD = {"sex": "male", "age": 33.0}
VALUES = ("male", 33.0, "", "", None)  # sex, age, birth, study, ward


@pytest.fixture(scope="module")
def four(tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "four"
    model, processor = model_of_four(), processor_of_four(tiny_processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    gallery = search.Gallery.load(write_gallery(tmp_path_factory.mktemp("space") / "gallery"))
    return model, processor, search.load_engines({"MODEL_ID": str(folder)}, gallery)


def test_the_form_has_the_fields_of_the_schema(four):
    import app
    import gradio as gr
    from records import RecordForm

    form = RecordForm.of(four[2])
    assert form.name == "record" and list(form.kinds) == ["sex", "age", "birth", "study", "ward"]
    with gr.Blocks():
        inputs = form.inputs()
    assert [type(each) for each in inputs] == [gr.Dropdown, gr.Number, gr.Textbox, gr.Textbox, gr.Dropdown]
    assert form.read(VALUES) == RECORD
    for values, message in (
        (("", None, "", "", ""), "Fill in at least one field of the record."),
        (("", 3, "yesterday", "", ""), "field 'birth': 'yesterday' is no date."),
    ):
        with pytest.raises(search.InputError, match=message):
            form.read(values)
    assert app.build(four[2], four[2][0].gallery)


def test_models_without_a_common_record_have_no_form(four, engines):
    from records import RecordForm

    assert RecordForm.of(engines) is None and RecordForm.of([*four[2], *engines]) is None


def test_queries_by_record_and_with_an_image(four):
    import app
    from cards import results

    model, processor, engines = four
    gallery = engines[0].gallery
    image = search.open_image(gallery.images[1])
    parts = embeds_of(model, processor, record=[RECORD], image=[image], text=CAPTIONS[:5])
    handlers = app.Handlers(engines, gallery)
    for by, expected in ((app.BY_RECORD, parts["record"]), (app.BY_BOTH, parts["record"] + parts["image"])):
        pages = handlers.search(by, "", str(gallery.images[1]), "captions", *VALUES)
        query = {"record": RECORD} if by == app.BY_RECORD else {"image": image, "record": RECORD}
        hits = engines[0].search(query, ("text",))
        vector = torch.nn.functional.normalize(expected[0], dim=0)
        cosines = (parts["text"] @ vector).tolist()
        assert [hit.index for hit in hits] == np.argsort([-cosine for cosine in cosines], kind="stable").tolist()
        assert pages == [results("Gap-closed CLIP", hits, gallery, ("text",), handlers.mixing[0])]
    hits = engines[0].search({"image": image, "record": RECORD})
    assert ("image", 1) not in [hit[:2] for hit in hits]
