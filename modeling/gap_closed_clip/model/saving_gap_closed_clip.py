"""A saved folder loads with `trust_remote_code=True` alone, and for all who may read its configuration."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from .configuration_gap_closed_clip import GapClosedClipConfig


if TYPE_CHECKING:
    # Never imported here, since it needs sentence-transformers; transformers lets every file travel that is named so.
    from .sentence_transformers_gap_closed_clip import GapClosedClipEmbedder  # noqa: F401


def describe_code(config: GapClosedClipConfig, model: PreTrainedModel, **models: PreTrainedModel) -> None:
    """
    Writes into a configuration which class each auto class and pipeline finds in the code that is saved beside it.

    Args:
        config: the configuration that is about to be saved.
        model: the encoder, which `AutoModel` finds.
        models: by the name of another auto class, the model that it finds.
    """
    from .pipeline_gap_closed_clip import ImageTextRetrievalPipeline

    # transformers itself would name only the auto class that a model was last loaded by.
    models = {"AutoModel": model, "AutoModelForZeroShotImageClassification": model, **models}
    classes = {auto_class: type(found) for auto_class, found in models.items()}
    config.auto_map = {
        auto_class: f"{found.__module__.split('.')[-1]}.{found.__name__}" for auto_class, found in classes.items()
    }
    config.custom_pipelines = {
        "image-text-retrieval": {
            "impl": f"pipeline_gap_closed_clip.{ImageTextRetrievalPipeline.__name__}",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }


def share_weights(folder: str | os.PathLike) -> None:
    """
    Lets everybody read the weights in a folder who may read the configuration beside them. safetensors (0.8) makes
    files that nobody but their owner may read, which is nobody whom a model in a shared folder is for.

    Args:
        folder: of a model, whole or in shards, or of adapters.
    """
    for name in ("config.json", "adapter_config.json"):
        if (path := Path(folder) / name).is_file():
            mode = stat.S_IMODE(path.stat().st_mode)
            for weights in Path(folder).glob("*.safetensors"):
                with suppress(OSError):  # of a disk that knows no such rights
                    weights.chmod(mode)
            return


__all__ = ["describe_code", "share_weights"]
