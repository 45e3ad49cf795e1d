"""`evaluate` modules: load one with `evaluate.load("<this folder>/modality_gap.py")`.

One file each that imports nothing of the package; the caption metrics share `_caption_tokens.py`, which
`evaluate.load` copies along with them.
"""
