"""Whether a model folder works where this package is not installed: loaded and run in a clean process."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..evaluation import load_checkpoint


PACKAGE = Path(__file__).parent.parent
HANDLER = ("handler.py", "handler_images.py")  # of this folder; a model repository has them in its root
TOLERANCE = 1e-4
TEXTS = ["Chest radiograph.", "Axial CT image of the abdomen."]
# Runs without the package, offline, and with nothing cached: what a stranger's first load is like.
CLEAN_PROCESS = """
import sys
from importlib.abc import MetaPathFinder

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gap_closed_clip":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
folder, out, *texts = sys.argv[1:]
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.linear_gradient("L").convert("RGB")
inputs = processor(images=[image], text=texts, return_tensors="pt", padding=True, truncation=True)
with torch.inference_mode():
    outputs = model(**inputs)
embeds = {"image_embeds": outputs.image_embeds, "text_embeds": outputs.text_embeds}
save_file({name: value.contiguous() for name, value in embeds.items()}, out)
sys.path.insert(0, folder)  # as Hugging Face's inference toolkit does for a handler
from handler import EndpointHandler

answer = EndpointHandler(folder)({"inputs": {"texts": texts}})
assert "error" not in answer, answer
"""


def check_code(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder lacks its code, or holds Python files that are not this version's own. Loading it would
            run them.
    """
    files = sorted(folder.glob("*.py"))
    remedy = "Save the model again with this version (model.save_pretrained)"
    if not any(path.name == "modeling_gap_closed_clip.py" for path in files):
        raise ValueError(f"{folder} has no code beside the weights, so only this package could load it. {remedy}.")
    for path in files:
        own = PACKAGE / "hub" / path.name if path.name in HANDLER else PACKAGE / path.name
        if not own.is_file() or _digest(own) != _digest(path):
            raise ValueError(
                f"{path} is not the {path.name} of this version of gap_closed_clip. {remedy}, or, if you know and "
                "trust that code, allow it to run: trust_remote_code=True (--trust-remote-code)."
            )


def check_reload(folder: Path) -> None:
    """
    Loads and runs the folder in a clean process, and compares with what this package makes of it.

    This runs the folder's Python files: `check_code` first.

    Raises:
        ValueError: it does not load there, or gives other embeddings.
    """
    expected = _embed(folder)
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "embeds.safetensors"
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        # A cache of the user's own, named by the variable, would not be a clean start.
        environment.pop("HF_MODULES_CACHE", None)
        command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), str(out), *TEXTS]
        run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(
                f"{folder} does not load in a clean process without this package, so it is not published. It ends "
                f"with:\n{_last_lines(run.stderr)}"
            )
        found = load_file(out)
    for name, value in expected.items():
        difference = (found[name] - value).abs().max().item()
        if not difference <= TOLERANCE:  # nan is no match either
            raise ValueError(
                f"{folder}: {name} of a clean process differ from this package's by {difference:.1g}, so it is not "
                "published. Save the model again (model.save_pretrained)."
            )


def _embed(folder: Path) -> dict[str, Tensor]:
    """What this package's own classes make of the picture and the texts of CLEAN_PROCESS."""
    model, processor = load_checkpoint(folder)
    image = Image.linear_gradient("L").convert("RGB")
    inputs = processor(images=[image], text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        outputs = model.float().eval()(**inputs)
    return {"image_embeds": outputs.image_embeds, "text_embeds": outputs.text_embeds}


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).digest()


def _last_lines(text: str, number: int = 3) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-number:])
