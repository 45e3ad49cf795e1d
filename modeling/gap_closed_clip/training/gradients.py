"""Finds what is meant to train and can't, once, after the first backward pass."""

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def without_gradient(model: nn.Module) -> list[str]:
    """
    The names of trainable parameters that the loss does not reach, to be called after a backward pass.

    Those whose gradient is None, and an adapter's whose gradients are all zero. All of one layer's: most methods start
    with a factor at zero, so that the other factors get their first gradient in the second step.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trainable.items() if parameter.grad is None]
    for layer, parameters in _adapters(model):
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        if gradients and not any(gradient.any() for gradient in gradients):
            missing.extend(f"{layer}.{name}" for name in parameters)
    return missing


def describe_missing(names: list[str]) -> str:
    """The message about such parameters, with the first five names and the remedies."""
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{len(names)} trainable parameters got no gradient from the first batch and would never change: {listed}. "
        "Where a layer is not part of the forward pass, leave it out (of lora.layers, or by requires_grad_(False)); "
        "with gradient_checkpointing, set gradient_checkpointing_kwargs={use_reentrant: false}. If they are to "
        "stay unused, say so with training.ddp_find_unused_parameters=true."
    )


def _adapters(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Yields the name of every adapted layer and the trainable parameters of its adapter."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            parameters = module.named_parameters()
            adapter = {n: p for n, p in parameters if p.requires_grad and not n.startswith("base_layer.")}
            if adapter:
                yield name, adapter


__all__ = ["describe_missing", "without_gradient"]
