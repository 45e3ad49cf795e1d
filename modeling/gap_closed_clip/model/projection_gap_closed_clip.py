"""From a tower's features to the shared space: projection and centering of one modality; the temperature of both."""

import math

import torch
from torch import Tensor, nn

from .configuration_gap_closed_clip import GapClosedClipConfig
from .distributed_gap_closed_clip import sum_across_processes


class ProjectionCentering(nn.Module):
    """
    Subtracts a modality's mean: in training that of the global batch, otherwise running statistics saved with the
    model.

    A BatchNorm without scale. A modality can't then sit in a cone of its own, nor can both crowd into one: what closes
    the gap has to align the pairs. The running mean is the plain mean of the first 1 / momentum batches and moves by
    `momentum` from then on, so that short trainings don't keep a part of the initial zero.
    """

    weight = None  # which some of peft's methods ask every module for that was trained as a whole, when they merge

    def __init__(self, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("num_batches_tracked", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        if not self.training:
            return x - self.running_mean.to(x.dtype)
        count = sum_across_processes(x.new_tensor(float(len(x))))
        mean = sum_across_processes(x.sum(0)) / count  # (D,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = (1 / self.num_batches_tracked).clamp(min=self.momentum).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        return x - mean


class Temperature(nn.Module):
    """
    What cosines are multiplied by before the softmax: exp(`logit_scale`), learned and capped as in CLIP.

    A module and not a bare parameter of the model: peft saves modules (`modules_to_save`) beside its adapters.
    """

    weight = None  # as in ProjectionCentering

    def __init__(self, config: GapClosedClipConfig):
        super().__init__()
        self.config = config
        # (1,) and not a scalar, which FSDP can't shard
        self.logit_scale = nn.Parameter(
            torch.tensor([float(config.logit_scale_init_value)]), requires_grad=config.learnable_temperature
        )

    def forward(self) -> Tensor:
        """The scale, 1 / temperature: a scalar, float32 or float64."""
        logit_scale, cap = self.logit_scale.squeeze(0), math.log(self.config.max_logit_scale)
        if not self.config.learnable_temperature:
            logit_scale = logit_scale.detach()  # because from_pretrained gives every parameter a gradient
        elif self.training:
            # The parameter itself is capped, as in CLIP: clamping its exponential would leave it without gradient at
            # the cap.
            with torch.no_grad():
                self.logit_scale.clamp_(max=cap)
        # Under FSDP what was capped is a copy: the value is, whatever the parameter.
        over = (logit_scale.detach() - cap).clamp(min=0)
        return at_least_float32(logit_scale - over).exp()


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def projection(in_dim: int, config: GapClosedClipConfig) -> nn.Module:
    """(..., in_dim) -> (..., D): linear, or with a hidden layer of `config.projection_hidden_dim`."""
    if config.projection_hidden_dim is None:
        return nn.Linear(in_dim, config.projection_dim)
    hidden_dim = config.projection_hidden_dim
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, config.projection_dim))


def centering(config: GapClosedClipConfig) -> nn.Module:
    """[`ProjectionCentering`] where the config asks for it, else nothing."""
    if config.center_projections:
        return ProjectionCentering(config.projection_dim, config.centering_momentum)
    return nn.Identity()


__all__ = ["ProjectionCentering", "Temperature", "at_least_float32", "centering", "projection"]
