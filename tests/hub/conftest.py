"""A saved model folder, and a Hub to push it to."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest
import transformers
from processes import PythonProcess
from transformers import CLIPImageProcessor

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.hub import publication, reload
from gap_closed_clip.hub.reload import HANDLER, MODEL

from .loopback_hub import TOKEN, LoopbackHub


ROOT = Path(__file__).parent.parent.parent
# Files of a model folder: what saving writes, what publishing adds, the code, and that which a captioner has beside.
SAVED = ["config.json", "model.safetensors", "modules.json", "processor_config.json"]
SAVED += ["tokenizer.json", "tokenizer_config.json"]
ADDED = ["README.md", *HANDLER, "requirements.txt"]
CAPTIONER_CODE = [
    "caption_generation_gap_closed_clip.py",
    "caption_loss_gap_closed_clip.py",
    "caption_outputs_gap_closed_clip.py",
    "caption_encoding_gap_closed_clip.py",
    "captioning_gap_closed_clip.py",
    "decoder_gap_closed_clip.py",
]
CODE = [path.name for path in MODEL.glob("*_gap_closed_clip.py") if path.name not in CAPTIONER_CODE]
# Put before a script that runs where the package is not installed.
WITHOUT_PACKAGE = """
import sys
from importlib.abc import MetaPathFinder

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gap_closed_clip", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


@pytest.fixture
def hub() -> LoopbackHub:
    hub = LoopbackHub()
    yield hub
    hub.close()


@pytest.fixture
def online(hub, monkeypatch, tmp_path) -> LoopbackHub:
    """The Hub as this very process sees it: conftest has switched it off before the libraries were imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    # What the libraries made when they first asked a Hub, which was perhaps another.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def python(hub, tmp_path):
    """Runs Python in a new process that knows the Hub, in `tmp_path`; checks that it succeeds unless told not to."""

    def run(*words: str, home: str = "home", check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        known = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
        }
        environment = {**os.environ, **known, **environment}
        run = PythonProcess(words, environment, tmp_path).wait()
        assert not check or run.returncode == 0, run.stderr
        return run

    return run


@pytest.fixture(autouse=True)
def forked_clean_processes(monkeypatch):
    """The process in which `check_reload` loads a folder is a fork, too."""

    def run(command: list[str], env: dict[str, str], cwd: str, timeout: float, **_) -> subprocess.CompletedProcess:
        assert command[0] == sys.executable
        return PythonProcess(command[1:], env, cwd).wait(timeout)

    monkeypatch.setattr(
        reload, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired), raising=True
    )


@pytest.fixture
def new_clean_processes(forked_clean_processes, monkeypatch):
    """It is started as it is by those who publish."""
    monkeypatch.setattr(reload, "subprocess", subprocess)


@pytest.fixture
def script(online, monkeypatch, tmp_path, capsys):
    """Runs a script in `tmp_path` as `python` does, but in this process, which has imported it all already."""

    def run(path: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [path, *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def save_folder(folder: Path, model, processor) -> Path:
    """A model folder as a Trainer leaves it, with what must stay at home."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "checkpoint-3").mkdir()
    for name in ("training_args.bin", "checkpoint-3/optimizer.pt", "notes.txt"):
        (folder / name).write_bytes(b"stays at home")
    return folder


def load_handler(folder: Path) -> tuple[ModuleType, ModuleType]:
    """
    A folder's handler.py and the handler_images.py it imports, loaded as Hugging Face's toolkit loads them.

    The folder is on sys.path meanwhile, with the handler and the code beside the weights that it imports.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
        handler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(handler)
    # The next folder has its own.
    for name in ("images_gap_closed_clip", "handler_bounds", "handler_modalities", "handler_requests"):
        del sys.modules[name]
    return handler, sys.modules.pop("handler_images")


@pytest.fixture
def model_folder(tiny_model, tiny_processor, tmp_path) -> Path:
    return save_folder(tmp_path / "outputs" / "demo", tiny_model, tiny_processor)


@pytest.fixture
def skip_reload(monkeypatch) -> None:
    """For what does not depend on it: a clean process takes seconds to start."""
    monkeypatch.setattr(publication, "check_reload", lambda *args: None)


def processor_of(tokenizer, **image_settings) -> GapClosedClipProcessor:
    """With an image processor that is not as usual."""
    return GapClosedClipProcessor(CLIPImageProcessor(**image_settings), tokenizer)
