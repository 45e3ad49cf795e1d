"""
The code in README and pages runs, and gives what it should.

It runs in a folder with tiny models under the names that the pages use, phantoms being the images. Every block's
result is compared with what is computed in another way.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import IMAGE_SIZE, captioner_of, noise_image, tiny_config
from conversion.clip_models import embed_by_transformers, save_source
from huggingface_hub import constants
from markdown_pages import PAGES, ROOT, blocks, name_of
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, normalize
from transformers import BertModel

import gap_closed_clip
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import DataArguments
from gap_closed_clip.evaluation import embed_pairs, evaluate_embeddings
from gap_closed_clip.hub import write_examples
from gap_closed_clip.metrics._embeddings import TIE


# What a page says where its blocks, or those of a section, are one program.
ONE_PROGRAM = "build on one another"
IMAGE = "outputs/demo/examples/chest_radiograph.png"
TOWERS = ("timm/eva02_base_patch16_clip_224.merged2b", "google-bert/bert-base-uncased")
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@dataclass
class Place:
    """What the code of a page finds: tiny models in the folders and under the Hub ids that it names."""

    model: gap_closed_clip.GapClosedClipModel
    processor: gap_closed_clip.GapClosedClipProcessor
    folder: Path
    vision: torch.nn.Module
    text: BertModel
    clip: Path

    @torch.no_grad()
    def images(self, *paths: str) -> torch.Tensor:
        """(N, D) unit vectors, one image at a time."""
        pixels = [self.processor.image_processor(Image.open(path), return_tensors="pt") for path in paths]
        return torch.cat([self.model(pixel_values=image["pixel_values"]).image_embeds for image in pixels])

    @torch.no_grad()
    def texts(self, *texts: str) -> torch.Tensor:
        """(N, D) unit vectors, one text at a time: without padding."""
        tokens = [self.processor.tokenizer(text, return_tensors="pt") for text in texts]
        return torch.cat([self.model(**inputs).text_embeds for inputs in tokens])


@pytest.fixture
def place(tiny_model, tiny_processor, tmp_path, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    save("outputs/demo", tiny_model.eval(), tiny_processor)
    write_examples("outputs/demo", DataArguments(phantom_test_pairs=32, phantom_size=48))
    for name, memory in (("captioner", "patches_and_embedding"), ("captioner_text", "embedding")):
        save(f"outputs/{name}", captioner_of(tiny_processor.tokenizer, decoder_memory=memory), tiny_processor)
        shutil.copytree("outputs/demo/examples", f"outputs/{name}/examples")
    shutil.copytree("outputs/demo", "outputs/published")
    for file in (Path(gap_closed_clip.__file__).parent / "hub").glob("handler*.py"):
        shutil.copy(file, "outputs/published")
    make_pairs(tmp_path / "my_pairs")
    vision, text = download_towers(tiny_processor.tokenizer)
    clip = save_source("CLIP", snapshot_folder("openai/clip-vit-base-patch32"))
    known = set(sys.modules)
    yield Place(tiny_model, tiny_processor, tmp_path, vision, text, clip)
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or ROOT).is_relative_to(tmp_path):
            del sys.modules[name]  # the endpoint's handler


def save(folder: str, model, processor) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_pairs(folder: Path) -> None:
    """Pairs in ROCO's layout, 16 to train on and 8 held out, no two alike."""
    for split, count in (("train", 16), ("validation", 8)):
        images = folder / split / "radiology" / "images"
        images.mkdir(parents=True)
        for number in range(count):
            noise_image(10 + 5 * number).save(images / f"{number}.jpg")
        captions = "".join(f"{number}\tFinding number {number}.\n" for number in range(count))
        (images.parent / "captions.txt").write_text(captions)


def download_towers(tokenizer) -> tuple[torch.nn.Module, BertModel]:
    """Tiny towers in the cache of the Hub, as those of TOWERS lie there when they have been downloaded."""
    vision_folder, text_folder = (snapshot_folder(repo_id) for repo_id in TOWERS)
    torch.manual_seed(1)
    args = {"img_size": IMAGE_SIZE, "embed_dim": 48, "depth": 1, "num_heads": 3}
    config = {"architecture": "eva02_tiny_patch14_224", "num_classes": 24, "model_args": args}
    config["pretrained_cfg"] = {"mean": MEAN, "std": STD, "input_size": [3, IMAGE_SIZE, IMAGE_SIZE]}
    vision = timm.create_model(config["architecture"], num_classes=24, **args).eval()
    save_file(vision.state_dict(), vision_folder / "model.safetensors")
    (vision_folder / "config.json").write_text(json.dumps(config))
    text = BertModel(tiny_config().text_config).eval()
    save(str(text_folder), text, tokenizer)
    return vision, text


