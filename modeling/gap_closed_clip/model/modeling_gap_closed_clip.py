"""[`GapClosedClipModel`]: a timm image tower and a BERT text tower in one space, with the loss that closes the gap."""

import copy
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .configuration_gap_closed_clip import GapClosedClipConfig
from .losses_gap_closed_clip import (
    TILED_FROM,
    GapClosedLoss,
    at_least_float32,
    gap_closed_loss,
    scheduled_weight,
    unit_vectors,
)
from .micro_batches_gap_closed_clip import MicroBatches, encode_in_micro_batches
from .projection_gap_closed_clip import ProjectionCentering, Temperature, centering, projection
from .towers_gap_closed_clip import (
    fixed_image_size,
    load_tower,
    longest_text,
    pool_text,
    pretrained_head,
    run_fused_layers_as_modules,
    select_states,
)


logger = logging.get_logger(__name__)


@dataclass
class GapClosedClipOutput(ModelOutput):
    """
    Output of [`GapClosedClipModel`] for B images and C texts; B = C wherever there is a loss.

    Args:
        loss (scalar): weighted sum of the three terms; only with both modalities, `return_loss` and B = C.
        contrastive_loss, align_loss, uniformity_loss (scalars): the terms before weighting.
        logits_per_image (B, C): scale times cosine. Left out of training with large batches, where it would be the
            matrix that the loss gets by without.
        logits_per_text (C, B): its transpose.
        image_embeds (B, D), text_embeds (C, D): unit vectors in the shared space, float32 (float64 in a float64
            model).
        group_ids (B,) or (B, G): those given, handed on so that an evaluation loop can gather them.
        vision_model_output, text_model_output: the towers' own outputs.
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    align_loss: Tensor | None = None
    uniformity_loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    group_ids: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None


class GapClosedClipPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers needs to know of the towers."""

    config_class = GapClosedClipConfig
    base_model_prefix = "gap_closed_clip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # timm and BERT both run scaled_dot_product_attention
    _supports_sdpa = True
    # A contrastive batch can't be split into token counts: the Trainer must not hand num_items_in_batch to forward.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectionCentering):
            init.zeros_(module.running_mean)
            init.zeros_(module.num_batches_tracked)
        if isinstance(module, Temperature):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        if isinstance(module, GapClosedClipModel):
            init.zeros_(module.training_progress)

    def enable_adapters(self) -> None:
        """As in transformers, which switches off what an adapter trained as a whole (`modules_to_save`), too, but not
        on again."""
        super().enable_adapters()
        for module in self.modules():
            if "modules_to_save" in module._modules:
                module.enable_adapters(enabled=True)


