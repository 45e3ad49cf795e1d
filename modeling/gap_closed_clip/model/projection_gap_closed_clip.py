"""
From the features of a tower to the embedding space that the modalities share: the projection, the centering and the
map of one modality, and the temperature, which all modalities have in common.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_gap_closed_clip import GapClosedClipConfig
from .distributed_gap_closed_clip import sum_across_processes
from .losses_gap_closed_clip import at_least_float32, unit_vectors


# Where the bias of the sigmoid loss starts (arXiv 2303.15343, section 3.2): most pairs are no true ones.
SIGLIP_BIAS = -10.0


class ProjectionCentering(nn.Module):
    """
    Subtracts the mean of a modality's features: in training the mean of the global batch, otherwise a running mean,
    which is saved with the model. It is a BatchNorm that does not scale.

    A centered modality can't sit in a cone of its own, and centered modalities can't all crowd into one cone: the gap
    can then close only by aligning the pairs.

    Args:
        dim: D, the number of features.
        momentum: share of a new batch in the running mean. Over the first 1 / momentum batches the running mean is
            their plain mean instead, so that after a short training nothing is left of the zeros it starts from.
    """

    running_mean: Tensor  # (D,)
    num_batches_tracked: Tensor  # scalar
    # Some of peft's methods ask every module in `modules_to_save` for its weight when they merge their adapters.
    weight = None

    def __init__(self, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("num_batches_tracked", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Features (B, D) -> centered features (B, D).

        Args:
            mask: (B,), bool: False for samples that lack this modality. Their rows, which may hold anything, have no
                part in the mean. Where less than two samples of the global batch have the modality, the running mean
                is subtracted and stays as it is, as it does where a row is NaN or infinite: a single sample is its own
                mean, and nothing would be left of it. Processes with and without a mask may go together.
        """
        if not self.training:
            return x - self.running_mean.to(x.dtype)
        if mask is not None:
            mask = mask.to(x.device)
        counted = x if mask is None else x.masked_fill(~mask[:, None], 0.0)
        # Not in half precision: bfloat16 can't tell 257 rows from 256, and float16 ends at 65504.
        dtype = torch.promote_types(x.dtype, torch.float32)
        num_rows = x.new_tensor(len(x), dtype=dtype) if mask is None else mask.sum().to(dtype)
        count = sum_across_processes(num_rows)
        total = sum_across_processes(counted.sum(0, dtype=dtype))  # (D,)
        has_mean = count > 1
        mean = torch.where(has_mean, total / count.clamp(min=1), self.running_mean.to(dtype))  # (D,)
        with torch.no_grad():
            # One NaN would stay in the running mean for good.
            moves = has_mean & mean.isfinite().all()
            self.num_batches_tracked += moves
            share = self.num_batches_tracked.reciprocal().clamp(min=self.momentum).to(self.running_mean.dtype)
            moved = self.running_mean.lerp(mean.to(self.running_mean.dtype), share)
            self.running_mean.copy_(torch.where(moves, moved, self.running_mean))
        return x - mean.to(x.dtype)