def snapshot_folder(repo_id: str) -> Path:
    repository = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    return repository / "snapshots" / "0123"


def close(found, expected, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=atol, rtol=0)


def check_use(names: dict, place: Place) -> None:
    texts = place.texts("Chest radiograph.", "Axial MR image of the brain.")
    close(names["cosines"], place.images(IMAGE) @ texts.T)


def check_pipelines(names: dict, place: Place) -> None:
    (image,) = place.images(IMAGE)
    brain, normal = place.texts("Axial MR image of the brain.", "Normal chest radiograph.")
    close(names["image_vector"], image)
    close(names["text_vector"], brain)
    close(names["gallery"], torch.stack([image, normal, brain]))
    labels = ["chest radiograph", "brain MR"]
    assert names["template"] == "Medical image of {}."
    scores = {score["label"]: score["score"] for score in names["scores"]}
    close([scores[label] for label in labels], softmax_of_labels(place, image, labels))
    cosines = torch.stack([image, normal, brain]) @ place.texts("Chest radiograph with pleural effusion.")[0]
    best = cosines.argsort(descending=True)[:2].tolist()
    assert [hit["index"] for hit in names["hits"]] == best
    close([hit["score"] for hit in names["hits"]], cosines[best])


@torch.no_grad()
def softmax_of_labels(place: Place, image: torch.Tensor, labels: list[str]) -> torch.Tensor:
    prompts = place.texts(*(f"Medical image of {label}." for label in labels))
    return (place.model.logit_scale.exp() * image @ prompts.T).softmax(-1)


