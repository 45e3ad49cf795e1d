"""Names, licences and words of others on the card: text, and never HTML, a link, a cell, a heading or metadata."""

import json
import re

import pytest
import yaml
from conftest import captioner_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import escaping, write_card
from gap_closed_clip.training import load_config

from ..modality_models import FIELDS, WEIGHTS, model_of_four, processor_of_four
from .rendering import METRICS, PHANTOMS, render


HTML = "<img src=x onerror=alert(1)>"
HOSTILE = [
    HTML,
    "a](javascript:alert(1)) [b](javascript:alert(1))",
    f"`` ` {HTML} ``` ````",
    f"a | {HTML} | **b**",
    f"a\n---\nlicense: mit\n---\n\n# Title\n\n{HTML}",
    f"a\r\n```\r\n{HTML}\u2028```\u2029~~~\x0b{HTML}",
    f"\\{HTML} \\`{HTML}",
    "{{ repo_id }} {% raw %} {#",
    "a\u202eb\x00c",
    "<!-- ",
]


def shown(card: str) -> str:
    """What Markdown reads of a card as markup: without metadata, blocks and spans of code, and escaped characters."""
    text = card[REGEX_YAML_BLOCK.search(card).end() :]
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\\[\\`*\[\]<>|~$]", "", text)
    return re.sub(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", "code", text)


def check(card: str, ordinary: str) -> None:
    """The card has the lines' beginnings and the markup of the ordinary one, and neither HTML nor other links."""
    text = shown(card)
    assert "<" not in text and "`" not in text
    links = re.findall(r"\]\((.*?)\)", text)
    assert all(link.startswith(("https://", "#")) or re.fullmatch(r"\w+\.png", link) for link in links)
    assert links == re.findall(r"\]\((.*?)\)", shown(ordinary))
    assert [len(line.split("|")) for line in text.splitlines()] == [
        len(line.split("|")) for line in shown(ordinary).splitlines()
    ]
    assert text.count("\n#") == shown(ordinary).count("\n#")
    assert not set(card) & set("\u2028\u2029\u202e\x00\x0b\r")


def words(values: dict) -> list[str]:
    """Overrides of a run on two sources with these licences and subsets."""
    sources = [
        {"name": name, "source": "phantoms", "license": value, "subset": value, "train_split": value}
        for name, value in values.items()
    ]
    sources[0]["source"] = "eltorio/ROCOv2-radiology"
    return [*PHANTOMS, f"data.source={json.dumps(sources)}"]


def metrics_of(folder, name: str, value: str) -> None:
    """metrics.json with a name of a model, of a source, of a split, of a device and of a version."""
    results = {name: METRICS, value: METRICS}
    write_metrics(folder / "metrics.json", results, {"source": "phantoms"}, "test")
    content = json.loads((folder / "metrics.json").read_text())
    content["versions"] = {value: value}
    (folder / "metrics.json").write_text(json.dumps(content))


def _render(folder, *overrides, license=None, **facts) -> str:
    load_config([], list(overrides)).save(folder / "train_config.yaml")
    (folder / "run.json").write_text(json.dumps(facts))
    write_card(folder, license=license)
    return (folder / "README.md").read_bytes().decode()


@pytest.mark.parametrize("value", HOSTILE)
def test_an_encoder(folder, value):
    metrics_of(folder, "demo", "plain")
    ordinary = render(folder, *words({"one": "MIT", "two": "MIT"}), license="mit", device="cpu")
    metrics_of(folder, "demo", value)
    card = _render(folder, *words({"one": value, "two": value}), license=value, device=value)
    check(card, ordinary)
    data = ModelCard.load(folder / "README.md").data
    assert data.license == escaping.one_line(value) and data.model_name == "demo"
    block = REGEX_YAML_BLOCK.search(card).group(2)
    assert set(yaml.safe_load(block)) == set(yaml.safe_load(REGEX_YAML_BLOCK.search(ordinary).group(2)))


@pytest.mark.parametrize("value", HOSTILE[:6])
def test_a_captioner(tiny_processor, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "demo"
    captioner = captioner_of(tiny_processor.tokenizer)
    captioner.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    cards = []
    for shown_value in ("plain", value):
        config = json.loads((folder / "config.json").read_text())
        config["taken_over_from"] = shown_value
        config["hypothesis_template"] = f"{shown_value.replace('{', '').replace('}', '')} {{}}"
        (folder / "config.json").write_text(json.dumps(config))
        metrics = {"demo": {"coco_bleu_4": 0.1, "num_images": 3.0}}
        settings = {"num_beams": shown_value, "scorer": f"{shown_value}/x"}
        write_metrics(folder / "metrics.json", metrics, {"source": shown_value}, "test", settings=settings)
        write_card(folder, repo_id=f"owner/{shown_value}")
        cards.append((folder / "README.md").read_bytes().decode())
    check(cards[1], cards[0])
    for block in re.findall(r"^```python\n(.*?)^```$", cards[1], flags=re.DOTALL | re.MULTILINE):
        compile(block, "card", "exec")


@pytest.mark.parametrize("value", HOSTILE[:6])
def test_records(tiny_processor, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    folder, cards = tmp_path / "demo", []
    for shown_value in ("plain", value):
        fields = [*FIELDS[:3], {"name": shown_value, "kind": "category", "categories": [shown_value, "b"]}]
        model_of_four(fields, fusion_weights=WEIGHTS).save_pretrained(folder)
        processor_of_four(tiny_processor, fields).save_pretrained(folder)
        begin = f"text_to_record[{shown_value}]_"
        told = {f"caption_tells_record[{shown_value}]": 0.34, "num_samples": 9.0}
        told |= {f"{begin}{name}": 0.5 for name in ("accuracy@1", "accuracy@10", "majority_accuracy")}
        write_metrics(folder / "metrics.json", {"demo": METRICS | told}, {"phantom_size": 64}, "test")
        write_card(folder)
        cards.append((folder / "README.md").read_bytes().decode())
    check(cards[1], cards[0])
    for block in re.findall(r"^```python\n(.*?)^```$", cards[1], flags=re.DOTALL | re.MULTILINE):
        compile(block, "card", "exec")


def test_an_ordinary_value_is_shown_as_it_is():
    for value in ("CC BY-NC 4.0", "eltorio/ROCOv2-radiology", "my_run-2", "Größe (cm), 3.5%", "https://a.org/b?c=d&e"):
        assert escaping.as_text(value) == escaping.as_code(value) == escaping.one_line(value) == value
        assert escaping.as_string(value) == escaping.as_code_in_cell(value) == value
    assert escaping.fence_of("a: `b`\n") == "```" and escaping.fence_of("````\n") == "`````"
    assert escaping.as_string('a"b\\n') == 'a\\"b\\\\n' and escaping.as_code(" \n") == " "
