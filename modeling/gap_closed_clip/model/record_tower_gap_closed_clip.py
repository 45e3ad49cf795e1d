"""[`GapClosedClipRecordTower`]: a transformer over the fields of a table's row, such as a patient's record."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling


class GapClosedClipRecordConfig(PreTrainedConfig):
    """
    Configuration of a [`GapClosedClipRecordTower`].

    Args:
        num_numbers (`int`, defaults to 0):
            Fields that hold a number.
        schema (`str`, *optional*):
            A digest of the fields, names and words that the tower was trained with, in their order: those of its
            processor have to be the same.
        categories (`list[int]`, *optional*):
            For each field that holds a category the size of its vocabulary, "missing" (0) and "unknown" (1) included.
        hidden_size (`int`, defaults to 64):
            Features H of a field's token.
        num_hidden_layers, num_attention_heads, intermediate_size (`int`, default to 2, 4, 128):
            Of the transformer.
        hidden_dropout_prob (`float`, defaults to 0.1):
            Dropout behind attention and inside the feed-forward layers.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.

    Raises:
        ValueError: there is no field, or sizes that do not go together.
    """

    model_type = "gap_closed_clip_record"

    num_numbers: int = 0
    categories: list[int] | None = None
    schema: str | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    hidden_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.categories = list(self.categories or [])
        super().__post_init__(**kwargs)
        sizes = [self.num_numbers, *self.categories]
        if not all(type(size) is int for size in sizes) or sizes[0] < 0 or any(size < 2 for size in sizes[1:]):
            raise ValueError(
                f"A record tower with num_numbers={self.num_numbers} and categories={self.categories}: use a number "
                "of 0 or more, and vocabularies of 2 or more (missing, unknown, ...)."
            )
        if self.hidden_size < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"A record tower's hidden_size is {self.hidden_size}: use a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )

    @property
    def num_fields(self) -> int:
        """Fields of a record."""
        return self.num_numbers + len(self.categories or [])


class GapClosedClipRecordTower(PreTrainedModel):
    """
    The FT-Transformer (Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", arXiv 2106.11959): each
    field of a record becomes a token, a transformer with layer normalisation before its blocks relates them, and a
    token of its own gathers what stands for the record.

    A number's token is the number times a learned vector plus another one; a category's is looked up. What is missing
    has a learned token of its own for each field, and is no zero.

    Args:
        config ([`GapClosedClipRecordConfig`]): the fields and sizes.

    Raises:
        ValueError: the configuration has no field.
    """

    config_class = GapClosedClipRecordConfig
    base_model_prefix = "record"
    main_input_name = "numbers"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: GapClosedClipRecordConfig):
        super().__init__(config)
        if not config.num_fields:
            raise ValueError(
                "A record tower has no field: give num_numbers, categories, or both; training takes them from the "
                "columns of data.modalities."
            )
        self.number_tokens = nn.Parameter(torch.empty(3, config.num_numbers, config.hidden_size))  # see forward
        self.category_tokens = nn.ModuleList(
            nn.Embedding(size, config.hidden_size) for size in config.categories or []
        )
        self.record_token = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, numbers: Tensor, numbers_mask: Tensor, categories: Tensor, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            numbers: (B, num_numbers), standardised; what stands where a number is missing does not matter.
            numbers_mask: (B, num_numbers), bool: True where the number is given.
            categories: (B, len(categories)), integers: 0 is missing, 1 unknown.

        Returns:
            `last_hidden_state` (B, 1 + fields, H), the record's token first; `pooler_output` (B, H), that token.

        Raises:
            ValueError: another number of fields, or a category beyond its vocabulary.
        """
        self._check(numbers, numbers_mask, categories)
        weight, bias, missing = self.number_tokens  # (num_numbers, H) each
        given = numbers_mask.bool()
        known = numbers.to(weight.dtype).masked_fill(~given, 0.0).unsqueeze(-1) * weight + bias
        tokens = [self.record_token.expand(numbers.shape[0], 1, -1), torch.where(given.unsqueeze(-1), known, missing)]
        tokens += [embed(ids).unsqueeze(1) for embed, ids in zip(self.category_tokens, categories.T, strict=True)]
        hidden = torch.cat(tokens, dim=1)  # (B, 1 + fields, H)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0])

    def _check(self, numbers: Tensor, numbers_mask: Tensor, categories: Tensor) -> None:
        wanted = (self.config.num_numbers, self.config.num_numbers, len(self.config.categories))
        found = tuple(part.shape[-1] for part in (numbers, numbers_mask, categories))
        if found != wanted:
            raise ValueError(
                f"Records of {found[0]} numbers ({found[1]} marks of what is given) and {found[2]} categories, but "
                f"the record tower takes {wanted[0]} and {wanted[2]}: they are of another schema."
            )
        if categories.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            sizes = torch.tensor(self.config.categories)
            if ((categories < 0) | (categories >= sizes)).any():  # a GPU would stop with an assertion
                raise ValueError(
                    f"Records with categories up to {categories.amax(0).tolist()}, but the record tower has "
                    f"{self.config.categories} of them: of another schema, or of one with words added by hand."
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GapClosedClipRecordTower):
            # As large as tokens from a table are, so that no field drowns another.
            init.normal_(module.number_tokens, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.record_token, mean=0.0, std=self.config.initializer_range)


class _Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer normalisation and added to what came in."""

    def __init__(self, config: GapClosedClipRecordConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.hidden_dropout_prob
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, tokens, H) -> (B, tokens, H)."""
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, tokens, H / heads) each
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + F.dropout(self.out(mixed), self.dropout, self.training)
        inner = F.dropout(F.gelu(self.up(self.feed_forward_norm(hidden))), self.dropout, self.training)
        return hidden + self.down(inner)


__all__ = ["GapClosedClipRecordConfig", "GapClosedClipRecordTower"]