@torch.no_grad()
def check_towers(names: dict, place: Place) -> None:
    model, processor = names["model"].eval(), names["processor"]
    gray = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 51, np.uint8)
    inputs = processor(images=[gray], text=["Chest radiograph with a nodule."], return_tensors="pt")
    pixels = ((0.2 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None].expand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    close(inputs["pixel_values"], pixels)
    close(model(**inputs).image_embeds, normalize(place.vision(pixels)))  # timm's own model, its own head
    tokens = place.processor.tokenizer("Chest radiograph with a nodule.", return_tensors="pt")
    first = place.text(**tokens).last_hidden_state[:, 0]
    close(model(**inputs).text_embeds, normalize(model.text_projection(first)))


@torch.no_grad()
def check_trainer(names: dict, place: Place) -> None:
    model, pairs = names["model"].eval().cpu(), place.folder / "my_pairs" / "validation" / "radiology"
    assert not torch.equal(model.visual_projection.weight, place.vision.head.weight)  # it was trained
    images = [Image.open(pairs / "images" / f"{number}.jpg").convert("RGB") for number in range(8)]
    texts = [f"Finding number {number}." for number in range(8)]
    outputs = model(**names["processor"](images=images, text=texts, return_tensors="pt", padding=True))
    cosine = (outputs.image_embeds * outputs.text_embeds).sum(-1).mean()
    last = [entry for entry in names["trainer"].state.log_history if "eval_true_pair_cosine" in entry][-1]
    close(last["eval_true_pair_cosine"], cosine, atol=1e-4)


@torch.no_grad()
def check_centered(names: dict, place: Place) -> None:
    """The center of each modality is the mean of what goes into its centering, one pair at a time."""
    model, folder = names["model"].eval().cpu(), place.folder / "my_pairs" / "train" / "radiology"
    seen: dict[str, list[torch.Tensor]] = {"visual_centering": [], "text_centering": []}
    hooks = [
        getattr(model, name).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name in seen
    ]
    for number in range(16):
        image = Image.open(folder / "images" / f"{number}.jpg").convert("RGB")
        model(**names["processor"](images=[image], text=[f"Finding number {number}."], return_tensors="pt"))
    for hook, (name, inputs) in zip(hooks, seen.items(), strict=True):
        hook.remove()
        close(getattr(model, name).running_mean, torch.cat(inputs).mean(0), atol=1e-5)


def check_adapter(names: dict, place: Place) -> None:
    assert not (place.folder / "outputs" / "mine" / "model.safetensors").exists()
    model, _ = load_checkpoint("outputs/mine")
    before, after = place.model.state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = ("qkv", "fc1", "fc2", "proj", "query", "key", "value", "dense", "logit_scale", "_projection")
    assert moved and all(any(part in name for part in adapted) for name in moved)
    assert not any("patch_embed" in name or "embeddings" in name for name in moved)


def check_captions(names: dict, place: Place) -> None:
    captioner = captioner_of(place.processor.tokenizer)
    pixel_values = place.processor(images=[Image.open(IMAGE)], return_tensors="pt")["pixel_values"]
    prompt = place.processor.tokenizer("Chest radiograph", return_tensors="pt")["input_ids"]
    by_hand = [
        captioner.generate(pixel_values),
        captioner.generate(pixel_values, prompt, max_new_tokens=20),
        captioner.generate(pixel_values, num_beams=4),
    ]
    expected = [place.processor.batch_decode(tokens, skip_special_tokens=True)[0] for tokens in by_hand]
    expected[1] = expected[1].replace("chest", "Chest", 1)  # the pipeline gives the prompt back as it was
    assert names["captions"] == expected and len(set(expected)) > 1


def check_between(names: dict, place: Place) -> None:
    captioner = captioner_of(place.processor.tokenizer, decoder_memory="embedding")
    texts = [
        place.processor.tokenizer(text, return_tensors="pt") for text in ("Chest radiograph.", "Pleural effusion.")
    ]
    mean = sum(captioner.gap_closed_clip(**inputs).text_embeds for inputs in texts) / 2
    close(names["middle"], mean / mean.norm())
    assert len(names["between"]) == 3 and all(names["between"])


def check_micro_batches(names: dict, place: Place) -> None:
    assert len(names["paths"]) == 5  # as the page says
    whole = place.model(**names["batch"]).loss
    whole.backward()
    close(names["loss"], whole)
    gradients = {name: parameter.grad for name, parameter in place.model.named_parameters()}
    found = {name: parameter.grad for name, parameter in names["model"].named_parameters()}
    torch.testing.assert_close(found, gradients, atol=1e-6, rtol=1e-4)


def check_objective(names: dict, place: Place) -> None:
    """The formulas of docs/training.md over N x N matrices in float64."""
    anchor, *others = (names[f"{kind}_embeds"].double() for kind in ("image", "text", "audio"))
    same_image, true_pair = names["ids"][:, None] == names["ids"], torch.eye(len(anchor), dtype=torch.bool)
    rows = torch.arange(len(anchor))
    contrastive = align = 0
    for other in others:
        logits = (anchor @ other.T / 0.07).masked_fill(same_image & ~true_pair, -torch.inf)
        contrastive += (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 4
        align += (other - anchor).square().sum(-1).mean() / 2
    centroids = normalize(anchor + sum(others), dim=-1)
    uniformity = (-2 * torch.cdist(centroids, centroids) ** 2).exp()[~same_image].mean().log()
    torch.testing.assert_close(names["loss"].double(), contrastive + align + uniformity, atol=0, rtol=1e-5)


def check_metrics(names: dict, place: Place) -> None:
    folder = place.folder / "my_pairs" / "validation" / "radiology" / "images"
    paths = [str(folder / f"{number}.jpg") for number in range(8)]
    images = place.images(*paths).numpy()
    texts = place.texts(*(f"Finding number {number}." for number in range(8))).numpy()
    close(names["embeddings"].image_embeds, images)
    close(names["embeddings"].text_embeds, texts)
    close(names["found"]["modality_gap"], float(np.linalg.norm(images.mean(0) - texts.mean(0))))
    # Those of the page's own code: a random model's cosines lie so close that rounding would change ranks.
    images, texts = (names["embeddings"].image_embeds.astype(float), names["embeddings"].text_embeds.astype(float))
    images, texts = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (images, texts))
    ranks = ((texts @ images.T) >= (texts * images).sum(1, keepdims=True) - TIE).sum(1)  # a tie counts against
    assert names["metrics"]["text_to_image_recall@5"] == np.mean(ranks <= 5)
    assert names["metrics"]["modality_gap"] == pytest.approx(names["found"]["modality_gap"])


def check_change(names: dict, place: Place) -> None:
    after = evaluate_embeddings(names["centered"], grouping=False)["recall@10"]
    change = names["change"]
    assert change.difference == pytest.approx(after - names["metrics"]["recall@10"])
    assert change.low <= change.difference <= change.high


def check_closed(names: dict, place: Place) -> None:
    """The model, and the function, give what the formula gives."""
    features = names["features"]
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (features.image_embeds, features.text_embeds)]
    shifted = unit[0] - (unit[0].mean(0) - unit[1].mean(0)) / 2
    expected = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
    np.testing.assert_allclose(names["moved"], expected, atol=1e-6)
    found = embed_pairs(names["closed"], names["processor"], names["pairs"])
    np.testing.assert_allclose(found.image_embeds, expected, atol=1e-5)


def check_endpoint(names: dict, place: Place) -> None:
    (image,), labels = place.images(IMAGE), ["pleural effusion", "normal chest"]
    scores = {score["label"]: score["score"] for score in names["ranked"]}
    close([scores[label] for label in labels], softmax_of_labels(place, image, labels))
    close(names["vectors"]["image_embeds"][0], image)
    close(names["vectors"]["text_embeds"], place.texts("Normal chest radiograph."))


