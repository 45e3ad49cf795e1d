"""Where pairs come from and how they become batches."""

from .arguments import DataArguments
from .captions import CaptionCollator
from .collator import PairCollator, count_truncated
from .hashing import group_ids, normalize_caption, stable_hash
from .images import Augmentation, cache_images, check_images, decode_image, window_of
from .sampler import DistinctSampler, OneSourceSampler, check_sizes_of_sources, group_ids_of, sources_of
from .sources import load_checked_pairs, load_pairs


__all__ = [
    "Augmentation",
    "CaptionCollator",
    "DataArguments",
    "DistinctSampler",
    "OneSourceSampler",
    "PairCollator",
    "cache_images",
    "check_images",
    "check_sizes_of_sources",
    "count_truncated",
    "decode_image",
    "group_ids",
    "group_ids_of",
    "load_checked_pairs",
    "load_pairs",
    "normalize_caption",
    "sources_of",
    "stable_hash",
    "window_of",
]
