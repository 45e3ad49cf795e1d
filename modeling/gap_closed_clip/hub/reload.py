"""Checks that a model folder works where this package is not installed: loads and runs it in a clean process."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint import is_adapter, is_captioner, load_checkpoint
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.configuration_gap_closed_clip import MODULES_FILE
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from .samples import check_modalities, made_up


# Folders of the code that travels with a model: the endpoint's, and the model's.
HUB = Path(__file__).parent
MODEL = HUB.parent / "model"
# The endpoint's code, which a publication puts beside the model's.
HANDLER = ("handler.py", "handler_bounds.py", "handler_images.py", "handler_modalities.py", "handler_requests.py")
TOLERANCE = 1e-4
MINUTES = 30
TEXTS = ["Chest radiograph.", "Axial CT image of the abdomen."]
# Files that can name code to be loaded.
NAMING_CODE = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# Runs without the package, offline, and with nothing cached: what a stranger's first load is like.
CLEAN_PROCESS = """
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gap_closed_clip":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
folder, base, out, samples, *texts = sys.argv[1:]
import json

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(base or folder, trust_remote_code=True, dtype=torch.float32).eval()
if base:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.linear_gradient("L").convert("RGB")
sent = json.loads(Path(samples).read_text(encoding="utf-8"))
further = {name: [image if value is None else value for value in values] for name, values in sent.items()}
inputs = processor(images=[image], text=texts, **further, return_tensors="pt", padding=True, truncation=True)
with torch.inference_mode():
    outputs = model(**inputs)
embeds = {f"{name}_embeds": found for name, found in outputs.embeds.items()}
if not base:
    sys.path.insert(0, folder)  # as Inference Endpoints do
    from handler import EndpointHandler

    endpoint = EndpointHandler(folder)
    sent = {f"{name}s": values for name, values in further.items()}
    answer = endpoint({"inputs": {"texts": texts, **sent}})
    assert "error" not in answer, answer
    if "image-text-to-text" in endpoint.tasks:
        from transformers import AutoModelForImageTextToText

        del model, endpoint.model, endpoint.captioner  # one at a time
        captioner = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        embeds["caption_ids"] = captioner.eval().generate(inputs["pixel_values"], do_sample=False)
    if Path(folder, "modules.json").is_file() and find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        model = endpoint = captioner = None
        kwargs = {"trust_remote_code": True, "model_kwargs": {"dtype": torch.float32}, "device": "cpu"}
        encoder = SentenceTransformer(folder, **kwargs)
        embeds["encoded"] = encoder.encode([image, *texts], convert_to_tensor=True)
