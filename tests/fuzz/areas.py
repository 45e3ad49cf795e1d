"""
The areas that bad inputs are tried in: a strategy of inputs, and how one becomes files and the words of a command.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hypothesis import strategies as st

from gap_closed_clip.training import fields_of

from . import endpoint_requests
from .base import CONFIG, Base, image_file, rows, write_images
from .oracle import Main
from .values import as_json, damaged, junk, mutated


Words = tuple[str, list[str]]  # a command, and the words after it


@dataclass
class Area:
    """
    Args:
        title: in the table.
        named: matches what a message about an input has to name: a field, a row, a file.
        inputs: of the base's files, the strategy of what is tried.
        prepare: writes an input into a folder; the command that meets it.
        main: what runs the command; None for `gap-closed-clip`.
    """

    title: str
    named: str
    inputs: Callable[[Base], st.SearchStrategy]
    prepare: Callable[[Any, Path, Base], Words]
    main: Main | None = None


TRAIN_TABLE = ["config.yaml", "data.source=pairs.csv", "data.split_column=null", "per_device_train_batch_size=2"]
# Settings that do something to the machine, to the network or to other processes, or are a long day's work.
UNTRIED = {
    *("push_to_hub", "hub_token", "fsdp", "fsdp_config", "deepspeed", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "local_rank", "parallelism_config", "ddp_backend", "accelerator_config", "use_cpu"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "report_to", "debug"),
}


def _config_inputs(base: Base) -> st.SearchStrategy:
    def of(section: str) -> st.SearchStrategy:
        names = sorted(set(fields_of(section)) - UNTRIED)
        return st.tuples(st.just(section), st.sampled_from(names), junk)

    towers = mutated({"model": CONFIG["model"]}).filter(lambda value: _is_tiny(value[1].get("model")))
    return st.one_of(*map(of, ("model", "data", "training", "lora", "captioning")), towers)


def _is_tiny(model: Any) -> bool:
    """Whether no tower has gone back to a full size, which is allowed and takes long."""
    vision = model.get("vision") if isinstance(model, dict) else None
    return not isinstance(vision, dict) or bool(vision.get("model_args"))


def _prepare_config(value: Any, folder: Path, base: Base) -> Words:
    content = json.loads(json.dumps(CONFIG))
    if len(value) == 3:
        section, name, junk_value = value
        content.setdefault(section, {})[name] = junk_value
    else:
        content |= value[1]
    (folder / "config.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return "train", ["config.yaml"]


FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "train_config.yaml")


def _model_inputs(base: Base) -> st.SearchStrategy:
    fields = [
        st.tuples(st.just(name), mutated(json.loads((base.model / name).read_text(encoding="utf-8"))))
        for name in FILES[:-1]
    ]
    files = [
        st.tuples(st.just(name), st.tuples(st.just("damaged"), damaged((base.model / name).read_bytes())))
        for name in (*FILES, "model.safetensors", "run.json")
    ]
    return st.one_of(*fields[:1] * 4, *fields[1:], *files)


def _prepare_model(value: Any, folder: Path, base: Base) -> Words:
    name, (_, content) = value
    (folder / "model").mkdir()
    for file in base.model.iterdir():
        if file.is_file() and file.suffix != ".py":
            (os.link if file.name != name else shutil.copy)(file, folder / "model" / file.name)
    if isinstance(content, dict) and name.endswith("config.json"):
        content = {key: each for key, each in content.items() if key != "auto_map"}
    (folder / "model" / name).unlink(missing_ok=True)
    (folder / "model" / name).write_bytes(content if isinstance(content, bytes) else as_json(content))
    shutil.copy(base.config, folder / "config.yaml")
    pairs = ["source=phantoms", *(f"data.{key}={each}" for key, each in CONFIG["data"].items())]
    return "eval", ["model", "split=validation", "output=eval", "num_workers=0", *pairs]


# Columns as the collator, the Trainer or the model call something of their own.
COLUMNS = (
    *("pooled_text", "pooled_image", "group_ids", "image_id", "label", "augment", "window", "source", "labels"),
    *("input_ids", "pixel_values", "modality_mask", "split", "__index_level_0__", " no images", "", "image.1", "ü"),
    *("record", "record_numbers", "return_loss", "image", "caption"),
)
cells = st.one_of(
    junk,
    st.text(max_size=20),
    st.sampled_from(
        ["0.png", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "https://localhost/x.png", "ftp://x/y"]
    ),
    st.sampled_from(
        ["/etc/passwd", "..", ".", "0.png/x", "a" * 5000, "zip://x::0.png", "simplecache::file:///etc/passwd"]
    ),
    st.sampled_from(["word" * 250_000, "a b " * 100_000, "\x00", "=cmd()", '"', "\ufeff", "\ud7ff\U0001f9e0"]),
)


@st.composite
def _table_inputs(draw: st.DrawFn, base: Base | None = None) -> dict[str, Any]:
    table = rows()
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(["image", "caption", "caption", *COLUMNS]))
        if draw(st.booleans()):
            values = [draw(cells)] * len(table)
        else:
            values = [row.get(name, "x") for row in table]
            values[draw(st.integers(0, len(table) - 1))] = draw(cells)
        table = [{**row, name: value} for row, value in zip(table, values, strict=True)]
    if draw(st.integers(0, 9)) == 0:
        table = table[: draw(st.integers(0, 1))]
    kind = draw(st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
    words = draw(st.sampled_from([[], [], ["data.streaming=true"], ["data.modalities={record: [age, sex]}"]]))
    return {"kind": kind, "content": _table_file(table, kind), "words": words}


def _table_file(table: list[dict], kind: str) -> bytes:
    if kind == "jsonl":
        return "\n".join(json.dumps(row) for row in table).encode()
    frame = pd.DataFrame(table)
    if kind == "parquet":
        buffer = io.BytesIO()
        try:
            frame.to_parquet(buffer)
        except Exception:  # columns of several types, or integers that are too large
            buffer = io.BytesIO()
            frame.map(str).to_parquet(buffer)
        return buffer.getvalue()
    return frame.to_csv(index=False, sep="\t" if kind == "tsv" else ",").encode("utf-8", errors="replace")


@st.composite
def _damaged_tables(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
    good = _table_file(rows(), kind)
    lines = [
        *(
            b"image,caption\n",
            b"image\n0.png\n1.png\n",
            b"image,caption,caption\n0.png,a,b\n1.png,c,d\n",
            b"\n\n\n",
            b",",
        ),
        *(
            b"image,caption\n0.png,a\n1.png,b,c,d\n",
            b'image,caption\n0.png,"a\n1.png,b\n',
            b"image\tcaption\n0.png\tx\n",
        ),
        *(b"image;caption\n0.png;a\n1.png;b\n", b'{"image": "0.png"}\n', b'[{"image": "0.png", "caption": "x"}]'),
    ]
    return {"kind": kind, "content": draw(st.one_of(damaged(good), st.sampled_from(lines))), "words": []}


def _prepare_table(value: dict[str, Any], folder: Path, base: Base) -> Words:
    shutil.copy(base.config, folder / "config.yaml")
    write_images(folder)
    name = f"pairs.{value['kind']}"
    (folder / name).write_bytes(value["content"])
    words = [word.replace("pairs.csv", name) for word in TRAIN_TABLE]
    return "train", [*words, *value["words"]]


@st.composite
def _record_inputs(draw: st.DrawFn, base: Base | None = None) -> dict[str, Any]:
    table = rows()
    name = draw(st.sampled_from(["age", "sex"]))
    values = draw(st.lists(st.one_of(junk, st.text(max_size=12), st.floats()), min_size=4, max_size=4))
    table = [{**row, name: value} for row, value in zip(table, values, strict=True)]
    kind = draw(st.sampled_from(["csv", "jsonl", "parquet"]))
    columns = draw(
        st.sampled_from(["[age, sex]", "[age]", "[sex]", "age", "[age, age]", "[]", "[image]", "{}", "null"])
    )
    modality = draw(st.sampled_from(["record", "record", "record", "image", "é", "", "pooled", "x_y", "1", "text"]))
    words = ["data.modalities={" + f"'{modality}': {columns}" + "}"]
    if draw(st.booleans()):
        fields = {draw(st.sampled_from(["age", "sex", "x"])): draw(st.one_of(junk, st.dictionaries(
            st.sampled_from(["kind", "relative_to", "unit", "values", "x"]),
            st.one_of(junk, st.sampled_from(["date", "number", "category", "age", "sex"])), max_size=3)))}  # fmt: skip
        words.append("model.modalities=" + yaml.safe_dump({modality: {"fields": fields}}, default_flow_style=True))
    return {"kind": kind, "content": _table_file(table, kind), "words": words}


@st.composite
def _yaml_inputs(draw: st.DrawFn, base: Base) -> bytes:
    good = base.config.read_bytes()
    bombs = [
        b"model: &a {x: 1}\ndata: *a\n",
        "data:\n  source: Bäume\n".encode("latin-1"),
        b"data:\n\tsource: x\n",
        b"data: {source: x}\ndata: {source: y}\n",
        b"data:\n  source: x\n  source: y\n",
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
        b"data:\n  modalities: &a {record: *a}\n",
        b"data: !!python/object/apply:os.system ['true']\n",
        b"? [a, b]\n: c\n",
        b"data:\n  ? {a: 1}\n  : 2\n",
        b"1: 2\n",
        b"null: {}\n",
        b"data:\n  1: 2\n",
        b"data:\n  ? [a]\n  : 2\n",
        b"---\ndata: {}\n---\nmodel: {}\n",
        b"training:\n  learning_rate: 2024-01-01\n",
        b"training:\n  learning_rate: 0x10\n  seed: 1:30\n",
        b"training:\n  output_dir: !!binary aGFsbG8=\n",
        b"data:\n  source: !!set {a, b}\n",
        b"data:\n  <<: 3\n",
        b"%YAML 9.9\n---\n",
        b"data: {" + b"a: {" * 3000,
    ]
    return draw(st.one_of(damaged(good), st.sampled_from(bombs)))


def _prepare_yaml(value: bytes, folder: Path, base: Base) -> Words:
    (folder / "broken.yaml").write_bytes(value)
    shutil.copy(base.config, folder / "config.yaml")
    return "train", ["config.yaml", "broken.yaml"]


@st.composite
def _word_inputs(draw: st.DrawFn, base: Base | None = None) -> list[str]:
    keys = [f"{section}.{name}" for section in ("model", "data", "training", "lora") for name in fields_of(section)]
    key = draw(
        st.one_of(st.sampled_from([key for key in keys if key.split(".")[1] not in UNTRIED]), st.text(max_size=8))
    )
    key += draw(st.sampled_from(["", "", "", ".x", ".", "..x", ".x.y.z"]))
    value = draw(st.one_of(st.text(max_size=12), st.sampled_from(
        ["", "[", "{", "*a", "&a [*a]", "!!x", "\t", ": :", "nan", ".nan", "9" * 5000, "-", "'", "%", "@", "`", "? :"]
    )))  # fmt: skip
    word = f"{key}={value}".replace("\x00", "0")
    return [word.lstrip("-")]


def _prepare_words(value: list[str], folder: Path, base: Base) -> Words:
    shutil.copy(base.config, folder / "config.yaml")
    return "train", ["config.yaml", *value]


def _header(width: int, height: int) -> bytes:
    """A PNG's header alone, which claims a size."""
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@st.composite
def _image_inputs(draw: st.DrawFn, base: Base | None = None) -> dict[str, Any]:
    good = [image_file(0, kind) for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000", "PPM")]
    strange = [
        *(_header(2**31 - 1, 2**31 - 1), _header(1, 400_000), _header(0, 0), _header(7000, 7000)),
        *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"P5 999999999 999999999 255\n", b"P5 -1 -1 255\n"),
        *(
            b"\0" * 128 + b"DICM",
            b"\0" * 128 + b"DICM" + b"\xff" * 200,
            b"GIF89a" + b"\xff" * 40,
            b"II*\0" + b"\x08\0\0\0" * 9,
        ),
        *(
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%PDF-1.4",
            b"\xff\xd8\xff\xe1" + b"\xff" * 99,
            b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        ),
    ]
    image = draw(st.one_of(st.sampled_from(good).flatmap(damaged), st.sampled_from(strange)))
    settings = ["data.on_bad_image=skip", "data.streaming=true", "data.cache_images=16"]
    windows = [[f"data.window_center={value}", f"data.window_width={value}"] for value in (".nan", "1e308", "1")]
    words = draw(st.sampled_from([[], [], *([word] for word in settings), *windows]))
    return {"image": image, "suffix": draw(st.sampled_from(["png", "jpg", "dcm", "tif"])), "words": words}


