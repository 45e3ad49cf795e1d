"""`evaluate` modules, one self-contained file each: load one with `evaluate.load("<this folder>/modality_gap.py")`."""
