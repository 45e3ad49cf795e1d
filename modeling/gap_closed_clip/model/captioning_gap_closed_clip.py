"""[`GapClosedClipForConditionalGeneration`]: a causal decoder that writes captions from the shared space."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .caption_encoding_gap_closed_clip import CaptionEncodingMixin, CaptionMemory
from .caption_generation_gap_closed_clip import MAX_NEW_TOKENS, CaptionGenerationMixin, caption_generation_config
from .caption_loss_gap_closed_clip import caption_loss, caption_loss_of_states, tokens_of_labels, without_first_tokens
from .caption_outputs_gap_closed_clip import (
    CACHE,
    GapClosedClipCaptionOutput,
    takes_past_key_values,
    with_memory_cache,
)
from .configuration_gap_closed_clip import CAPTION_FIELDS, GapClosedClipConfig
from .decoder_gap_closed_clip import build_decoder, copy_layers, decoder_config_like, head_of, special_tokens
from .modeling_gap_closed_clip import GapClosedClipModel
from .pretrained_gap_closed_clip import GapClosedClipPreTrainedModel
from .saving_gap_closed_clip import describe_code
from .tower_kinds_gap_closed_clip import first_position, token_width


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where on the Hub a folder is, and so where its tokenizer is, too.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


class GapClosedClipForConditionalGeneration(
    GapClosedClipPreTrainedModel, CaptionGenerationMixin, CaptionEncodingMixin
):
    """
    Writes captions: a [`GapClosedClipModel`] and a BERT decoder that attends to an image's patches and embedding.

    With `config.decoder_memory="embedding"` it reads the shared space alone: trained on the embeddings of captions
    (`shared_embeds`) it has never seen an image, and gets an image's embedding instead (Li et al., DeCap, ICLR 2023;
    Nukrai et al., CapDec, EMNLP 2022). How well that works is a matter of the modality gap.

    `from_pretrained` of a trained [`GapClosedClipModel`]'s folder makes a new captioner around it, whose decoder
    starts from the text tower's weights; `from_clip` does so with a model at hand, or another decoder.

    Args:
        config ([`GapClosedClipConfig`]): without a `decoder_config`, the decoder has the text tower's shape.
        clip_model, decoder: parts to use instead of newly initialised ones.
    """

    main_input_name = "input_ids"  # what is generated goes on from them

    def __init__(
        self,
        config: GapClosedClipConfig,
        clip_model: GapClosedClipModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        decoder_config: Any = config.decoder_config
        if decoder_config is None:
            decoder_config = config.decoder_config = decoder_config_like(config.text_config)
        if not (decoder_config.is_decoder and decoder_config.add_cross_attention):
            raise ValueError("decoder_config is no decoder's: it needs is_decoder=True and add_cross_attention=True.")
        self.gap_closed_clip = GapClosedClipModel(config) if clip_model is None else clip_model
        self.decoder = AutoModelForCausalLM.from_config(decoder_config) if decoder is None else decoder
        config.decoder_config = self.decoder.config
        config.pad_token_id = self.decoder.config.pad_token_id  # where Seq2SeqTrainer looks for it
        self.memory = CaptionMemory(config, token_width(self.gap_closed_clip.vision_model))
        self.post_init()
        # Inside a captioner the encoder's list must not apply: weights of the decoder that find no place are reported.
        self._keys_to_ignore_on_load_unexpected -= set(GapClosedClipModel._keys_to_ignore_on_load_unexpected)

    @classmethod
    def from_clip(
        cls,
        clip_model: GapClosedClipModel,
        tokenizer: PreTrainedTokenizerBase,
        decoder: str | PreTrainedConfig | None = None,
        num_layers: int | None = None,
        **config_kwargs,
    ) -> "GapClosedClipForConditionalGeneration":
        """
        A new captioner around a trained model, which becomes a part of it and gets its configuration.

        Args:
            clip_model: the encoder.
            tokenizer: of its text tower; captions begin with its `cls_token` and end with its `sep_token`.
            decoder: Hub id or folder of a BERT with the same vocabulary to start the decoder from, or a BERT's
                configuration for one from scratch. By default it starts from the text tower: its embeddings,
                self-attention and feed-forward layers; cross-attention and the head's transform are new.
            num_layers: of the text tower's layers, the first so many; default all. Only without a `decoder`.
            config_kwargs: the captioner's fields of [`GapClosedClipConfig`] (`decoder_memory`, ...).

        Raises:
            OSError: a decoder that can't be found or downloaded.
            ValueError: a decoder that is not of the BERT family, or has another vocabulary; more layers than there
                are; a tokenizer without the tokens that captions begin and end with.
        """
        decoder_model = build_decoder(clip_model.config.text_config, decoder, num_layers, clip_model.dtype)
        special = special_tokens(tokenizer)
        changes = {"decoder_config": decoder_model.config, **config_kwargs}
        # A new configuration checks the changes before any is made. It gets copies, because it would reset the
        # attention implementation of the parts it is given.
        GapClosedClipConfig.from_dict({**clip_model.config.to_dict(), **copy.deepcopy(changes)})
        # A configuration of this captioner's own, as another one may have the same encoder. It is a shallow copy: the
        # layers of the towers look into the parts that it has.
        config = clip_model.config = clip_model.temperature.config = copy.copy(clip_model.config)
        config.update(changes)
        decoder_model.config.update(special)
        model = cls(config, clip_model=clip_model, decoder=decoder_model)
        model.memory.to(clip_model.dtype)
        if decoder is None:
            copy_layers(clip_model.text_model, model.decoder.base_model)
        model.generation_config = caption_generation_config(decoder_model.config, special)
        return model.to(clip_model.device).train(clip_model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`. From the folder of a [`GapClosedClipModel`], which has no decoder, it
        makes a new captioner as `from_clip` does, with the tokenizer that lies beside the weights. Where there is no
        tokenizer, the decoder starts at random.
        """
        name = pretrained_model_name_or_path
        location = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
        if name is not None and not isinstance(config, PreTrainedConfig):
            fields = GapClosedClipConfig.__dataclass_fields__.keys() - {"dtype", "decoder_config"}
            given = {field: kwargs.pop(field) for field in fields & kwargs.keys()}
            config = GapClosedClipConfig.from_pretrained(name if config is None else config, **location, **given)
        if name is None or config.decoder_config is not None or "decoder_config" in kwargs:
            return super().from_pretrained(name, *args, config=config, **kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **location)
        except (OSError, ValueError):  # weights alone: the decoder starts at random, which the library reports
            return super().from_pretrained(name, *args, config=config, **kwargs)
        changes = {field: kwargs.pop(field) for field in CAPTION_FIELDS if field in kwargs}
        loaded = GapClosedClipModel.from_pretrained(name, *args, config=config, **kwargs)
        clip_model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        logger.warning(
            f"{name} is an encoder without a decoder: the captioner around it gets a new one, which has yet to be "
            "trained (gap-closed-clip train configs/captioning.yaml checkpoint=...)."
        )
        model = cls.from_clip(clip_model, tokenizer, **changes)
        return (model, *info) if info else model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As `GapClosedClipModel.save_pretrained`, with the code. It loads as a [`GapClosedClipModel`], too."""
        describe_code(self.config, self.gap_closed_clip, AutoModelForImageTextToText=self)
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers, of the decoder and of the text tower: one tokenizer serves both."""
        self.gap_closed_clip.resize_token_embeddings(*args, **kwargs)
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.decoder.config.vocab_size = embeddings.num_embeddings
        return embeddings

    def freeze_encoder(self, frozen: bool = True) -> None:
        """Switches the gradients of the whole encoder off (or on). Without gradients it stays in eval mode."""
        self.gap_closed_clip.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GapClosedClipForConditionalGeneration":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.gap_closed_clip.parameters()):
            self.gap_closed_clip.eval()  # with its centering, whose running means would follow the batches
        return self

    def set_training_progress(self, progress: float) -> None:
        """As that of the encoder, whose objective may follow a schedule; nothing where it does not train with it."""
        if self.config.caption_objective_weight:
            self.gap_closed_clip.set_training_progress(progress)

    @can_return_tuple
    @takes_past_key_values
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shared_embeds: Tensor | None = None,
        group_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pooled_image: Tensor | None = None,
        image_tokens: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GapClosedClipCaptionOutput:
        """
        Logits of the next token after each of the given ones and, with `labels`, the captioning loss. Captions may be
        padded on either side: the logits stand where the given tokens do, and those of padding say nothing.

        Args:
            pixel_values, shared_embeds, pooled_image, image_tokens: what the captions are written from, see `encode`.
            input_ids, attention_mask: (B, L), the caption so far, `cls_token` first; made of `labels` if left out.
            labels: (B, L), the whole caption with `cls_token` and `sep_token`, -100 where it is padded. Each token but
                the first is predicted from those before it.
            group_ids: as in `GapClosedClipModel.forward`, for the space's objective.
            encoder_hidden_states: (B, M, hidden), the memory of an earlier call, instead of what it is made of.
            token_type_ids: not used; a caption is of one segment.
            position_ids, inputs_embeds, cache, use_cache, logits_to_keep: as in `BertLMHeadModel` (`cache` may also be
                given as `past_key_values`, its name in transformers below 5.24).
            skip_logits: leave `logits` out where there are `labels`: the same loss in less time and memory, as scores
                of the vocabulary are made where there is a token to predict, and nowhere else. (A decoder whose head
                is more than one module, as ELECTRA's, makes them all.)

        Raises:
            ValueError: as `encode`; no tokens and no labels; a caption longer than the decoder takes.
        """
        objective = None
        if encoder_hidden_states is None:
            encoder_hidden_states, shared_embeds, objective = self._encode_for_training(
                labels,
                group_ids,
                pixel_values=pixel_values,
                shared_embeds=shared_embeds,
                pooled_image=pooled_image,
                image_tokens=image_tokens,
            )
        if input_ids is None and inputs_embeds is None:
            if labels is None:
                raise ValueError("forward got neither input_ids nor labels: give the caption, or generate() one.")
            input_ids, attention_mask = tokens_of_labels(labels, self.decoder.config.pad_token_id)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        self._check_length(tokens, cache)
        if position_ids is None:
            position_ids = self._positions_of(tokens, attention_mask, cache)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "use_cache": labels is None and not self.training if use_cache is None else use_cache,
            "return_dict": True,
            CACHE: with_memory_cache(cache),
            **kwargs,
        }
        head = head_of(self.decoder) if skip_logits and labels is not None else None
        if head is None:
            decoded = self.decoder(logits_to_keep=logits_to_keep, **inputs)
        else:
            decoded = self.decoder.base_model(**inputs)
        memory = {"shared_embeds": shared_embeds, "encoder_hidden_states": encoder_hidden_states}
        return self._output(decoded, without_first_tokens(labels, attention_mask), objective, head, **memory)

    def _check_length(self, tokens: Tensor | None, cache: Cache | None) -> None:
        if cache is None and tokens is not None and tokens.shape[1] > (limit := self.max_caption_length):
            raise ValueError(f"The captions are {tokens.shape[1]} tokens long, the decoder takes {limit} at most.")

    def _positions_of(
        self, tokens: Tensor | None, attention_mask: Tensor | None, cache: Cache | None
    ) -> Tensor | None:
        """Positions (B, L) of `forward`'s tokens from each caption's first on; None where the decoder may count."""
        if tokens is None or attention_mask is None or attention_mask.ndim != 2:
            return None
        length = tokens.shape[1] + (0 if cache is None else cache.get_seq_length())
        if attention_mask.shape[1] != length:  # of the new tokens alone
            return None
        padding = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1): before a caption
        positions = (torch.arange(length, device=attention_mask.device) - padding).clamp(min=0)
        return positions[:, -tokens.shape[1] :] + first_position(self.config.decoder_config)

    def _output(
        self,
        decoded: ModelOutput,
        labels: Tensor | None,
        objective: Tensor | None,
        head: nn.Module | None,
        **memory: Tensor | None,
    ) -> GapClosedClipCaptionOutput:
        """
        The output for what the decoder gives, or for what it gives without its head; with the losses where there are
        labels.
        """
        loss = total_loss = None
        if labels is not None:
            smoothing = self.config.label_smoothing if self.training else 0.0
            if head is None:
                loss = caption_loss(decoded.logits, labels, smoothing)
            else:
                loss = caption_loss_of_states(decoded.last_hidden_state, labels, head, smoothing)
            total_loss = loss if objective is None else loss + self.config.caption_objective_weight * objective
        return GapClosedClipCaptionOutput(
            loss=total_loss,
            caption_loss=loss,
            logits=decoded.logits if head is None else None,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            **{CACHE: getattr(decoded, CACHE)},
            **memory,
        )

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        self.gap_closed_clip._set_gradient_checkpointing(enable, *args, **kwargs)
        self.decoder._set_gradient_checkpointing(enable, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CaptionMemory):
            init.zeros_(module.image_shift)


GapClosedClipForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MAX_NEW_TOKENS", "GapClosedClipCaptionOutput", "GapClosedClipForConditionalGeneration"]
