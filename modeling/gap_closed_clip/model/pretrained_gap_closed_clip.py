"""[`GapClosedClipPreTrainedModel`]: what the encoder and the captioner tell transformers about themselves."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_gap_closed_clip import GapClosedClipConfig
from .projection_gap_closed_clip import EmbeddingMap, ProjectionCentering, Temperature, initial_bias
from .saving_gap_closed_clip import share_weights
from .towers_gap_closed_clip import loading_in_one_line


class GapClosedClipPreTrainedModel(PreTrainedModel):
    """Initial weights, and what transformers needs to know about the towers."""

    config_class = GapClosedClipConfig
    base_model_prefix = "gap_closed_clip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # timm and BERT both run scaled_dot_product_attention
    _supports_sdpa = True
    # A contrastive batch can't be split into token counts: the Trainer must not hand num_items_in_batch to forward.
    accepts_loss_kwargs = False

    def __init__(self, config: GapClosedClipConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        config.check()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectionCentering):
            init.zeros_(module.running_mean)
            init.zeros_(module.num_batches_tracked)
        if isinstance(module, EmbeddingMap):
            init.eye_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.shift)
        if isinstance(module, Temperature):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, initial_bias(self.config))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in transformers; the weights may be read by all who may read the configuration beside them."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            share_weights(save_directory)

    def initialize_weights(self) -> None:
        """
        As in transformers, the towers first and by themselves. A model from outside the library has modules without
        weights of their own passed over, and CLIP draws its weights from the modules around them.
        """
        further = getattr(self, "modality_towers", {}).values()
        for child in [*self.children(), *(modality.tower for modality in further)]:
            if isinstance(child, PreTrainedModel):
                child.initialize_weights()
        super().initialize_weights()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args, **kwargs) -> Any:
        """
        As of any module. The weights may also have the names that are in a saved file: `save_pretrained` writes those
        that a tower was published with (of ViT's for one), and the Trainer reads its checkpoints by this method.
        """
        return super().load_state_dict(self._by_own_names(state_dict), *args, **kwargs)

    def _by_own_names(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same weights by the names of this model's layers, as far as transformers knows them."""
        own = self.state_dict().keys()
        if state_dict.keys() <= own or own <= state_dict.keys():
            return state_dict
        is_double = any(weight.dtype == torch.float64 for weight in state_dict.values())
        # from_pretrained alone knows the names. It draws the weights that are not given at random.
        with loading_in_one_line(), torch.random.fork_rng(devices=[]):
            model, info = type(self).from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=dict(state_dict),
                dtype=torch.float64 if is_double else torch.float32,
                output_loading_info=True,
            )
        known = {name: weight for name, weight in model.state_dict().items() if name not in info["missing_keys"]}
        unknown = {name: weight for name, weight in state_dict.items() if name in info["unexpected_keys"]}
        return {**known, **{name: weight for name, weight in state_dict.items() if name in own}, **unknown}

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs) -> Any:
        """
        As in transformers. It refuses to go on with an adapter of which only a part was loaded.

        Raises:
            RuntimeError: weights of the adapter were left at their initial values, which the library only logs: of a
                DoRA adapter its magnitudes (up to 5.24 at least), and with 5.17 modules that were trained as a whole
                (`modules_to_save`). The model has then an adapter that is of no use.
        """
        name = adapter_name or "default"
        # The names of an adapter that is swapped for another one are there before.
        before = set() if name in getattr(self, "peft_config", {}) else self.state_dict().keys()
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        # (Where some part of the base's names is like the adapter's, the library takes it for missing as well.)
        missing = sorted(
            weight for weight in set(getattr(info, "missing_keys", ())) - before if _is_of_adapter(weight, name)
        )
        if missing:
            raise RuntimeError(
                f"transformers {transformers.__version__} leaves {len(missing)} weights of the adapter out "
                f"({missing[0]}, ...). Load the model again, and the adapter with "
                "peft.PeftModel.from_pretrained(model, adapter); or both, merged, with "
                "gap_closed_clip.checkpoint.load_checkpoint(adapter)."
            )
        return info

    def enable_adapters(self) -> None:
        """
        As in transformers, which switches modules that an adapter trained as a whole (`modules_to_save`) off together
        with the adapter, but not on again.
        """
        super().enable_adapters()
        for module in self.modules():
            if "modules_to_save" in module._modules:
                module.enable_adapters(enabled=True)


def _is_of_adapter(weight: str, adapter: str) -> bool:
    """Whether a weight's name is that of an adapter's, and not one that peft gave to a weight of the base."""
    parts = weight.split(".")
    return adapter in parts and not {"base_layer", "original_module"} & set(parts)


__all__ = ["GapClosedClipPreTrainedModel"]
