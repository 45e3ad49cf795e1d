"""Gap-closed medical CLIP: image and text embeddings that share one space."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .conversion import from_clip
from .model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from .model.configuration_gap_closed_clip import GapClosedClipConfig
from .model.image_processing_gap_closed_clip import GapClosedClipImageProcessor
from .model.losses_gap_closed_clip import gap_closed_loss
from .model.micro_batches_gap_closed_clip import MicroBatches
from .model.modeling_gap_closed_clip import GapClosedClipModel, GapClosedClipOutput
from .model.pipeline_gap_closed_clip import ImageTextRetrievalPipeline
from .model.processing_gap_closed_clip import GapClosedClipProcessor
from .model.record_processing_gap_closed_clip import RecordProcessor


AutoConfig.register("gap_closed_clip", GapClosedClipConfig)
AutoImageProcessor.register(
    GapClosedClipConfig, image_processor_classes=dict.fromkeys(("torchvision", "pil"), GapClosedClipImageProcessor)
)
AutoModel.register(GapClosedClipConfig, GapClosedClipModel)
AutoModelForImageTextToText.register(GapClosedClipConfig, GapClosedClipForConditionalGeneration)
AutoModelForZeroShotImageClassification.register(GapClosedClipConfig, GapClosedClipModel)
AutoProcessor.register(GapClosedClipConfig, GapClosedClipProcessor)

__version__ = "0.2.0.dev0"

__all__ = [
    "GapClosedClipConfig",
    "GapClosedClipForConditionalGeneration",
    "GapClosedClipImageProcessor",
    "GapClosedClipModel",
    "GapClosedClipOutput",
    "GapClosedClipProcessor",
    "ImageTextRetrievalPipeline",
    "MicroBatches",
    "RecordProcessor",
    "from_clip",
    "gap_closed_loss",
]
