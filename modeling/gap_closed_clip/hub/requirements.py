"""
What a published model needs where this package is not installed.

Each is one of pyproject.toml's dependencies, or of its extra `search`, word for word, which a test compares: nothing
reads that file at runtime, and what pip knows of an installed package may be older than the package.
"""

TRANSFORMERS = "transformers>=5.17,<5.25"
# An Inference Endpoint, which has torch.
ENDPOINT = ("timm>=1.0.23", "torchvision", TRANSFORMERS)
# Whoever follows the card of a model, or of an adapter.
MODEL = (TRANSFORMERS, "torch>=2.11", "torchvision", "timm>=1.0.23", "pillow>=10.1")
ADAPTER = (*MODEL, "peft>=0.20")
# Whoever searches by sentence-transformers, beside those of MODEL.
SEARCH = "sentence-transformers>=6.0"
