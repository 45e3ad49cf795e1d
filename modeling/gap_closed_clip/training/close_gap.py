"""From a trained model and the features of its training pairs to a model whose gap a post-hoc method has closed."""

from typing import Any

import torch
from torch import Tensor

from ..evaluation import PairEmbeddings, post_hoc
from ..evaluation.post_hoc import AffineMap, PostHocMaps
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from .encoder import with_config


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
    if method == "centering":
        return post_hoc.centering(features.image_embeds, features.text_embeds, normalize=False)
    return post_hoc.fit(method, features.image_embeds, features.text_embeds)


def close_gap(model: GapClosedClipModel, method: str, maps: PostHocMaps) -> GapClosedClipModel:
    """
    A model with the same weights that gives the mapped embeddings wherever it is used: from `forward`,
    `get_image_features` and `get_text_features`, in pipelines, as ONNX, and without this package.

    Centering sets the running means of the model's centering (which one without gets: `center_projections=True`). The
    other methods' numbers become an `EmbeddingMap`, of which `config.embedding_map` keeps the name. Either may be
    trained on: the means follow the training, the map stays as it is.

    Args:
        model: the trained encoder; it stays as it is.
        method: one of `post_hoc.METHODS`.
        maps: of `fit_post_hoc` for this model's features.

    Raises:
        ValueError: as `check_can_close`.
    """
    check_can_close(model)
    changes: dict[str, Any] = {"center_projections": True} if method == "centering" else {"embedding_map": method}
    closed = with_config(model, changes, model.name_or_path or "this model").to(model.device).train(model.training)
    modules = ((closed.visual_centering, closed.visual_map), (closed.text_centering, closed.text_map))
    with torch.no_grad():
        for (centering, embedding_map), found in zip(modules, (maps.image, maps.text), strict=True):
            if method == "centering":
                # Features come centered by the mean that is there already: this is what is left of it.
                centering.running_mean.sub_(_like(found.bias, centering.running_mean))
            else:
                _fill(embedding_map, found)
    return closed


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


def _fill(embedding_map: torch.nn.Module, found: AffineMap) -> None:
    for name in ("weight", "bias", "shift"):
        buffer = getattr(embedding_map, name)
        buffer.copy_(_like(getattr(found, name), buffer))


def _like(values: Any, buffer: Tensor) -> Tensor:
    return torch.as_tensor(values).to(buffer)


__all__ = ["check_can_close", "close_gap", "fit_post_hoc"]
