"""open_clip's tokenizers as one of transformers that cleans texts as they do."""

import string
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from .open_clip_weights import check_fields


# open_clip knows CLIP's own tokenizer by heart; its Hub folders hold that of this model.
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def text_tokenizer(
    fields: dict[str, Any], folder: str, revision: str | None, has_file: Callable[[str], bool]
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the files beside the weights, or else of the model that `text_cfg` names.

    It differs from open_clip's in that: open_clip repairs texts by ftfy (wrong encodings, full-width letters) and
    decodes all HTML entities; of these, only curly quotes, ligatures and the most frequent entities are replaced here.

    Args:
        fields: `text_cfg`.
        folder: the folder or Hub id of the model.
        has_file: whether it has a file of this name.

    Raises:
        ValueError: `text_cfg` asks for a way to tokenize that can't be taken over.
        OSError: there is no tokenizer.
    """
    name = fields.get("hf_tokenizer_name")
    settings = fields.get("tokenizer_kwargs") or {}
    check_fields("text_cfg", {"tokenizer_mode": fields.get("tokenizer_mode") or None}, (), {"tokenizer_mode": None})
    own_only = {"reduction_mask": "", "additional_special_tokens": None}
    fixed = {"strip_sep_token": False, "language": None} if name else own_only
    check_fields("text_cfg.tokenizer_kwargs", settings, ("clean",), fixed)
    clean = settings.get("clean", "whitespace" if name else "lower")
    if clean not in ("whitespace", "lower", "canonicalize"):
        raise ValueError(f"text_cfg.tokenizer_kwargs.clean is {clean!r}: known are whitespace, lower, canonicalize.")
    tokenizer = _load(name or CLIP_TOKENIZER, folder, revision, has_file)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    steps = cleaning(clean)
    if name and backend.normalizer is not None:  # of CLIP's own tokenizer, open_clip knows the steps above alone
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    if getattr(backend.model, "end_of_word_suffix", None):
        # CLIPTokenizer does this in Python, beside its decoder.
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace(backend.model.end_of_word_suffix, " ")])
    # Without a causal mask every token of the padding is seen, as in training: SigLIP's texts have no attention mask.
    inputs = ["input_ids"] if fields.get("no_causal_mask") else list(tokenizer.model_input_names)
    # CLIPTokenizer and BertTokenizer would build a normalizer of their own when they are loaded.
    return TokenizersBackend(
        tokenizer_object=backend,
        model_max_length=fields.get("context_length", 77),
        model_input_names=inputs,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )


def cleaning(kind: str) -> list[normalizers.Normalizer]:
    """
    What open_clip does to a text before it is tokenized, as far as it can be said in rules: `basic_clean`, and the
    `clean` of the tokenizer, which is `whitespace`, `lower` or `canonicalize` (no punctuation, lower case).
    """
    rules = [
        ("&(?:amp;)+", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", '"'),
        ("&(?:#39|apos);", "'"),
        ("&nbsp;", " "),
        ("[\u02bc\u2018-\u201b]", "'"),
        ("[\u201c-\u201f]", '"'),
        ("\ufb00", "ff"),
        ("\ufb01", "fi"),
        ("\ufb02", "fl"),
        ("\ufb03", "ffi"),
        ("\ufb04", "ffl"),
        (r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]", ""),  # control characters
    ]
    if kind == "canonicalize":
        punctuation = "".join(f"\\{sign}" for sign in string.punctuation if sign != "_")
        rules += [("_", " "), (f"[{punctuation}]", "")]
    steps: list[normalizers.Normalizer] = [_replace(*rule) for rule in rules]
    steps += [normalizers.NFC(), _replace(r"\s+", " "), normalizers.Strip()]
    return steps if kind == "whitespace" else [*steps, normalizers.Lowercase()]


def _load(name: str, folder: str, revision: str | None, has_file: Callable[[str], bool]) -> PreTrainedTokenizerBase:
    beside = any(has_file(file) for file in TOKENIZER_FILES)
    try:
        if beside:
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        found = "its tokenizer can't be read" if beside else f"it holds no tokenizer, and {name} is out of reach"
        raise OSError(
            f"{folder}: {found}. AutoTokenizer.from_pretrained({name!r}).save_pretrained(folder) puts the tokenizer "
            f"beside the weights. The library says: {str(error).strip().splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: its tokenizer, {type(tokenizer).__name__}, has no tokenizer.json.")
    return tokenizer


def _replace(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)


__all__ = ["cleaning", "text_tokenizer"]
