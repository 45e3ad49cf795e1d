"""[`GapClosedClipForConditionalGeneration`]: a causal decoder that writes captions from the shared space."""

import copy
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .configuration_gap_closed_clip import CAPTION_FIELDS, GapClosedClipConfig
from .decoder_gap_closed_clip import (
    CaptionMemory,
    copy_layers,
    decoder_config_like,
    load_decoder,
    one_for_each,
    open_prompts,
    special_tokens,
)
from .losses_gap_closed_clip import unit_vectors
from .modeling_gap_closed_clip import GapClosedClipModel, GapClosedClipPreTrainedModel, describe_code
from .towers_gap_closed_clip import first_position, longest_text


logger = logging.get_logger(__name__)

IGNORED = -100  # label of a position without a target, as everywhere in transformers
MAX_NEW_TOKENS = 64  # of a generation config made here; captions of radiology are longer than the library's 20 tokens


@dataclass
class GapClosedClipCaptionOutput(ModelOutput):
    """
    Output of [`GapClosedClipForConditionalGeneration`] for B captions of L tokens.

    Args:
        loss (scalar): `caption_loss`, plus the weighted objective of the space where the config asks for it.
        caption_loss (scalar): mean cross-entropy of a caption's tokens in nats; smoothed in training.
        logits (B, L, vocabulary): of the next token at each position.
        past_key_values ([`EncoderDecoderCache`]): keys and values of the caption so far, and of the memory.
        hidden_states, attentions, cross_attentions: of the decoder, if asked for.
        shared_embeds (B, D): what the captions are written from, unit vectors.
        encoder_hidden_states (B, M, hidden): the decoder's memory.
    """

    loss: Tensor | None = None
    caption_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    shared_embeds: Tensor | None = None
    encoder_hidden_states: Tensor | None = None