class GapClosedClipModel(GapClosedClipPreTrainedModel):
    """
    Image and text embeddings that share one space.

    Towers, projections to D dimensions, optionally centered, unit vectors; the loss of arXiv 2602.20046 inside
    `forward`.

    Args:
        config ([`GapClosedClipConfig`]): the architecture and the objective.
        vision_model, text_model: towers to use instead of newly initialised ones.
    """

    # A captioner's folder loads as the encoder inside it.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^memory\."]

    def __init__(
        self,
        config: GapClosedClipConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config) if vision_model is None else vision_model
        self.text_model = AutoModel.from_config(config.text_config) if text_model is None else text_model
        # The objects that the towers' own layers look their attention up in, also where the towers were given.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        if config.text_pooling != "pooler":
            # An unused pooler has parameters without gradient, which DistributedDataParallel refuses.
            self.text_model.pooler = None
        run_fused_layers_as_modules(self.vision_model)
        self.image_size = fixed_image_size(self.vision_model)
        self.visual_projection = projection(self.vision_model.timm_model.head_hidden_size, config)
        self.text_projection = projection(config.text_config.hidden_size, config)
        self.visual_centering = centering(config)
        self.text_centering = centering(config)
        self.temperature = Temperature(config)
        # Saved with the model, so that a reloaded checkpoint evaluates its loss with the weights it was trained with.
        self.register_buffer("training_progress", torch.zeros(()))
        self._progress_is_set = False
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedConfig,
        text_model_name_or_path: str | PreTrainedConfig,
        keep_vision_projection: bool = False,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "GapClosedClipModel":
        """
        Starts from published towers, by Hub id or folder. A tower given as a configuration starts from scratch.

        Args:
            vision_model_name_or_path: a timm image model, e.g. `timm/eva_giant_patch14_clip_224.laion400m`, or a
                `TimmWrapperConfig`.
            text_model_name_or_path: a BERT-family encoder, e.g. `google-bert/bert-base-uncased`, or its configuration.
            keep_vision_projection: start the image projection from the checkpoint's own CLIP head; `projection_dim` is
                then the head's (1024 for EVA-CLIP-g) and the projections are linear.
            vision_kwargs, text_kwargs: handed to the towers' `from_pretrained` (`dtype`, `revision`, `model_args`,
                ...).
            config_kwargs: fields of [`GapClosedClipConfig`].

        Raises:
            OSError: a tower that can't be found or downloaded.
            ValueError: an image tower that is not timm's, or `keep_vision_projection` where there is no fitting head.
        """
        vision_kwargs, text_kwargs = vision_kwargs or {}, text_kwargs or {}
        vision_model = load_tower(vision_model_name_or_path, vision_kwargs)
        if vision_model.config.model_type != "timm_wrapper":
            raise ValueError(
                f"{vision_model_name_or_path} is a {vision_model.config.model_type} model: the image tower has to be "
                f"a "
                "timm model (Hub ids that begin with timm/), e.g. timm/eva02_base_patch16_clip_224.merged2b."
            )
        text_model = load_tower(text_model_name_or_path, text_kwargs)
        head = None
        if keep_vision_projection:
            head = pretrained_head(vision_model_name_or_path, vision_kwargs.get("revision"))
            head_dim = len(head["weight"])
            asked = config_kwargs.setdefault("projection_dim", head_dim)
            if asked != head_dim or config_kwargs.get("projection_hidden_dim") is not None:
                raise ValueError(
                    f"keep_vision_projection: the head of {vision_model_name_or_path} is linear, to {head_dim} "
                    f"dimensions; leave projection_dim (now {asked}) and projection_hidden_dim out."
                )
        # Copies: a new composite config resets the attention implementation of the parts it is given.
        parts = {"vision_config": copy.deepcopy(vision_model.config), "text_config": copy.deepcopy(text_model.config)}
        config = GapClosedClipConfig(**parts, **config_kwargs)
        model = cls(config, vision_model=vision_model, text_model=text_model)
        if head is not None:
            model.visual_projection.load_state_dict(head)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        As `PreTrainedModel.save_pretrained`. Beside the weights goes the code, so that the folder loads where this
        package is not installed, with `trust_remote_code=True`.
        """
        describe_code(self.config, self)
        config = self.config
        if config.decoder_config is not None:
            self.config = copy.deepcopy(config)  # which is a captioner's as well
            self.config.decoder_config = None  # this is the encoder of one: what is saved has no decoder
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config = config

    @property
    def logit_scale(self) -> Tensor:
        """(1,): the log of the scale; the parameter in use, also where an adapter has its own."""
        return self.temperature.logit_scale

    @property
    def max_text_length(self) -> int:
        """Tokens of the longest text that the text tower takes; a tokenizer's own limit may be higher or missing."""
        return longest_text(self.config.text_config)

    def freeze_towers(self, vision: bool = False, text: bool = False) -> None:
        """Switches the towers' gradients off (or on); a tower without trainable parameters also stays in eval mode."""
        self.vision_model.requires_grad_(not vision)
        self.text_model.requires_grad_(not text)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GapClosedClipModel":
        super().train(mode)
        for tower in (self.vision_model, self.text_model):
            # Dropout and batch statistics would put noise into features that can't adapt to it.
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def set_training_progress(self, progress: float) -> None:
        """Tells scheduled weights which fraction of training, 0 to 1, is done."""
        self.training_progress.fill_(progress)
        self._progress_is_set = True

    def objective_weights(self) -> dict[str, float | Tensor]:
        """The three weights at the present training progress; scheduled ones as scalar tensors."""
        names = ("contrastive_weight", "align_weight", "uniformity_weight")
        # .float(): a progress in bfloat16 moves in steps of 1/256
        return {name: scheduled_weight(getattr(self.config, name), self.training_progress.float()) for name in names}

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Projected image features, (B, D) as `pooler_output`; not normalised. Centered where the config says so.

        Args:
            pixel_values: (B, 3, height, width), as the processor makes them.

        Raises:
            ValueError: a height or width that the tower can't take.
        """
        outputs = self._project_images(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_centering(outputs.pooler_output)
        return outputs

    def encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        The text tower alone: (B, length, hidden) and, as `pooler_output`, what represents a text, (B, hidden).

        Raises:
            ValueError: texts longer than the tower takes.
        """
        limit = self.max_text_length
        if input_ids.shape[1] > limit:
            raise ValueError(
                f"The texts are {input_ids.shape[1]} tokens long, the text tower takes {limit} at most: tokenize with "
                f"truncation=True, max_length={limit}."
            )
        if hasattr(self.config.text_config, "use_cache"):
            # An encoder keeps no cache. Its configuration asks for one all the same, of which transformers warns under
            # checkpointing, and torch.compile has no place for a warning in its graph.
            kwargs["use_cache"] = False
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pool_text(outputs, attention_mask, self.config.text_pooling),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pooled_text: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Projected text features, (B, D) as `pooler_output`; not normalised. Centered where the config says so.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, length), as the tokenizer makes them.
            pooled_text: (B, hidden), the `pooler_output` of `encode_text` from before: a frozen tower need not run
                again.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, pooled_text)
        outputs = self._project_texts(*inputs, **kwargs)
        outputs.pooler_output = self.text_centering(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        group_ids: Tensor | None = None,
        pooled_text: Tensor | None = None,
        micro_batches: MicroBatches | None = None,
        return_loss: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> GapClosedClipOutput:
        """
        Embeds images, texts, or both; with both of the same number, the loss as well.

        Args:
            pixel_values: (B, 3, height, width).
            input_ids, attention_mask, token_type_ids, position_ids: (C, length).
            group_ids: integers, (B,) or (B, G): pairs that agree in any column (one image, one caption) are not
                negatives of one another.
            pooled_text: (C, hidden), instead of `input_ids`; see `get_text_features`.
            micro_batches: one large batch in parts ([`MicroBatches`] of the inputs above), instead of all of them.
                Same embeddings, loss and gradients; the activations are those of one part at a time.
            return_loss: at inference, numbers of images and texts may differ; the loss is then left out.
            output_attentions: of the text tower; timm's towers have none to give.
            output_hidden_states: of both towers; indices instead of True leave None in the place of the other states.

        Raises:
            ValueError: neither images nor texts; in training, numbers of images and texts that differ.
        """
        if micro_batches is not None:
            micro_batches, group_ids = micro_batches.pop_group_ids()
            image_embeds, text_embeds = self._embed_micro_batches(micro_batches)
            compared = self._compare(image_embeds, text_embeds, group_ids, return_loss)
            return GapClosedClipOutput(
                **compared, image_embeds=image_embeds, text_embeds=text_embeds, group_ids=group_ids
            )
        has_text = input_ids is not None or pooled_text is not None
        if pixel_values is None and not has_text:
            raise ValueError("forward got neither pixel_values nor input_ids: give images, texts, or both.")
        vision_outputs = text_outputs = image_embeds = text_embeds = None
        compared = {}
        if pixel_values is not None:
            vision_outputs = self.get_image_features(
                pixel_values, output_hidden_states=output_hidden_states, return_dict=True
            )
            image_embeds = unit_vectors(vision_outputs.pooler_output)  # (B, D)
        if has_text:
            # A tower takes None for no, and looks into its configuration only where nothing is handed to it.
            asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            text_outputs = self.get_text_features(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                pooled_text,
                return_dict=True,
                **{name: value for name, value in asked.items() if value is not None},
            )
            text_embeds = unit_vectors(text_outputs.pooler_output)  # (C, D)
        if image_embeds is not None and text_embeds is not None:
            text_embeds = text_embeds.to(image_embeds.device)  # device_map may have parted the towers
            compared = self._compare(image_embeds, text_embeds, group_ids, return_loss)
        return GapClosedClipOutput(
            **compared,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            group_ids=group_ids,
            vision_model_output=vision_outputs,
            text_model_output=text_outputs,
        )

    def compute_loss(self, embeddings: list[Tensor], group_ids: Tensor | None = None) -> GapClosedLoss:
        """
        The objective (arXiv 2602.20046), with this model's temperature and its weights at the present training
        progress. In training under several processes it is that of the global batch, with exact gradients under
        DistributedDataParallel.

        Args:
            embeddings: M >= 2 modalities, each (B, D) on the unit sphere; the first is the anchor.
            group_ids: (B,) or (B, G); ignored where `config.mask_groups` is off.
        """
        self._warn_of_standing_schedule()
        if not self.config.mask_groups:
            group_ids = None
        scale = self.temperature().to(embeddings[0].device)
        return gap_closed_loss(
            embeddings, scale, group_ids, **self.objective_weights(), across_processes=self.training
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def _project_images(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`get_image_features` before the centering."""
        size = tuple(pixel_values.shape[-2:])
        if self.image_size is not None and size != self.image_size:
            raise ValueError(
                f"The images are {size[0]} x {size[1]} pixels, the image tower takes {self.image_size[0]} x "
                f"{self.image_size[1]}: set the image processor's crop_size and size, or the tower's "
                "model_args={'dynamic_img_size': True}."
            )
        # timm raises on indices beyond its last block, which the text tower may well have, and drops the other states.
        selects = output_hidden_states is not None and not isinstance(output_hidden_states, bool)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            output_hidden_states=True if selects else output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        states = select_states(outputs.hidden_states, output_hidden_states) if selects else outputs.hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=at_least_float32(self.visual_projection(outputs.pooler_output)),
            hidden_states=states,
        )

    def _project_texts(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pooled_text: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """`get_text_features` before the centering."""
        if pooled_text is None:
            outputs = self.encode_text(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        else:
            outputs = BaseModelOutputWithPooling(pooler_output=pooled_text)
        outputs.pooler_output = at_least_float32(self.text_projection(outputs.pooler_output))
        return outputs

    def _embed_micro_batches(self, micro_batches: MicroBatches) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of the images and the texts of all micro-batches together."""
        names = micro_batches.batches[0].keys()
        if "pixel_values" not in names or not {"input_ids", "pooled_text"} & names:
            raise ValueError(f"micro_batches hold {', '.join(names)}: give both pixel_values and input_ids.")

        def encode(pixel_values: Tensor, **text) -> tuple[Tensor, Tensor]:
            return self._project_images(pixel_values).pooler_output, self._project_texts(**text).pooler_output

        image_features, text_features = encode_in_micro_batches(encode, micro_batches, self.logit_scale.device)
        # Centered by the mean of the whole batch, not of a part.
        return unit_vectors(self.visual_centering(image_features)), unit_vectors(self.text_centering(text_features))

    def _compare(
        self, image_embeds: Tensor, text_embeds: Tensor, group_ids: Tensor | None, return_loss: bool
    ) -> dict[str, Tensor | None]:
        """Logits and, where there is one, the loss with its terms, as fields of the output."""
        compared = {}
        if return_loss and self._have_same_number(image_embeds, text_embeds):
            compared = self.compute_loss([image_embeds, text_embeds], group_ids)._asdict()
        if self.training and compared and len(image_embeds) >= TILED_FROM:
            return compared  # without the N x N matrix that the loss gets by without
        with torch.autocast(text_embeds.device.type, enabled=False):
            logits = self.temperature().to(text_embeds) * image_embeds @ text_embeds.T  # (B, C)
        return {**compared, "logits_per_image": logits, "logits_per_text": logits.T}

    def _have_same_number(self, image_embeds: Tensor, text_embeds: Tensor) -> bool:
        if len(image_embeds) == len(text_embeds):
            return True
        if self.training:
            raise ValueError(
                f"{len(image_embeds)} images and {len(text_embeds)} texts: in training every image needs its text, "
                f"row by row."
            )
        return False

    def _warn_of_standing_schedule(self) -> None:
        weights = (self.config.contrastive_weight, self.config.align_weight, self.config.uniformity_weight)
        scheduled = any(isinstance(weight, list | tuple) for weight in weights)
        if self.training and scheduled and not self._progress_is_set and not torch.compiler.is_compiling():
            logger.warning_once(
                "A weight of the objective follows a schedule, but nothing tells the model how far training is: it "
                "stays at "
                f"progress {float(self.training_progress):g}. Give the Trainer "
                f"gap_closed_clip.TrainingProgressCallback(), or "
                "call model.set_training_progress(fraction) before every step."
            )

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        # transformers looks for its own layers only; the timm tower has a switch of its own.
        self.vision_model._set_gradient_checkpointing(enable)
        self.text_model._set_gradient_checkpointing(enable, *args, **kwargs)


def describe_code(config: GapClosedClipConfig, model: GapClosedClipModel, **heads: PreTrainedModel) -> None:
    """
    Tells in the configuration which class each auto class and pipeline finds in the code that is saved beside it.

    Args:
        config: to be saved.
        model: the encoder, what `AutoModel` finds.
        heads: what other auto classes find.
    """
    from .pipeline_gap_closed_clip import ImageTextRetrievalPipeline

    # custom_object_save names only the auto class that a model was loaded by last.
    classes = {"AutoModel": model, "AutoModelForZeroShotImageClassification": model, **heads}
    config.auto_map = {
        name: f"{type(found).__module__.split('.')[-1]}.{type(found).__name__}" for name, found in classes.items()
    }
    config.custom_pipelines = {
        "image-text-retrieval": {
            "impl": f"pipeline_gap_closed_clip.{ImageTextRetrievalPipeline.__name__}",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }


# Saving puts the code beside the weights.
GapClosedClipModel.register_for_auto_class("AutoModel")

__all__ = ["GapClosedClipModel", "GapClosedClipOutput", "GapClosedClipPreTrainedModel"]
