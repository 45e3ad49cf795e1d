"""What the endpoint answers, against the pipelines and the model by hand."""

import base64
import json

import pytest
import torch
from conftest import tiny_config

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.model.pipeline_gap_closed_clip import ImageTextRetrievalPipeline

from .examples import IMAGE, IMAGES, LABELS, TEXTS, b64, classified, file_bytes, near, save, search


@pytest.mark.parametrize("template", [None, "An image of {} in it"])
@pytest.mark.parametrize("inputs", [IMAGE, {"image": IMAGE}])
def test_zero_shot_is_answered_as_by_the_pipeline(endpoint, classify, inputs, template):
    request = {"inputs": inputs, "parameters": {"candidate_labels": LABELS}}
    if template:
        request["parameters"]["hypothesis_template"] = template
    answer = endpoint(request)
    template = template or "Medical image of {}."
    assert answer == near(classify(IMAGES[0], candidate_labels=LABELS, hypothesis_template=template))
    assert answer[0]["score"] > answer[-1]["score"] + 0.01
    json.dumps(answer)


def test_zero_shot_of_several_images(endpoint, classify):
    expected = classify(IMAGES, candidate_labels=LABELS, hypothesis_template="Medical image of {}.")
    images = [b64(image) for image in IMAGES]
    assert endpoint(classified(images)) == endpoint(classified({"images": images})) == near(expected)
    assert endpoint(classified(images[:1])) == near(expected[:1])


def test_the_scale_is_capped_as_in_the_model(endpoint, classify):
    capped = torch.full((1,), 6.0)  # a scale of 403, above the cap of 100
    with torch.no_grad():
        before = endpoint.model.logit_scale.clone()
        for model in (endpoint.model, classify.model):
            model.logit_scale.copy_(capped)
    try:
        expected = classify(IMAGES[0], candidate_labels=LABELS, hypothesis_template="Medical image of {}.")
        assert endpoint(classified(IMAGE)) == near(expected)
    finally:
        with torch.no_grad():
            for model in (endpoint.model, classify.model):
                model.logit_scale.copy_(before)


def test_an_image_in_any_form_is_the_same(endpoint):
    expected = endpoint(classified(IMAGE))
    wrapped = base64.encodebytes(file_bytes(IMAGES[0])).decode()
    assert "\n" in wrapped.strip()
    for image in (f"data:image/png;base64,{IMAGE}", wrapped, file_bytes(IMAGES[0]), IMAGES[0]):
        assert endpoint(classified(image)) == expected
        assert endpoint(classified({"image": image})) == expected
    # An image body, with labels in the query string
    for labels in (",".join(LABELS), ", ".join(LABELS), f" {' , '.join(LABELS)}\n"):
        assert endpoint({"inputs": IMAGES[0], "parameters": {"candidate_labels": labels}}) == expected
    assert endpoint({**classified(IMAGE), "options": {"wait_for_model": True}}) == expected


@pytest.mark.parametrize("batch_size", [2, 16])
def test_embeddings_are_answered_as_by_the_model(endpoint, handler, embeds, monkeypatch, batch_size):
    monkeypatch.setattr(handler, "BATCH_SIZE", batch_size)
    request = {"inputs": {"images": [b64(image) for image in IMAGES], "texts": TEXTS}}
    answer = endpoint(request)
    assert answer == near({"image_embeds": embeds[0].tolist(), "text_embeds": embeds[1].tolist()})
    assert torch.tensor(answer["image_embeds"]).norm(dim=-1).tolist() == pytest.approx([1, 1, 1])
    image = {"image_embeds": near(embeds[0][:1].tolist())}
    for inputs in ({"image": IMAGE}, IMAGE, [IMAGE], IMAGES[0]):
        assert endpoint({"inputs": inputs, "parameters": {"task": "embeddings"}}) == image
    assert endpoint({"inputs": file_bytes(IMAGES[0])}) == image
    assert endpoint({"inputs": {"text": TEXTS[1]}}) == {"text_embeds": near(embeds[1][1:].tolist())}


