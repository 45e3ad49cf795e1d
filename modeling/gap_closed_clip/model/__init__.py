"""
Everything that travels: these files are copied beside the weights and run there without the package.

They lie flat and import one another by `from .name import x` alone, the only form that transformers follows when it
copies and loads a model's code. Nothing in here imports from the rest of the package.
"""