def check_gallery(names: dict, place: Place) -> None:
    assert len(names["paths"]) == 5 and Path("gallery.faiss").is_file()
    close(names["gallery"]["embedding"][:], place.images(*names["paths"]), atol=1e-6)


def check_search(names: dict, place: Place) -> None:
    (image,), (text,) = place.images(IMAGE), place.texts("Chest radiograph with pleural effusion.")
    gallery = place.images(*names["paths"])
    for name, query in {"text": text, "image": image, "both": normalize(image + text, dim=0)}.items():
        cosines, rows = (gallery @ query).topk(3)
        assert [path for path, _ in names["found"][name]] == [names["paths"][row] for row in rows]
        close([cosine for _, cosine in names["found"][name]], cosines)


def check_evaluator(names: dict, place: Place) -> None:
    folder = place.folder / "my_pairs" / "validation" / "radiology" / "images"
    images = place.images(*(str(folder / f"{number}.jpg") for number in range(8))).double()
    texts = place.texts(*(f"Finding number {number}." for number in range(8))).double()
    cosines = texts @ images.T
    ranks = (cosines >= cosines.diag()[:, None]).sum(1)
    for k in (1, 5, 10):
        assert names["scores"][f"cosine_accuracy@{k}"] == (ranks <= k).double().mean()


def check_taken_over(names: dict, place: Place) -> None:
    source = embed_by_transformers(place.clip, Image.open(IMAGE).convert("RGB"), ["Chest radiograph."])
    close(names["outputs"].image_embeds, source[0])
    close(names["outputs"].text_embeds, source[1])
    loaded, _ = load_checkpoint("outputs/taken_over")
    close(loaded(**names["inputs"]).text_embeds, source[1])


def check_records(names: dict, place: Place) -> None:
    assert names["processor"].fields == [
        {"name": "age", "kind": "number", "mean": 51.5, "std": 10.5},
        {"name": "sex", "kind": "category", "categories": ["F", "M"]},
        {"name": "ward", "kind": "category", "categories": ["3", "4"]},
    ]
    assert names["batch"]["numbers"].tolist() == [[pytest.approx(-1.5 / 10.5)], [0]]
    assert names["batch"]["categories"].tolist() == [[2, 0], [0, 0]]


def check_fusion(names: dict, place: Place) -> None:
    def cosine(query) -> float:
        products = np.sum(query * names["text"], axis=1)
        return float(np.mean(products / np.linalg.norm(query, axis=1) / np.linalg.norm(names["text"], axis=1)))

    rounded = {name: round(weight, 2) for name, weight in names["best"].items()}
    assert rounded == {"image": 1.68, "record": 0.32} and list(names["general"]) == ["image", "text", "record"]
    assert cosine(names["queries"]) > max(cosine(names["image"]), cosine(names["record"]))


def check_told(names: dict, place: Place) -> None:
    assert names["told"] == {"age": 0.5, "sex": 0.5}


CHECKS = {
    "README.md": [check_use, check_pipelines],
    "docs/captions.md": [check_captions, check_between],
    "docs/closing-the-gap.md": [check_closed],
    "docs/evaluation.md": [check_metrics, check_change],
    "docs/fine-tuning.md": [check_adapter],
    "docs/large-batches.md": [check_micro_batches, check_objective],
    "docs/modalities.md": [check_records, check_fusion, check_told],
    "docs/publishing.md": [check_endpoint],
    "docs/search.md": [check_gallery, check_search, check_evaluator],
    "docs/training.md": [check_towers, check_trainer, check_centered],
    "docs/your-clip.md": [check_taken_over],
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_code_runs_and_gives_what_it_should(page, place):
    names: dict = {}
    for library in ("faiss", "sentence_transformers"):
        if any(f"import {library}" in code or f"from {library}" in code for code in blocks(page, "python")):
            pytest.importorskip(library, reason=f"the page needs {library}")
    for code, check in zip(blocks(page, "python"), CHECKS[name_of(page)], strict=True):
        if ONE_PROGRAM not in page.read_text(encoding="utf-8"):
            names = {}
        torch.manual_seed(3)
        exec(code.replace("/data/my_pairs", str(place.folder / "my_pairs")), names)
        check(names, place)


def test_the_readme_shows_every_pipeline_of_an_encoder():
    code = "".join(blocks(ROOT / "README.md", "python"))
    tasks = (
        "zero-shot-image-classification",
        "image-feature-extraction",
        "feature-extraction",
        "image-text-retrieval",
    )
    assert all(f'pipeline("{task}"' in code for task in tasks)
    # transformers' own does not truncate unless it is told to
    assert re.search(r'pipeline\("feature-extraction", model=folder\)\([^)]*truncation=True\)', code)
