"""What the tests of captioners share: a tiny run on an encoder's folder, captions as a tokenizer writes them."""

from pathlib import Path

from test_run import NO_MORE, TINY

from gap_closed_clip.data import load_pairs
from gap_closed_clip.training import RunConfig, load_config, train


# Longer than this are few of the phantoms' captions; and a whole decoder of the text tower's shape.
CAPTION_RUN = ["vision=null", "text=null", "max_caption_tokens=48", "max_new_tokens=47"]


def train_encoder(folder: Path, *words: str) -> Path:
    """A run's folder with an encoder that has made one step; its towers have no dropout."""
    (folder / "tiny.yaml").write_text(TINY)
    no_dropout = [f"model.text.{name}=0.0" for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")]
    where = f"output_dir={folder / 'encoder'}"
    train(load_config([folder / "tiny.yaml"], [where, *NO_MORE, *no_dropout, *words]))
    return folder / "encoder"


def caption_config(encoder: Path, output_dir: Path, *words: str) -> RunConfig:
    """The tiny run, of a captioner on an encoder's folder (or a captioner's)."""
    (output_dir.parent / "captioning.yaml").write_text(f"{TINY}captioning: {{}}\n")
    start = [*CAPTION_RUN, f"checkpoint={encoder}", f"output_dir={output_dir}"]
    return load_config([output_dir.parent / "captioning.yaml"], [*start, *words])


def as_written(tokenizer, captions: list[str]) -> list[str]:
    """Captions in lower case and with the spaces that a tokenizer writes between words."""
    return tokenizer.batch_decode(tokenizer(captions)["input_ids"], skip_special_tokens=True)


def train_pairs(config: RunConfig):
    return load_pairs(config.data, "train")
