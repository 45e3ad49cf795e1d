"""The terms of the objective for one batch: dense, in tiles, and in tiles where samples lack modalities."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .distributed_gap_closed_clip import gather_rows
from .loss_functions_gap_closed_clip import (
    align_true_pairs_loss,
    at_least_float32,
    centroid_uniformity_loss,
    centroids_of,
    contrastive_loss,
    pairwise_uniformity_loss,
    sigmoid_loss,
)
from .loss_inputs_gap_closed_clip import (
    Pairs,
    SharedSamples,
    anchor_pairs,
    excluded_of,
    excluded_pairs,
    without_samples,
)
from .tiled_entries_gap_closed_clip import tiled_cross_uniformity_loss, tiled_sigmoid_loss
from .tiled_gap_closed_clip import GlobalBatch, tiled_contrastive_loss, tiled_uniformity_loss


class DenseTerms:
    """
    The terms of one batch by means of N x N matrices, which autograd keeps; arguments as for `gap_closed_loss`, with
    rows of zeros where a modality is lacking. No shape depends on how many samples lack it.
    """

    def __init__(
        self,
        embeddings: list[Tensor],
        logit_scale: Tensor,
        group_ids: Tensor | None,
        modality_mask: Tensor | None = None,
        pairs: Pairs | None = None,
        logit_bias: Tensor | None = None,
        modality_ids: Tensor | None = None,
    ):
        self.embeddings = [at_least_float32(z) for z in embeddings]
        self.logit_scale = logit_scale.to(self.embeddings[0].dtype)
        self.logit_bias = None if logit_bias is None else logit_bias.to(self.embeddings[0].dtype)
        self.excluded = excluded_pairs(group_ids, embeddings[0].device)
        self.modality_ids = None if modality_ids is None else modality_ids.to(embeddings[0].device)
        self.modality_mask = modality_mask
        self.pairs = pairs or anchor_pairs(len(embeddings))
        self.shared = None if modality_mask is None else SharedSamples.of(modality_mask, self.pairs)

    def contrastive(self) -> Tensor:
        if self.logit_bias is not None:
            return self._sigmoid(self.logit_bias)
        losses = []
        for place, (first, second) in enumerate(self.pairs):
            excluded = excluded_of(self.excluded, self.modality_ids, first, second)
            if self.shared is not None:  # the row and the column of another sample keep one logit, whose loss is 0
                excluded = without_samples(excluded, self.shared.samples[place])
            anchor, other = self.embeddings[first], self.embeddings[second]
            losses.append(contrastive_loss(anchor, other, self.logit_scale, excluded))
        return torch.stack(losses).mean() if self.shared is None else self.shared.mean(torch.stack(losses))

    def _sigmoid(self, bias: Tensor) -> Tensor:
        losses = []
        for place, (first, second) in enumerate(self.pairs):
            samples = None if self.shared is None else self.shared.samples[place]
            excluded = excluded_of(self.excluded, self.modality_ids, first, second)
            anchor, other = self.embeddings[first], self.embeddings[second]
            losses.append(sigmoid_loss(anchor, other, self.logit_scale, bias, excluded, samples))
        return torch.stack(losses).mean() if self.shared is None else self.shared.mean(torch.stack(losses))

    def align(self) -> Tensor:
        return align_true_pairs_loss(self.embeddings, self.pairs, self.shared)

    def uniformity(self) -> Tensor:
        excluded = self.excluded
        if self.modality_mask is not None:
            excluded = without_samples(excluded, self.modality_mask.any(1))
        return centroid_uniformity_loss(self.embeddings, excluded)

    def modality_uniformity(self) -> Tensor:
        samples = [None] * len(self.embeddings) if self.modality_mask is None else self.modality_mask.T
        return self._mean_uniformity([(i, i) for i in range(len(self.embeddings))], samples)

    def cross_uniformity(self) -> Tensor:
        samples = [None] * len(self.pairs) if self.shared is None else self.shared.samples
        return self._mean_uniformity(self.pairs, samples)

    def _mean_uniformity(self, compared: Pairs, samples: Sequence[Tensor | None] | Tensor) -> Tensor:
        """The mean of what has any samples; `samples` (N,) of each are those that it has, None stands for all."""
        losses, weights = [], []
        for (i, j), has in zip(compared, samples, strict=True):
            excluded = excluded_of(self.excluded, self.modality_ids, i, j)
            if has is not None:
                excluded = without_samples(excluded, has)
            losses.append(
                pairwise_uniformity_loss(self.embeddings[i], self.embeddings[j], excluded)
            )  # 0 where there are no samples
            weights.append(losses[-1].new_ones(()) if has is None else has.any())
        return torch.stack(losses).sum() / torch.stack(weights).sum().clamp(min=1)


class TiledTerms:
    """The terms by means of N x N matrices that are visited in tiles; arguments as for `gap_closed_loss`."""

    def __init__(
        self,
        embeddings: list[Tensor],
        logit_scale: Tensor,
        group_ids: Tensor | None,
        across_processes: bool = False,
        pairs: Pairs | None = None,
        logit_bias: Tensor | None = None,
        modality_ids: Tensor | None = None,
    ):
        self.batch = GlobalBatch.gather(embeddings, group_ids, across_processes, modality_ids)
        self.embeddings = [at_least_float32(z) for z in embeddings]  # the rows of this process, with gradients
        self.logit_scale = logit_scale.to(self.embeddings[0].dtype)
        self.logit_bias = None if logit_bias is None else logit_bias.to(self.embeddings[0].dtype)
        self.pairs = pairs or anchor_pairs(len(embeddings))

    def contrastive(self) -> Tensor:
        losses = [
            self._contrastive(self.embeddings[i], self.embeddings[j], self.batch.comparing(i, j), (i, j))
            for i, j in self.pairs
        ]
        return torch.stack(losses).mean()

    def _contrastive(self, anchor: Tensor, other: Tensor, batch: GlobalBatch, pair: tuple[int, int]) -> Tensor:
        if self.logit_bias is None:
            return tiled_contrastive_loss(anchor, other, self.logit_scale, batch, pair)
        return tiled_sigmoid_loss(anchor, other, self.logit_scale, self.logit_bias, batch, pair)

    def align(self) -> Tensor:
        return self.batch.global_mean(align_true_pairs_loss(self.embeddings, self.pairs))

    def uniformity(self) -> Tensor:
        return tiled_uniformity_loss(centroids_of(self.embeddings), self.all_centroids(), self.batch)

    def modality_uniformity(self) -> Tensor:
        losses = [
            tiled_uniformity_loss(z, self.batch.embeddings[i], self.batch.comparing(i))
            for i, z in enumerate(self.embeddings)
        ]
        return torch.stack(losses).mean()

    def cross_uniformity(self) -> Tensor:
        losses = [
            tiled_cross_uniformity_loss(self.embeddings[i], self.embeddings[j], self.batch.comparing(i, j), (i, j))
            for i, j in self.pairs
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def all_centroids(self) -> Tensor:
        """The centroids of the global batch, (N, D)."""
        all_centroids = centroids_of(self.batch.embeddings)
        if all_centroids.is_cuda:
            # The GPU kernels multiply half precision as it is, which is faster; torch's tiles use float32 anyway.
            all_centroids = all_centroids.to(self.batch.embeddings[0].dtype)
        return all_centroids


class PartialTiledTerms(TiledTerms):
    """
    [`TiledTerms`] of samples that may lack modalities, with rows of zeros where they do. Every process takes part in
    the same collectives and gives all of its embeddings and the scale a gradient, be it 0: what it does depends on the
    mask of the global batch alone.
    """

    def __init__(self, modality_mask: Tensor, *args):
        super().__init__(*args)
        self.modality_mask = gather_rows(modality_mask, self.batch.row_counts)  # (N, M), of the global batch
        self.shared = SharedSamples.of(self.modality_mask, self.pairs)

    @torch.compiler.disable  # shapes that depend on the mask would be compiled again and again
    def contrastive(self) -> Tensor:
        loss = self._mean_over_pairs(self._contrastive) + 0 * self.logit_scale
        return loss if self.logit_bias is None else loss + 0 * self.logit_bias

    def align(self) -> Tensor:
        local = SharedSamples(self.shared.samples[:, self.batch.local_rows], self.shared.counts)
        return self.batch.global_sum(align_true_pairs_loss(self.embeddings, self.pairs, local))

    @torch.compiler.disable
    def uniformity(self) -> Tensor:
        samples = self.modality_mask.any(1)
        batch = self.batch.select([self.all_centroids()], samples)
        if len(batch) == 0:
            return self._zero()
        centroids = centroids_of(self.embeddings)[samples[self.batch.local_rows]]
        return tiled_uniformity_loss(centroids, batch.embeddings[0], batch)

    @torch.compiler.disable
    def modality_uniformity(self) -> Tensor:
        losses = []
        for i, (z, samples) in enumerate(zip(self.embeddings, self.modality_mask.T, strict=True)):
            batch = self.batch.comparing(i).select([self.batch.embeddings[i]], samples)
            if len(batch) > 0:
                local = samples[self.batch.local_rows]
                losses.append(tiled_uniformity_loss(z[local], batch.embeddings[0], batch))
        return self._zero() + torch.stack(losses).mean() if losses else self._zero()

    @torch.compiler.disable
    def cross_uniformity(self) -> Tensor:
        return self._mean_over_pairs(tiled_cross_uniformity_loss)

    def _mean_over_pairs(self, loss_of: Callable[[Tensor, Tensor, GlobalBatch, tuple[int, int]], Tensor]) -> Tensor:
        """The mean of a loss over those pairs of modalities that any sample has both of, each of those samples."""
        losses = []
        for (i, j), samples in zip(self.pairs, self.shared.samples, strict=True):
            both = [self.batch.embeddings[i], self.batch.embeddings[j]]
            batch = self.batch.comparing(i, j).select(both, samples)
            if len(batch) > 0:
                local = samples[self.batch.local_rows]
                losses.append(loss_of(self.embeddings[i][local], self.embeddings[j][local], batch, (0, 1)))
        return self._zero() + torch.stack(losses).mean() if losses else self._zero()

    def _zero(self) -> Tensor:
        """0, with a gradient of 0 for the embeddings of all modalities, also of one that no sample has."""
        return torch.stack([z[:0].sum() for z in self.embeddings]).sum()


__all__ = ["DenseTerms", "PartialTiledTerms", "TiledTerms"]
