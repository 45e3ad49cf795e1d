"""Sustained load on the endpoint's handler: good and bad requests from several threads, its memory and its answers.

    python benchmarks/endpoint_load.py --output benchmarks/results

A tiny model of random weights is served as a published folder is, without a network in between. Nothing is said of how
fast a real model is: what is looked at is whether memory stays flat and whether an answer is ever an internal error.
"""

import argparse
import base64
import io
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import torch
from measure import machine, markdown_table, versions
from PIL import Image
from transformers import CLIPImageProcessor

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.hub.reload import HANDLER, HUB
from gap_closed_clip.training.encoder import train_tokenizer


SIZE = 28
WORDS = ["Chest radiograph with left pleural effusion.", "Axial CT of the chest.", "MR image of the brain."]


def save_model(folder: Path) -> None:
    """A folder as it is published, of one layer each."""
    torch.manual_seed(0)
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {"img_size": SIZE, "embed_dim": 48, "depth": 1, "num_heads": 3},
    }
    text = {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    text |= {"intermediate_size": 64, "vocab_size": 200, "max_position_embeddings": 64}
    model = GapClosedClipModel(GapClosedClipConfig(vision_config=vision, text_config=text, projection_dim=32))
    model.eval().save_pretrained(folder)
    tokenizer = train_tokenizer(WORDS, 200)
    tokenizer.model_max_length = 64
    sides = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=sides)
    GapClosedClipProcessor(images, tokenizer).save_pretrained(folder)
    for name in HANDLER:
        shutil.copy(HUB / name, folder)


def image(mode: str, kind: str, side: int) -> str:
    """Base64 of a file of noise."""
    values = np.random.default_rng(side).integers(0, 256, (side, side, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def requests() -> list[dict]:
    """Requests in the order in which they come again and again: of every task, and of every kind of wrong."""
    jpeg, png, clear = image("RGB", "JPEG", 256), image("L", "PNG", 200), image("RGBA", "PNG", 120)
    labels = {"candidate_labels": ["effusion", "normal"]}
    deep: list = []
    for _ in range(900):
        deep = [deep]
    vectors = np.random.default_rng(0).normal(size=(200, 32)).tolist()
    return [
        {"inputs": jpeg, "parameters": labels},
        {"inputs": {"images": [png, clear], "texts": WORDS}},
        {"inputs": {"query": WORDS[0], "gallery": [{"image": jpeg}, *WORDS]}},
        {"inputs": {"query": WORDS, "gallery": vectors}, "parameters": {"top_k": 50}},
        {"inputs": {"text": "word " * 1500}},
        {"inputs": [jpeg, png, clear], "parameters": labels},
        {"inputs": jpeg[: len(jpeg) // 2 // 4 * 4], "parameters": labels},
        {"inputs": base64.b64encode(b"no image").decode(), "parameters": labels},
        {"inputs": "https://example.org/a.png", "parameters": labels},
        {"inputs": deep},
        {"inputs": {"images": [png] * 65}},
        {"inputs": {"query": "a", "gallery": [[float("nan")] * 32]}},
        {"inputs": {"text": 3}, "parameters": {"task": {}}},
        {"inputs": {"texts": ["a"] * 3000}},
        {"inputs": png, "parameters": {"candidate_labels": "," * 10_000}},
        {},
    ]


def resident() -> float:
    """MiB of memory that the process has (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure(number: int, threads: int) -> dict:
    """Answers by status, answers a second, and memory along the way."""
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name))
        sys.path.insert(0, name)
        from handler import EndpointHandler

        endpoint, kinds = EndpointHandler(name), requests()
        answers: Counter = Counter()
        memory, start = {0: resident()}, time.perf_counter()
        step = max(1, number // 10)
        with ThreadPoolExecutor(threads) as pool:
            for begin in range(0, number, step):
                chosen = [kinds[i % len(kinds)] for i in range(begin, min(begin + step, number))]
                for answer in pool.map(endpoint, chosen):
                    json.dumps(answer)
                    wrong = isinstance(answer, dict) and "error" in answer
                    answers[answer["status"] if wrong else 200] += 1
                memory[begin + len(chosen)] = resident()
        seconds = time.perf_counter() - start
    return {"answers": answers, "per_second": number / seconds, "memory": memory, "seconds": seconds}


def report(found: dict, threads: int) -> str:
    number = sum(found["answers"].values())
    measured = [f"{number:,}", f"{found['per_second']:.0f}", f"{found['seconds']:.0f}"]
    lines = [
        "# The endpoint's handler under load",
        "",
        f"- `python benchmarks/endpoint_load.py --requests {number} --threads {threads}`",
        f"- {machine('cpu')}",
        f"- {versions('torch', 'timm', 'transformers')}",
        f"- {date.today()}",
        "",
        f"{number:,} requests of {len(requests())} kinds, good and bad, {threads} at a time, of a tiny model.",
        "",
        markdown_table(["answers", "answers a second", "seconds"], [measured], left=0),
        "",
        "| status | answers |",
        "| --- | ---: |",
        *(f"| {status} | {count:,} |" for status, count in sorted(found["answers"].items())),
        "",
        "| after requests | resident memory, MiB |",
        "| ---: | ---: |",
        *(f"| {after:,} | {size:.0f} |" for after, size in found["memory"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--output", type=Path, help="folder for the report")
    arguments = parser.parse_args()
    found = measure(arguments.requests, arguments.threads)
    text = report(found, arguments.threads)
    print(text)
    if arguments.output:
        (arguments.output / "endpoint_cpu-2-cores.md").write_text(text, encoding="utf-8")
    if found["answers"][500]:
        raise SystemExit("Some answers were internal errors.")


if __name__ == "__main__":
    main()