def test_retrieval_is_answered_as_by_the_pipeline(endpoint, model, tiny_processor, embeds):
    pipe = ImageTextRetrievalPipeline(model, processor=tiny_processor, device="cpu")
    sent = [TEXTS[0], {"image": b64(IMAGES[0])}, {"text": TEXTS[1]}, {"image": b64(IMAGES[1])}, IMAGES[2]]
    gallery = [TEXTS[0], IMAGES[0], {"text": TEXTS[1]}, IMAGES[1], IMAGES[2]]

    def expected(query, top_k):
        hits = pipe(query, gallery, top_k=top_k)
        return [{"index": hit["index"], "score": pytest.approx(hit["score"], abs=1e-5)} for hit in hits]

    for query, image in ((TEXTS[1], TEXTS[1]), ({"image": b64(IMAGES[2])}, IMAGES[2])):
        request = search(query, sent, top_k=3)
        answer = endpoint(request)
        assert answer == expected(image, 3) and answer[0]["score"] == pytest.approx(1, abs=1e-5)
    assert endpoint(search([TEXTS[0], IMAGES[2]], sent)) == [expected(TEXTS[0], 5), expected(IMAGES[2], 5)]
    rows = torch.cat([embeds[0], 3 * embeds[1]])  # not unit vectors: the cosine is the same
    request = search(TEXTS[0], rows.tolist(), top_k=2)
    answer = endpoint(request)
    cosines = embeds[1][0] @ torch.cat(embeds).T
    best = cosines.topk(2)
    assert answer == [
        {"index": index, "score": pytest.approx(score, abs=1e-5)}
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_what_is_in_the_gallery_twice_comes_in_the_gallerys_order_as_in_the_pipeline(
    endpoint, model, tiny_processor, embeds, top_k
):
    """The first of equal scores was any of them."""
    pipe = ImageTextRetrievalPipeline(model, processor=tiny_processor, device="cpu")
    axes = torch.eye(embeds[0].shape[1])[:4].repeat(10, 1)  # of 4 vectors each ten times
    hits = endpoint(search(TEXTS[0], axes.tolist(), top_k=top_k))
    assert [hit["index"] for hit in hits] == [hit["index"] for hit in pipe(TEXTS[0], axes, top_k=top_k)]
    expected = sorted(range(40), key=lambda row: (-(embeds[1][0] @ axes[row]).item(), row))[:top_k]
    assert [hit["index"] for hit in hits] == expected


def test_a_long_text_is_cut_off(endpoint, model, tiny_processor):
    text = "chest radiograph " * 100
    inputs = tiny_processor(text=[text], return_tensors="pt", truncation=True, max_length=64)
    assert inputs["input_ids"].shape == (1, 64)
    with torch.no_grad():
        expected = model(**inputs).text_embeds.tolist()
    assert endpoint({"inputs": {"texts": [text]}}) == {"text_embeds": near(expected)}


def test_a_long_text_is_cut_off_where_positions_start_behind_the_padding(handler, tiny_processor, tmp_path):
    text_config = {**tiny_config().text_config.to_dict(), "model_type": "roberta", "pad_token_id": 0}
    model = GapClosedClipModel(tiny_config(text_config=text_config)).eval()
    assert model.max_text_length == 63 and tiny_processor.tokenizer.model_max_length == 64
    text = "chest radiograph " * 100
    inputs = tiny_processor(text=[text], return_tensors="pt", truncation=True, max_length=63)
    with torch.no_grad():
        expected = model(**inputs).text_embeds.tolist()
    endpoint = handler.EndpointHandler(str(save(tmp_path / "roberta", model, tiny_processor)))
    assert endpoint({"inputs": {"texts": [text]}}) == {"text_embeds": near(expected)}
    pipe = ImageTextRetrievalPipeline(model, processor=tiny_processor, device="cpu")
    assert pipe.embed([text]).tolist() == near(expected)
