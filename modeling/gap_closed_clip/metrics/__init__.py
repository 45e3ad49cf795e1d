"""`evaluate` modules: load one with `evaluate.load("<this folder>/modality_gap.py")`.

One file each. It imports nothing of the package but what the metrics of captions share (`_caption_tokens.py`) or those
of embeddings (`_embeddings.py`); `evaluate.load` copies that file along.
"""