class EmbeddingMap(nn.Module):
    """
    A fixed map of one modality's embeddings, which closes the gap of a trained model (`gap-closed-clip center`):

        z -> unit(unit(W unit(z) + b) + s)

    W is `weight`, b is `bias`, s is `shift`, and unit(x) = x / |x|. Its numbers are buffers: training goes on through
    the map and leaves it as it is.

    Args:
        dim: D, the dimension of the space. A new map is the identity on unit vectors.
    """

    weight: Tensor  # (D, D)
    bias: Tensor  # (D,)
    shift: Tensor  # (D,)

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.eye(dim))
        self.register_buffer("bias", torch.zeros(dim))
        self.register_buffer("shift", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) -> unit vectors (B, D)."""
        x = unit_vectors(x)
        # Not in bfloat16, of which a whitening would show every rounding.
        with torch.autocast(x.device.type, enabled=False):
            x = unit_vectors(x @ self.weight.to(x.dtype).T + self.bias.to(x.dtype))
        return unit_vectors(x + self.shift.to(x.dtype))


class Temperature(nn.Module):
    """
    The scale of the logits: cosines are multiplied by exp(`logit_scale`), which is learned and capped as in CLIP. With
    the sigmoid loss also what is added to them, `logit_bias`, which is learned as well; None with the softmax.

    This is a module and not a bare parameter of the model because what peft saves beside its adapters
    (`modules_to_save`) are modules.
    """

    logit_bias: nn.Parameter | None  # (1,)
    weight = None  # for peft, as in ProjectionCentering

    def __init__(self, config: GapClosedClipConfig):
        super().__init__()
        self.config = config
        # Of shape (1,), because FSDP can't shard a scalar.
        self.logit_scale = nn.Parameter(
            torch.tensor([float(config.logit_scale_init_value)]), requires_grad=config.learnable_temperature
        )
        bias = nn.Parameter(torch.tensor([initial_bias(config)])) if config.contrastive_loss == "sigmoid" else None
        self.register_parameter("logit_bias", bias)

    def forward(self) -> Tensor:
        """The scale, 1 / temperature: a scalar tensor, float32 or float64."""
        logit_scale, cap = self.logit_scale.reshape(()), math.log(self.config.max_logit_scale)
        if not self.config.learnable_temperature:
            logit_scale = logit_scale.detach()  # from_pretrained makes every parameter require a gradient
        elif self.training:
            # The parameter itself is capped, as in CLIP: once over the cap, a clamped exponential would give it no
            # gradient to come back with.
            with torch.no_grad():
                self.logit_scale.clamp_(max=cap)
        # Under FSDP that caps a gathered copy and not the parameter, so the value is capped in any case.
        excess = (logit_scale.detach() - cap).clamp(min=0)
        return at_least_float32(logit_scale - excess).exp()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        # CLIP's checkpoints hold a scalar, and some a number.
        value = state_dict.get(f"{prefix}logit_scale")
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
            state_dict[f"{prefix}logit_scale"] = torch.as_tensor(value, dtype=self.logit_scale.dtype).reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        value = destination[f"{prefix}logit_scale"]
        if value.ndim == 0:  # somebody put a CLIP's scalar in the place of the data; it is to load again
            destination[f"{prefix}logit_scale"] = value.reshape(1)


def initial_bias(config: GapClosedClipConfig) -> float:
    """What the bias of the sigmoid loss starts from: that of the configuration, or SigLIP's where there is none."""
    return float(config.logit_bias) or SIGLIP_BIAS


def projection(in_dim: int, config: GapClosedClipConfig, modality: str) -> nn.Module:
    """
    The projection of one modality ("image" or "text"), (..., in_dim) -> (..., D): one linear layer, or two with a GELU
    (and a dropout) between them where the configuration gives a `projection_hidden_dim`.
    """
    hidden_dim, bias = config.projection_hidden_dim, config.projection_bias
    if isinstance(hidden_dim, dict):
        hidden_dim = hidden_dim.get(modality)
    if hidden_dim is None:
        return nn.Linear(in_dim, config.projection_dim, bias=bias)
    # GELU and dropout in one place: the weights' names count the places.
    hidden = nn.Sequential(nn.GELU(), nn.Dropout(config.projection_dropout))
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=bias), hidden, nn.Linear(hidden_dim, config.projection_dim, bias=bias)
    )


def centering(config: GapClosedClipConfig) -> nn.Module:
    """[`ProjectionCentering`] where the configuration asks for it, the identity where it does not."""
    if config.center_projections:
        return ProjectionCentering(config.projection_dim, config.centering_momentum)
    return nn.Identity()


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into it, of any kind."""
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


def hold_unsaved(centering: nn.Module) -> None:
    """
    Keeps the running mean of a model with adapters as it is in training, unless peft has wrapped the centering because
    `modules_to_save` names it: it would not be saved with the adapters, which would then be loaded into another model.
    """
    if isinstance(centering, ProjectionCentering):
        centering.eval()


def embedding_map(config: GapClosedClipConfig) -> nn.Module:
    """[`EmbeddingMap`] where the configuration names the method that made one, the identity where it does not."""
    return nn.Identity() if config.embedding_map is None else EmbeddingMap(config.projection_dim)


__all__ = [
    "EmbeddingMap",
    "ProjectionCentering",
    "Temperature",
    "centering",
    "embedding_map",
    "has_adapters",
    "hold_unsaved",
    "initial_bias",
    "projection",
]
