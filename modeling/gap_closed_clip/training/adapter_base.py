"""What an adapter is loaded on: a model that is there already, or a copy beside the adapter."""

from pathlib import Path

from peft import PeftModel
from torch import Tensor

from ..checkpoint import BASE, is_adapter, is_local
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from .arguments import ModelArguments
from .lora import LoraArguments, add_adapters


# Fields of the configuration that say how a model is trained, not what it makes of an image or a text.
TRAINING_FIELDS = {
    "contrastive_weight", "align_weight", "uniformity_weight", "mask_groups",
    "centering_momentum", "logit_scale_init_value", "learnable_temperature", "initializer_range",
}  # fmt: skip


class Base:
    """
    The model that adapters are trained on, as it is without them.

    Args:
        model: before `adapt`.
        args: where it came from.
        output_dir: of the run.
    """

    def __init__(self, model: GapClosedClipModel, args: ModelArguments, output_dir: str):
        self.model = model
        # The same tensors, by the names they have without adapters.
        self.state: dict[str, Tensor] = model.state_dict()
        self.folder = Path(output_dir).resolve() / BASE
        self.checkpoint = args.checkpoint if self._is_whole_model(args) else None

    def adapt(self, lora: LoraArguments) -> PeftModel:
        """The model wrapped by peft, with a note of where its base is.

        Raises:
            ValueError: as `add_adapters`.
        """
        name, revision = str(self.folder), None
        if lora.merge:
            name = None
        elif self.checkpoint is not None and is_local(self.checkpoint):
            name = str(Path(self.checkpoint).resolve())
        elif self.checkpoint is not None:
            name, revision = self.checkpoint, self.model.config._commit_hash
        return add_adapters(self.model, lora, name, revision)

    def save(self, processor: GapClosedClipProcessor) -> None:
        """A model folder `base` in the output folder, where no other folder or repository holds the base model."""
        if self.checkpoint is None:
            self.model.save_pretrained(self.folder, state_dict=self.state)
            processor.save_pretrained(self.folder)

    @staticmethod
    def _is_whole_model(args: ModelArguments) -> bool:
        """Whether `args` name a model that gives what the base gives, and that peft can load."""
        if args.checkpoint is None or is_adapter(args.checkpoint):
            return False
        config = GapClosedClipConfig.from_pretrained(args.checkpoint)
        changed = {name for name, value in args.config.items() if getattr(config, name) != value}
        return changed <= TRAINING_FIELDS


__all__ = ["Base"]
