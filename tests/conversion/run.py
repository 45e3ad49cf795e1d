"""
How exactly CLIPs are taken over: a table of differences from the embeddings of the libraries that they come from.

    python tests/conversion/run.py --output benchmarks/results/taken_over.md

transformers and open_clip make small models at random and save them. Each is taken over, saved and loaded again, and
published to a Hub on this machine, from which a process loads it that has not got this package. Image and texts go
through the library's own preprocessing and tokenizer, and through ours. The image is a radiograph of RADIOLOGY_DATA
where that is set. The exit status is 1 where a difference is above 1e-5.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "modeling")]

import open_clip  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from conftest import CAPTIONS  # noqa: E402
from hub.conftest import WITHOUT_PACKAGE  # noqa: E402
from hub.loopback_hub import TOKEN, LoopbackHub  # noqa: E402
from hub.test_publish_clip import STRANGER  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from conversion import clip_models, open_clip_models  # noqa: E402
from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor, from_clip  # noqa: E402


LIMIT = 1e-5
Embeds = tuple[torch.Tensor, torch.Tensor]  # unit vectors of the image (1, D) and of the texts (N, D)
# Publishes folder after folder; whether each loads without the package is seen afterwards, in one process for all.
PUBLISHER = """
import json
import sys
from gap_closed_clip.hub import publication, publish

publication.check_reload = lambda *_, **__: None
for folder, repository in json.loads(sys.argv[1]).items():
    publish(folder, repository)
"""


def sources(folder: Path, image: Image.Image) -> Iterator[tuple[str, Path, Embeds]]:
    """Each source with its folder and the library's own embeddings."""
    for number, kind in enumerate(clip_models.KINDS):
        path = clip_models.save_source(kind, folder / f"transformers{number}")
        yield f"transformers: {kind}", path, clip_models.embed_by_transformers(path, image, CAPTIONS)[:2]
    for kind in open_clip_models.KINDS:
        path = open_clip_models.save_model(kind, folder / kind)
        source = open_clip_models.load_reference(path)
        with torch.no_grad():
            images = source.model.encode_image(source.preprocess(image)[None], normalize=True)
            texts = source.model.encode_text(source.tokenizer(CAPTIONS), normalize=True)
        yield f"open_clip: {kind}", path, (images, texts)


@torch.no_grad()
def reloaded(folder: Path, kept: Path, image: Image.Image) -> Embeds:
    """The embeddings of a model that was taken over, saved in `kept` and loaded from there."""
    for part in from_clip(folder):
        part.save_pretrained(kept)
    model = GapClosedClipModel.from_pretrained(kept).eval()
    processor = GapClosedClipProcessor.from_pretrained(kept)
    inputs = processor(images=image, text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    outputs = model(**inputs, return_loss=False)
    return outputs.image_embeds, outputs.text_embeds


def published(folders: list[Path], image: Image.Image, home: Path) -> list[Embeds]:
    """The embeddings of model folders after publishing them, loaded by a process without this package."""
    image.save(home / "photo.png")
    hub = LoopbackHub()
    repositories = {str(folder): f"tester/clip{number}" for number, folder in enumerate(folders)}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(TESTS.parent / "modeling")}

    def run(script: str, *words: str, name: str) -> None:
        words = (sys.executable, "-c", script, *words)
        subprocess.run(words, env={**environment, "HF_HOME": str(home / name)}, cwd=home, check=True)

    try:
        run(PUBLISHER, json.dumps(repositories), name="publisher")
        wanted = json.dumps(list(repositories.values()))
        run(WITHOUT_PACKAGE + STRANGER, wanted, json.dumps(CAPTIONS), str(home), name="stranger")
    finally:
        hub.close()
    found = [load_file(home / f"{number}.safetensors") for number in range(len(folders))]
    return [(embeds["image"], embeds["text"]) for embeds in found]


def difference(embeds: Embeds, expected: Embeds) -> float:
    return max((own - other).abs().max().item() for own, other in zip(embeds, expected, strict=True))


def differences(home: Path, image: Image.Image) -> dict[str, tuple[float, float]]:
    """By source, the largest difference after saving and reloading, and after publishing."""
    names, expected, folders, saved = [], [], [], []
    for number, (name, folder, embeds) in enumerate(sources(home / "sources", image)):
        names.append(name)
        expected.append(embeds)
        folders.append(home / f"taken{number}")
        saved.append(reloaded(folder, folders[-1], image))
        print(f"{name}: {difference(saved[-1], embeds):.1e} after saving and reloading", flush=True)
    there = published(folders, image, home)
    return {
        name: (difference(first, of), difference(second, of))
        for name, of, first, second in zip(names, expected, saved, there, strict=True)
    }


def report(found: dict[str, tuple[float, float]], which: str) -> str:
    libraries = (torch, transformers, open_clip)
    rows = [f"| {name} | {first:.0e} | {second:.0e} |" for name, (first, second) in found.items()]
    return "\n".join(
        [
            "# CLIPs taken over",
            "",
            f"- `{shlex.join(['python', *sys.argv])}`",
            f"- {', '.join(f'{library.__name__} {library.__version__}' for library in libraries)}",
            f"- {date.today()}",
            "",
            f"The largest difference of a coordinate of a unit vector from the source library's, on {which} and "
            f"{len(CAPTIONS)} captions, the library's own preprocessing and tokenizer included.",
            "",
            "| source | saved and reloaded | published, without the package |",
            "| --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file, too")
    args = parser.parse_args()
    image, which = clip_models.photo(), "a drawn image"
    if os.environ.get("RADIOLOGY_DATA"):
        image, which = open_clip_models.real_images()[0], "a radiograph"
    with tempfile.TemporaryDirectory() as home:
        found = differences(Path(home), image)
    text = report(found, which)
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    return int(max(max(values) for values in found.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
