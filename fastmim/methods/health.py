"""Signs of life of a siamese method: numbers that say whether its two branches still tell images apart.

    positive_similarity   mean cosine of a query and its key
    negative_similarity   mean cosine of a query and the keys of other images at the same position
    feature_std           deviation of k^ sqrt(D) over images at the same position, mean over dimensions:
                          1 for random directions, 0 where all images look the same
    feature_rank          tr(C)^2 / tr(C^2) of the same rows, C their covariance: how many directions they use

What depends on the position alone, and on no image, counts as nothing: rows are centered at each position.

Source  deviation: SimSiam, arXiv:2011.10566, Section 4; the ratio of traces is the participation ratio, an
        effective rank without eigenvalues, whose solvers wait for the host.
Bytes   At most `MAX_ROWS` tokens of this rank, at evenly spaced positions: a thousandth of a step.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 1024
COLLAPSED_STD = 0.1  # a mean cosine of 0.99 between images; encoders start at 0.4 to 0.8
COLLAPSED_RANK = 1.2  # encoders start at 2 to 9


@torch.no_grad()
def health(q_BTD: Tensor, k_BTD: Tensor, weight_BT: Tensor | None = None) -> dict[str, Tensor]:
    """The four numbers, on the device; none for a single image. Tokens of weight 0 are left out."""
    if len(q_BTD) < 2:
        return {}
    if weight_BT is None:
        weight_BT = q_BTD.new_ones(q_BTD.shape[:2], dtype=torch.float32)
    q, k, w = (sampled(x) for x in (q_BTD, k_BTD, weight_BT))
    q, k = (F.normalize(x.float(), dim=-1) * w[..., None] for x in (q, k))
    same_BT = (q * k).sum(-1)
    across_BT = (q * (k.sum(0) - k)).sum(-1)
    num_T = w.sum(0)
    pairs = (num_T * (num_T - 1)).sum().clamp(min=1)
    std, rank = spread(k, w)
    return {
        "positive_similarity": same_BT.sum() / w.sum().clamp(min=1),
        "negative_similarity": across_BT.sum() / pairs,
        "feature_std": std,
        "feature_rank": rank,
    }


def sampled(x: Tensor) -> Tensor:
    """The first images and evenly spaced positions of `[B, T, ...]`, `MAX_ROWS` tokens at most."""
    x = x[:MAX_ROWS]
    return x[:, :: -(-x.shape[0] * x.shape[1] // MAX_ROWS)]


def spread(unit_BTD: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and effective rank over images at each position, of rows of norm 1, or 0 at weight 0."""
    num_T = weight_BT.sum(0)
    mean_TD = unit_BTD.sum(0) / num_T.clamp(min=1)[:, None]
    rows_RD = ((unit_BTD - mean_TD) * weight_BT[..., None]).flatten(0, 1)
    D = rows_RD.shape[1]
    freedom = (num_T - 1).clamp(min=0).sum().clamp(min=1)
    covariance_DD = rows_RD.T @ rows_RD / freedom
    variance_D = covariance_DD.diagonal()
    rank = variance_D.sum().square() / covariance_DD.square().sum().clamp(min=1e-30)
    return (variance_D * D).sqrt().mean(), rank


def collapse(row: Mapping[str, float], remedies: str) -> str | None:
    """A line for a row whose features no longer tell images apart; None for any other."""
    std, rank = row.get("feature_std"), row.get("feature_rank")
    if std is None or rank is None or not (std < COLLAPSED_STD or rank < COLLAPSED_RANK):
        return None
    found = f"feature_std {std:.3f} (1 is healthy), feature_rank {rank:.1f}"
    return f"the features of different images are alike: {found}; {remedies}"