def _prepare_image(value: dict[str, Any], folder: Path, base: Base) -> Words:
    shutil.copy(base.config, folder / "config.yaml")
    write_images(folder)
    table = rows()
    table[2]["image"] = f"bad.{value['suffix']}"
    (folder / table[2]["image"]).write_bytes(value["image"])
    (folder / "pairs.csv").write_bytes(_table_file(table, "csv"))
    return "train", [*TRAIN_TABLE, *value["words"]]


FIELD = r"\b(model|data|training|lora|captioning|section)\b"
AREAS = {
    "settings": Area("run configurations", FIELD, _config_inputs, _prepare_config),
    "words": Area("words of the command line", rf"{FIELD}|ommand line|'", lambda base: _word_inputs(), _prepare_words),
    "yaml": Area("YAML files", rf"{FIELD}|broken\.yaml", _yaml_inputs, _prepare_yaml),
    "folder": Area("files of a model folder", r"\.json|\.yaml|safetensors", _model_inputs, _prepare_model),
    "tables": Area(
        "tables of pairs",
        r"pairs\.|data\.|rows? \d",
        lambda base: st.one_of(_table_inputs(), _damaged_tables()),
        _prepare_table,
    ),
    "records": Area("records", r"pairs\.|data\.|model\.", lambda base: _record_inputs(), _prepare_table),
    "images": Area("images", r"bad\.|window", lambda base: _image_inputs(), _prepare_image),
    "requests": Area(
        "requests to the endpoint",
        endpoint_requests.NAMED,
        lambda base: endpoint_requests.inputs(),
        endpoint_requests.prepare,
        endpoint_requests.main,
    ),
}
