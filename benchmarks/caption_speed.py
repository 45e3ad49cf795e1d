"""Captions per second, with a cache and without, of ours and of transformers' VisionEncoderDecoderModel of the same
image tower and decoder.

    python benchmarks/caption_speed.py                          # benchmarks/results/caption_speed_*.md
    python benchmarks/caption_speed.py --device cuda --vision eva02_base_patch16_clip_224 --text bert-base

Everything starts at random, so what is written is noise: every caption has the same number of tokens, whatever the end
token's probability. Nothing is downloaded. The towers are those of configs/demo.yaml, on which configs/captioning.yaml
trains, unless others are named.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from comparison import CONFIGS
from measure import RESULTS, clock, device_slug, header, in_turn, markdown_table, write_report
from random_towers import TEXTS, Preset, preset_of
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertTokenizer,
    GenerationConfig,
    GenerationMixin,
    TimmWrapperConfig,
    TimmWrapperModel,
    VisionEncoderDecoderModel,
)
from transformers.utils import logging

from gap_closed_clip import GapClosedClipConfig, GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.model.decoder_gap_closed_clip import decoder_config_like
from gap_closed_clip.training import load_config


OURS, PEER = "ours", "VisionEncoderDecoderModel"
CACHES = {"cache": True, "no cache": False}


@dataclass(frozen=True)
class Settings:
    """
    The models and captions of one run, and the device that they are measured on.

    Args:
        towers: the image tower; the decoder has the text tower's shape.
        tokens: the number of new tokens in every caption, after the one that begins it.
        precision: "float32", or "bfloat16" for the weights in it.
    """

    towers: Preset
    device: str
    tokens: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def vision_config(self) -> TimmWrapperConfig:
        return TimmWrapperConfig(architecture=self.towers.architecture, model_args=self.towers.model_args or None)

    def images(self, batch: int) -> Tensor:
        """(batch, 3, height, width), where the model is."""
        size = self.towers.image_size
        pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        return pixels.to(self.device, self.dtype)


def demo_towers() -> Preset:
    """Those of configs/demo.yaml."""
    model = load_config([CONFIGS / "demo.yaml"]).model
    args = model.vision["model_args"]
    return Preset(model.vision["architecture"], args["img_size"], args, model.text, length=48, batch=32)


def build_ours(settings: Settings) -> GapClosedClipForConditionalGeneration:
    text = {"model_type": "bert", **settings.towers.text}
    config = GapClosedClipConfig(vision_config=settings.vision_config(), text_config=text)
    return GapClosedClipForConditionalGeneration.from_clip(GapClosedClipModel(config), BertTokenizer())


def build_peer(settings: Settings) -> VisionEncoderDecoderModel:
    encoder = TimmWrapperModel(settings.vision_config())
    encoder.config.hidden_size = encoder.timm_model.num_features  # the peer asks for it and this config lacks it
    decoder = AutoModelForCausalLM.from_config(decoder_config_like(BertConfig(**settings.towers.text)))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    special = BertTokenizer()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=special.cls_token_id,
        eos_token_id=special.sep_token_id,
        pad_token_id=special.pad_token_id,
    )
    return model


BUILDERS: dict[str, Callable[[Settings], GenerationMixin]] = {OURS: build_ours, PEER: build_peer}


class Writing:
    """A model on the device, which writes captions of one length."""

    def __init__(self, name: str, settings: Settings):
        self.settings = settings
        torch.manual_seed(0)
        with torch.device(settings.device):
            model = BUILDERS[name](settings)
        self.model = model.to(settings.device, settings.dtype).eval()

    def write(self, images: Tensor, use_cache: bool) -> Tensor:
        """Captions (B, 1 + tokens) of images (B, 3, height, width)."""
        tokens = self.settings.tokens
        return self.model.generate(
            images, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=use_cache
        )

    def seconds(self, images: Tensor, use_cache: bool) -> float:
        start = clock(self.settings.device)
        self.write(images, use_cache)
        return clock(self.settings.device) - start

    def agreement(self, images: Tensor) -> float:
        """The share of captions that are the same with a cache and without; their length is checked."""
        cached, plain = (self.write(images, use_cache) for use_cache in CACHES.values())
        if not cached.shape == plain.shape == (len(images), 1 + self.settings.tokens):
            raise RuntimeError(f"Captions of other lengths than asked for: {[*cached.shape]}, {[*plain.shape]}.")
        return (cached == plain).all(dim=1).float().mean().item()


def measure(settings: Settings, batches: list[int], repeats: int) -> list[list[str]]:
    """Rows of the table; the models take turns. The comparison of their captions before is the warm-up."""
    models = {name: Writing(name, settings) for name in BUILDERS}
    rows = []
    for batch in batches:
        images = settings.images(batch)
        same = {name: model.agreement(images) for name, model in models.items()}
        steps = {
            (name, cache): partial(model.seconds, images, use_cache)
            for name, model in models.items()
            for cache, use_cache in CACHES.items()
        }
        results = in_turn(steps, repeats)  # the seconds of each step, or words where it failed
        seconds = {step: None if isinstance(x, str) else statistics.median(x) for step, x in results.items()}
        for (name, cache), median in seconds.items():
            ours = seconds[OURS, "cache"]
            times = ["-"] * 3 if median is None or ours is None else times_of(median, ours, batch)
            rows.append([name, cache, str(batch), *times, f"{same[name]:.0%}"])
    return rows


COLUMNS = ["model", "", "batch", "captions/s", "ms a batch", "relative", "same tokens"]


def times_of(seconds: float, ours: float, batch: int) -> list[str]:
    return [f"{batch / seconds:.4g}", f"{1000 * seconds:.4g}", f"{seconds / ours:.2f}"]


def notes(settings: Settings, repeats: int) -> str:
    towers = settings.towers
    text = BertConfig(**towers.text)
    image_args = "".join(f", {name}={value}" for name, value in towers.model_args.items())
    lines = [
        f"Image tower of both: timm's {towers.architecture}{image_args}. Decoder of both: a BERT of "
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, vocabulary {text.vocab_size}, with "
        f"cross-attention; weights are random, {settings.precision}.",
        f"Greedy, {settings.tokens} new tokens of every caption, whatever the end token's probability. The time is "
        "that of `generate`, with the image tower, without reading images and without putting tokens together.",
        "`ours` has, beside the patches, an embedding of the shared space in its decoder's memory, spread over "
        "4 tokens; the peer has the image tower's tokens alone.",
        f"Medians of {repeats} rounds in which the models take turns. `relative`: time as a multiple of ours with a "
        "cache. `same tokens`: captions that are the same with a cache and without.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vision", help="a timm architecture; default: the towers of configs/demo.yaml")
    parser.add_argument("--text", choices=TEXTS, default="bert-base", help="the decoder's shape, with --vision")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=40, help="new tokens of a caption")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.set_verbosity_error()  # the peer prints its configuration
    towers = demo_towers() if args.vision is None else preset_of(f"{args.vision}+{args.text}")
    settings = Settings(towers, args.device, args.tokens, args.precision)
    words = [device_slug(args.device)] + ([] if args.vision is None else [f"{args.vision}+{args.text}"])
    path = args.output / f"{'_'.join(['caption_speed', *words])}.md"
    rows = measure(settings, args.batches, args.repeats)
    title = header("Captions per second", args.device)
    write_report(path, title, notes(settings, args.repeats), markdown_table(COLUMNS, rows, left=2))
    print(path.read_text(encoding="utf-8"))
    if settings.precision == "float32" and any(row[-1] != "100%" for row in rows):
        print("caption_speed.py: some captions differ with a cache and without.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
