"""The model that adapters are trained on: where it is, and saved where it is nowhere."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from torch import Tensor

from ..base_weights import check_base, note_base
from ..checkpoint import BASE, is_adapter, is_local
from ..conversion import is_foreign
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from .arguments import ModelArguments
from .lora import LoraArguments, add_adapters


# Fields of the configuration that say how a model is trained, not what it makes of an image or a text.
TRAINING_FIELDS = {
    "contrastive_weight", "align_weight", "uniformity_weight", "mask_groups",
    "modality_uniformity_weight", "cross_uniformity_weight",
    "centering_momentum", "logit_scale_init_value", "learnable_temperature", "initializer_range",
}  # fmt: skip


class AdapterBase:
    """
    The model that adapters are trained on, as it is without them.

    Args:
        model: the model before adapters are added.
        args: the `model:` section that the model was built from.
        output_dir: folder of the run, which the base is saved in where nothing else holds it.
        whole: further modalities that train as a whole, as of `build_peft_config`.
    """

    def __init__(self, model: GapClosedClipModel, args: ModelArguments, output_dir: str, whole: Sequence[str] = ()):
        self.model, self.whole = model, whole
        # The same tensors, by the names they have without adapters.
        self.state: dict[str, Tensor] = model.state_dict()
        self.folder = Path(output_dir).resolve() / BASE
        self.checkpoint = args.checkpoint if self._is_whole_model(args, model.config) else None

    def adapt(self, lora: LoraArguments) -> PeftModel:
        """
        The model wrapped by peft, with a note of where its base is.

        Raises:
            ValueError: as `add_adapters`.
        """
        name: str | None = str(self.folder)
        revision = None
        if lora.merge:
            name = None
        elif self.checkpoint is not None and is_local(self.checkpoint):
            name = str(Path(self.checkpoint).resolve())
        elif self.checkpoint is not None:
            name, revision = self.checkpoint, self.model.config._commit_hash
        return add_adapters(self.model, lora, name, revision, self.whole)

    def save(self, processor: GapClosedClipProcessor, resumed: bool = False) -> None:
        """
        Saves the base into the output folder's `base`, unless another folder or repository holds it; and notes which
        weights it has, unless the repository's commit tells.

        Args:
            resumed: whether adapters go on that were trained on the base before.

        Raises:
            ValueError: they were trained on other weights.
        """
        if self.checkpoint is None:
            self.model.save_pretrained(self.folder, state_dict=self.state)
            processor.save_pretrained(self.folder)
        elif not is_local(self.checkpoint):
            return
        base = self.folder if self.checkpoint is None else self.checkpoint
        if resumed:
            check_base(self.folder.parent, base)
        note_base(self.folder.parent, base)

    @staticmethod
    def _is_whole_model(args: ModelArguments, trained: GapClosedClipConfig) -> bool:
        """Whether the checkpoint in `args` gives the same embeddings as the base, and peft can load it."""
        if args.checkpoint is None or is_foreign(args.checkpoint) or is_adapter(args.checkpoint):
            return False
        config = GapClosedClipConfig.from_pretrained(args.checkpoint)
        if config.modality_names != trained.modality_names:  # some are new
            return False
        changed = {name for name, value in args.config.items() if getattr(config, name) != value}
        return changed <= TRAINING_FIELDS


__all__ = ["AdapterBase"]