class GapClosedClipForConditionalGeneration(GapClosedClipPreTrainedModel, GenerationMixin):
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
        if config.decoder_config is None:
            config.decoder_config = decoder_config_like(config.text_config)
        if not (config.decoder_config.is_decoder and config.decoder_config.add_cross_attention):
            raise ValueError("decoder_config is no decoder's: it needs is_decoder=True and add_cross_attention=True.")
        self.gap_closed_clip = GapClosedClipModel(config) if clip_model is None else clip_model
        self.decoder = AutoModelForCausalLM.from_config(config.decoder_config) if decoder is None else decoder
        config.decoder_config = self.decoder.config
        config.pad_token_id = config.decoder_config.pad_token_id  # where Seq2SeqTrainer looks for it
        self.memory = CaptionMemory(config, self.gap_closed_clip.vision_model.timm_model.num_features)
        self.post_init()
        # An encoder's, which skips a decoder's weights; here one that finds no place is told of.
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
        if isinstance(decoder, str):
            decoder_model = load_decoder(decoder)
        else:
            like = decoder_config_like(clip_model.config.text_config if decoder is None else decoder)
            if decoder is None and num_layers is not None:
                if not 1 <= num_layers <= like.num_hidden_layers:
                    raise ValueError(
                        f"num_layers is {num_layers}: the text tower has {like.num_hidden_layers}, use 1 to as many."
                    )
                like.num_hidden_layers = num_layers
            decoder_model = AutoModelForCausalLM.from_config(like)
        decoder_config = decoder_model.config
        known = clip_model.config.text_config.vocab_size
        if decoder_config.vocab_size != known:
            raise ValueError(
                f"The decoder has a vocabulary of {decoder_config.vocab_size} tokens, the text tower one of {known}: "
                "one tokenizer serves both, so name a decoder with the same."
            )
        special = special_tokens(tokenizer)
        changes = {"decoder_config": decoder_config, **config_kwargs}
        # Its checks, before it is changed; of a copy, as a new composite config resets its parts' attention.
        GapClosedClipConfig.from_dict({**clip_model.config.to_dict(), **copy.deepcopy(changes)})
        # Of its own: another captioner may have the same encoder. The parts stay those that the layers look into.
        config = clip_model.config = clip_model.temperature.config = copy.copy(clip_model.config)
        for name, value in (special | changes).items():
            setattr(decoder_config if name in special else config, name, value)
        model = cls(config, clip_model=clip_model, decoder=decoder_model)
        if decoder is None:
            copy_layers(clip_model.text_model, model.decoder.base_model)
        longest = min(MAX_NEW_TOKENS, longest_text(decoder_config) - 1)
        model.generation_config = GenerationConfig(max_new_tokens=longest, **special)
        return model.to(clip_model.device).train(clip_model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`. Of a [`GapClosedClipModel`], which has no decoder, it makes a new
        captioner as `from_clip` does, with the tokenizer that lies beside the weights. Where none does, the decoder
        starts at random.
        """
        name = pretrained_model_name_or_path
        own = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
        where = {field: kwargs[field] for field in own if field in kwargs}
        if name is not None and not isinstance(config, PreTrainedConfig):
            config = GapClosedClipConfig.from_pretrained(name if config is None else config, **where)
        if name is None or config.decoder_config is not None or "decoder_config" in kwargs:
            return super().from_pretrained(name, *args, config=config, **kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
        except (OSError, ValueError):  # weights alone: the decoder starts at random, which the library reports
            return super().from_pretrained(name, *args, config=config, **kwargs)
        changes = {field: kwargs.pop(field) for field in CAPTION_FIELDS if field in kwargs}
        loaded = GapClosedClipModel.from_pretrained(name, *args, config=config, **kwargs)
        clip_model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        logger.warning(
            f"{name} is an encoder without a decoder: the captioner around it gets a new one, which has yet to be "
            "trained (python train.py configs/captioning.yaml checkpoint=...)."
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
        self.config.decoder_config.vocab_size = embeddings.num_embeddings
        return embeddings

    @property
    def max_caption_length(self) -> int:
        """Tokens of the longest caption that the decoder takes, a prompt and `cls_token` included."""
        return longest_text(self.config.decoder_config)

    def freeze_encoder(self, frozen: bool = True) -> None:
        """Switches the gradients of the whole [`GapClosedClipModel`] off (or on); without, it stays in eval mode."""
        self.gap_closed_clip.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GapClosedClipForConditionalGeneration":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.gap_closed_clip.parameters()):
            self.gap_closed_clip.eval()  # its centering, too, which would follow the batches
        return self

    def set_training_progress(self, progress: float) -> None:
        """As of the encoder, whose objective may follow a schedule. Without the objective it stays as it is."""
        if self.config.caption_objective_weight:
            self.gap_closed_clip.set_training_progress(progress)

    def set_image_shift(self, shift: Tensor | None) -> None:
        """
        The mean-shift correction of a decoder trained on text alone: (D,), mean text minus mean image embedding of the
        training pairs, added to image embeddings. None for no correction.
        """
        self.memory.image_shift.copy_(torch.zeros_like(self.memory.image_shift) if shift is None else shift)

    def encode(self, pixel_values: Tensor | None = None, shared_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        The decoder's memory (B, M, hidden), and the unit vectors (B, D) that it is made of.

        Args:
            pixel_values: (B, 3, height, width).
            shared_embeds: (B, D), unit vectors of the shared space, of texts or of whatever was embedded in it;
                instead of images, where the decoder's memory is the embedding.

        Raises:
            ValueError: neither of them, or no images where the decoder's memory has their patches.
        """
        if pixel_values is None and self.config.decoder_memory != "embedding":
            raise ValueError(
                "The decoder attends to an image's patches, and there is no image: give pixel_values. "
                '(A decoder with config.decoder_memory="embedding" takes shared_embeds, too.)'
            )
        if shared_embeds is not None and shared_embeds.shape[1:] != (dim := self.config.projection_dim,):
            raise ValueError(f"shared_embeds has the shape {tuple(shared_embeds.shape)}: give a tensor (B, {dim}).")
        if (pixel_values is None) == (shared_embeds is None):
            raise ValueError("Give images as pixel_values, or embeddings as shared_embeds: one of them.")
        if shared_embeds is not None:
            return self.memory(shared_embeds), shared_embeds
        return self._remember(self.gap_closed_clip.get_image_features(pixel_values, return_dict=True))

    def _remember(self, image_features: ModelOutput) -> tuple[Tensor, Tensor]:
        """`encode` of the encoder's image features."""
        embeds = unit_vectors(image_features.pooler_output)  # (B, D)
        return self.memory(unit_vectors(embeds + self.memory.image_shift), image_features.last_hidden_state), embeds

    @can_return_tuple
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
        past_key_values: EncoderDecoderCache | DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GapClosedClipCaptionOutput:
        """
        Logits of the next token after each of the given ones and, with `labels`, the captioning loss.

        Args:
            pixel_values, shared_embeds: what the captions are written from, see `encode`.
            input_ids, attention_mask: (B, L), the caption so far, `cls_token` first; made of `labels` if left out.
            labels: (B, L), the whole caption with `cls_token` and `sep_token`, -100 where it is padded. Each token is
                predicted from those before it.
            group_ids: as in `GapClosedClipModel.forward`, for the space's objective.
            encoder_hidden_states: (B, M, hidden), the memory of an earlier call, instead of the first two.
            token_type_ids: not used; a caption is of one segment.
            position_ids, inputs_embeds, past_key_values, use_cache, logits_to_keep: as in `BertLMHeadModel`.

        Raises:
            ValueError: as `encode`; no tokens and no labels; a caption longer than the decoder takes.
        """
        objective = None
        if encoder_hidden_states is None:
            encoder_hidden_states, shared_embeds, objective = self._encode_for(
                labels, pixel_values, shared_embeds, group_ids
            )
        if input_ids is None and inputs_embeds is None:
            if labels is None:
                raise ValueError("forward got neither input_ids nor labels: give the caption, or generate() one.")
            input_ids, attention_mask = self._caption_tokens(labels)
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            # generate() makes a cache for the caption alone
            past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        self._check_length(input_ids if inputs_embeds is None else inputs_embeds, past_key_values)
        decoded = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            use_cache=labels is None and not self.training if use_cache is None else use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        loss = caption_loss = None if labels is None else self._caption_loss(decoded.logits, labels)
        if objective is not None:
            loss = caption_loss + self.config.caption_objective_weight * objective
        return GapClosedClipCaptionOutput(
            loss=loss,
            caption_loss=caption_loss,
            logits=decoded.logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            shared_embeds=shared_embeds,
            encoder_hidden_states=encoder_hidden_states,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shared_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor | ModelOutput:
        """
        Captions, as `GenerationMixin.generate`, all of whose arguments it takes: greedy, beams, sampling, ...

        The images are encoded once. A prompt is what the captions begin with; the tokenizer's `sep_token` at its end
        is dropped, and prompts of different lengths are padded on the left, whatever side they come padded on. The
        sequences of an earlier call, with its `past_key_values`, are left as they are.

        Args:
            pixel_values, shared_embeds, encoder_hidden_states: what to write from, as in `forward`.
            input_ids, attention_mask: (B, L), prompts as the tokenizer makes them, or (1, L), one for all; default
                `cls_token` alone.
            token_type_ids, labels: not used; accepted because pipelines and the Trainer hand them on.

        Returns:
            (B, length) token ids with the prompts; with `num_return_sequences`, that many rows for each image.

        Raises:
            ValueError: as `encode`; another number of prompts than of images; a prompt and `max_new_tokens` beyond
                what the decoder takes. (The generation config's own `max_new_tokens` gives way to a prompt.)
        """
        if encoder_hidden_states is None:
            encoder_hidden_states, _ = self.encode(pixel_values, shared_embeds)
        past = kwargs.get("past_key_values")
        if input_ids is None or not input_ids.shape[1]:
            input_ids = attention_mask = None
        elif past is None or not past.get_seq_length():
            ends, pad = (self._generation_token(name, kwargs) for name in ("eos_token_id", "pad_token_id"))
            input_ids, attention_mask = open_prompts(input_ids, attention_mask, ends, pad)
            input_ids, attention_mask = one_for_each(input_ids, attention_mask, len(encoder_hidden_states))
        length = 1 if input_ids is None else input_ids.shape[1]
        if kwargs.get("max_length") is not None and not {"generation_config", "max_new_tokens"} & kwargs.keys():
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - length  # before the config's own, which would win
        if not {"generation_config", "max_length", "max_new_tokens"} & kwargs.keys():
            kwargs |= self._default_length(length)
        return super().generate(
            input_ids, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states, **kwargs
        )

    def _generation_token(self, name: str, kwargs: dict) -> int | list[int] | None:
        """A token's id for `generate`: its argument, or of the generation config it gets, or of the model's own."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        tokens = (kwargs.get(name), *(getattr(config, name) for config in configs if config is not None))
        return next((token for token in tokens if token is not None), None)

    def _encode_for(
        self,
        labels: Tensor | None,
        pixel_values: Tensor | None,
        shared_embeds: Tensor | None,
        group_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`encode`, and the space's objective of images and captions where the config asks for it."""
        if labels is None or not self.config.caption_objective_weight:
            return *self.encode(pixel_values, shared_embeds), None
        input_ids, attention_mask = self._caption_tokens(labels)
        encoded = self.gap_closed_clip(
            pixel_values, input_ids=input_ids, attention_mask=attention_mask, group_ids=group_ids, return_dict=True
        )
        if encoded.loss is None:
            raise ValueError(
                "caption_objective_weight is above 0, which compares images with captions, and there is no image: "
                "give pixel_values."
            )
        return *self._remember(encoded.vision_model_output), encoded.loss

    def _caption_tokens(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask (B, L) of labels."""
        mask = labels != IGNORED
        return labels.masked_fill(~mask, self.config.decoder_config.pad_token_id or 0), mask.long()

    def _caption_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over all tokens of the batch, each predicted at the position before it."""
        smoothing = self.config.label_smoothing if self.training else 0.0
        logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=smoothing)

    def _check_length(self, tokens: Tensor, past_key_values: EncoderDecoderCache | None) -> None:
        if past_key_values is None and tokens.shape[1] > (limit := self.max_caption_length):
            raise ValueError(f"The captions are {tokens.shape[1]} tokens long, the decoder takes {limit} at most.")

    def _default_length(self, prompt_length: int) -> dict[str, int]:
        """The generation config's `max_new_tokens`, as far as the decoder goes on from a prompt."""
        left = self.max_caption_length - prompt_length
        own = self.generation_config.max_new_tokens
        return {} if own is None or left < 1 else {"max_new_tokens": min(own, left)}

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        limit = self.max_caption_length
        if generation_config.max_length > limit:
            raise ValueError(
                f"A prompt of {input_ids_length} tokens and the new ones make up to {generation_config.max_length}, "
                f"the decoder takes {limit} at most: max_new_tokens={limit - input_ids_length} or less."
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        # transformers counts from 0, whatever the decoder does
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs) + first_position(
            self.config.decoder_config
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

__all__ = ["GapClosedClipCaptionOutput", "GapClosedClipForConditionalGeneration"]
