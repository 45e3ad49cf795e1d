"""From a trained model and the features of its training pairs to a model whose gap a post-hoc method has closed."""

from typing import Any

import torch
from transformers.utils import logging

from ..evaluation import PairEmbeddings, post_hoc
from ..evaluation.post_hoc import AffineMap, PostHocMaps
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from .encoder import with_config


logger = logging.get_logger(__name__)


def fit_post_hoc(method: str, features: PairEmbeddings) -> PostHocMaps:
    """
    The maps of a post-hoc method as they act on features that are not normalised.

    Args:
        method: one of `post_hoc.METHODS`. Centering is that of the features themselves, before they are normalised, as
            in a model's own `ProjectionCentering`; all others look at unit vectors.
        features: of the training pairs, from `embed_pairs(..., normalize=False)`.

    Raises:
        ValueError: an unknown method, or features that it can't be fitted on.
    """
    return post_hoc.fit_pairs(method, features, normalize=method != "centering")


def close_gap(model: GapClosedClipModel, method: str, maps: PostHocMaps) -> GapClosedClipModel:
    """
    A model with the same weights, in float32, that gives the mapped embeddings wherever it is used: from `forward`,
    `get_image_features` and `get_text_features`, in pipelines, as ONNX, and without this package.

    Centering sets the running means of the model's centering (which one without gets: `center_projections=True`). The
    other methods' numbers become an `EmbeddingMap`, of which `config.embedding_map` keeps the name. Either may be
    trained on: the means follow the training, the map stays as it is. A modality without a map stays where it is,
    which is warned of.

    Args:
        model: the trained encoder; it stays as it is.
        method: one of `post_hoc.METHODS`.
        maps: of `fit_post_hoc` for this model's features.

    Raises:
        ValueError: as `check_can_close`.
    """
    check_can_close(model)
    by_modality = maps.by_modality()
    if staying := [name for name in model.config.modality_names if name not in by_modality]:
        logger.warning(
            f"{method}: the pairs it was fitted on have no {' and no '.join(staying)} (data.modalities), whose "
            f"embeddings stay where they are while those of {' and '.join(by_modality)} move away from them. Fit it "
            "on pairs that have every modality, if you compare them with one another."
        )
    if method == "centering":
        changes: dict[str, Any] = {"center_projections": True}
        weights = [_centers(model, modality, found) for modality, found in by_modality.items()]
    else:
        changes = {"embedding_map": method}
        weights = [_numbers_of_the_map(modality, found) for modality, found in by_modality.items()]
    new_weights = {name: torch.as_tensor(value).float() for part in weights for name, value in part.items()}
    closed = with_config(model, changes, model.name_or_path or "this model", new_weights)
    closed.config.fusion_weights = weights_after(model.config, method)
    return closed.to(model.device).train(model.training)


def weights_after(config: GapClosedClipConfig, method: str) -> dict[str, float] | None:
    """
    The `fusion_weights` that hold after a method ("" is none): the model's own, which are measured without the means
    of the modalities and so hold well after centering too; None after the other methods, whose space is another one.
    """
    return config.fusion_weights if method in ("", "centering") else None


def check_can_close(model: GapClosedClipModel) -> None:
    """
    Checks that a model has no map yet.

    Raises:
        ValueError: it has one. A map of mapped embeddings is none of the published methods any more.
    """
    if model.config.embedding_map is not None:
        raise ValueError(
            f"{model.name_or_path or 'The model'} already has a map ({model.config.embedding_map}) behind its "
            "embeddings: start from the model that the map was made for."
        )


def _centers(model: GapClosedClipModel, modality: str, found: AffineMap) -> dict[str, Any]:
    mean = -found.bias
    count = torch.zeros(())
    if model.config.center_projections:
        # Features come centered by the mean that is there already: what was found is what is left of it.
        centering: Any = model.parts(modality).centering
        mean, count = mean + centering.running_mean.double().cpu().numpy(), centering.num_batches_tracked
    name = _prefix(modality) + "centering"
    return {f"{name}.running_mean": mean, f"{name}.num_batches_tracked": count}


def _numbers_of_the_map(modality: str, found: AffineMap) -> dict[str, Any]:
    return {f"{_prefix(modality)}map.{name}": getattr(found, name) for name in ("weight", "bias", "shift")}


def _prefix(modality: str) -> str:
    """What the names of a modality's parts in the state dict begin with."""
    return {"image": "visual_", "text": "text_"}.get(modality, f"modality_towers.{modality}.")


__all__ = ["check_can_close", "close_gap", "fit_post_hoc", "weights_after"]