save_file({name: value.contiguous() for name, value in embeds.items()}, out)
"""


def check_code(folder: Path) -> None:
    """
    Checks that a folder's code is that of this version of the package, before it runs.

    Raises:
        ValueError: the folder lacks its code, holds Python files that are not this version's, or names code that lies
            elsewhere. Loading it would run them.
    """
    allow = "If you know and trust that code, allow it to run: trust_remote_code=True (--trust-remote-code)."
    again = "Save the model again with this version (model.save_pretrained)"
    needed = "processing_gap_closed_clip.py" if is_adapter(folder) else "modeling_gap_closed_clip.py"
    if not (folder / needed).is_file():
        raise ValueError(f"{folder} has no code beside the weights, so only this package could load it. {again}.")
    for path in sorted(folder.glob("*.py")):
        original = HUB / path.name if path.name in HANDLER else MODEL / path.name
        if not original.is_file():
            raise ValueError(f"{path} is no file of this version of gap_closed_clip: delete it. {allow}")
        if _digest(original) != _digest(path):
            raise ValueError(f"{path} is not the {path.name} of this version of gap_closed_clip. {again}. {allow}")
    for name in (*NAMING_CODE, MODULES_FILE):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            for reference in _modules(content) if name == MODULES_FILE else _references(content):
                # transformers also takes other/repository--module.Class, and folders before the module
                module = re.fullmatch(r"(\w+_gap_closed_clip)\.\w+", str(reference))
                if module is None or not (MODEL / f"{module[1]}.py").is_file():
                    raise ValueError(f"{folder / name} names code that is not this package's: {reference!r}. {allow}")


def _references(content: Any) -> Iterator[Any]:
    """What a configuration names as code, at any depth."""
    if isinstance(content, list):
        for value in content:
            yield from _references(value)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key == "auto_map":
                values = value.values() if isinstance(value, dict) else [value]
                yield from (name for names in values for name in (names if isinstance(names, list) else [names]))
            elif key == "custom_pipelines":
                yield from (task.get("impl") for task in value.values())
            else:
                yield from _references(value)


def _modules(content: list[dict[str, Any]]) -> list[str]:
    """What modules.json names as code, beside modules of sentence-transformers itself."""
    names = [str(module.get("type")) for module in content]
    return [name for name in names if not name.startswith("sentence_transformers.")]


def check_reload(folder: Path, base: Path | None = None, trained: Path | None = None) -> None:
    """
    Loads and runs the folder in a clean process, and compares with what this package makes of it.

    This runs the folder's Python files: `check_code` first.

    Args:
        folder: of a model; or of an adapter, then with the folder of its `base`, whose files run too.
        trained: of an adapter, the folder that training wrote, which names the base that it was trained on.

    Raises:
        ValueError: it does not load there, or gives other embeddings or another caption.
    """
    expected, samples = _outputs(trained or folder)
    with tempfile.TemporaryDirectory() as home:
        found = _run_clean_process(folder, base, samples, Path(home))
    if "encoded" in found:  # by sentence-transformers, where it is installed
        expected["encoded"] = torch.cat([expected["image_embeds"], expected["text_embeds"]])
    for name, value in expected.items():
        difference = _difference(found.get(name), value)
        if difference is not None:
            remedy = "Save the model again (model.save_pretrained)."
            if base is not None:
                remedy = (
                    "Its base there is not the model that it was trained on: publish that one, and name it (--base)."
                )
            raise ValueError(
                f"{folder}: {name} of a clean process differ from this package's{difference}, so it is not published. "
                f"{remedy}"
            )


def _run_clean_process(folder: Path, base: Path | None, samples: dict[str, list], home: Path) -> dict[str, Tensor]:
    """What CLEAN_PROCESS makes of the folder, with an empty folder as its home."""
    out = home / "embeds.safetensors"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A cache that the user names by the variable would not be a clean start.
    environment.pop("HF_MODULES_CACHE", None)
    sent = home / "samples.json"  # a spectrogram is too long for a command line
    sent.write_text(json.dumps(samples), encoding="utf-8")
    command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), str(base or ""), str(out), str(sent), *TEXTS]
    try:
        run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{folder} does not load within {MINUTES} minutes, so it is not published.") from error
    if run.returncode:
        raise ValueError(
            f"{folder} does not load in a clean process without this package, so it is not published. It ends with:\n"
            f"{_last_lines(run.stderr)}"
        )
    return load_file(out)


def _difference(found: Tensor | None, expected: Tensor) -> str | None:
    """How much a clean process's output differs, for the message; None where it does not, or too little to count."""
    if not expected.is_floating_point():  # tokens
        return None if found is not None and torch.equal(found, expected) else ""
    difference = math.nan if found is None else (found - expected).abs().max().item()
    return None if difference <= TOLERANCE else f" by {difference:.1g}"  # nan is no match either


def _outputs(folder: Path) -> tuple[dict[str, Tensor], dict[str, list]]:
    """What this package's classes make of the image, the texts and made-up samples; and these samples, for JSON."""
    # In float32 from the start: a model loaded in bfloat16 keeps rounded rotary tables.
    if is_adapter(folder):
        model, processor = load_checkpoint(folder)
        model = model.float().eval()
    else:
        model = GapClosedClipModel.from_pretrained(folder, dtype=torch.float32).eval()
        processor = GapClosedClipProcessor.from_pretrained(folder)
    check_modalities(model, processor)
    image, samples = Image.linear_gradient("L").convert("RGB"), made_up(processor)
    further = {name: [image if value is None else value for value in values] for name, values in samples.items()}
    inputs = processor(images=[image], text=TEXTS, **further, return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        outputs = model(**inputs)
    found = {f"{name}_embeds": embeds for name, embeds in outputs.embeds.items()}
    if is_captioner(folder):
        model = GapClosedClipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        found["caption_ids"] = model.generate(inputs["pixel_values"], do_sample=False)
    return found, samples


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).digest()


def _last_lines(text: str, number: int = 3) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-number:])
