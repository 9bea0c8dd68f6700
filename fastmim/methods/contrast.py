"""What compares the tokens of two branches: InfoNCE with three kinds of negatives, and the cosine alone.

    s(q, k)   = cos(q, k) / temperature                       norms and all that follows in fp32
    info_nce  = log Sum_j exp s(q_bt, k_j) - s(q_bt, k_bt)    Kong & Zhang, arXiv:2208.04164, Eq. 9-10
    byol      = 2 - 2 cos(q_bt, k_bt)                         of normalized vectors |q - k|^2
    chance    = log n for n candidates, if all similarities are equal
    floor     = log(1 + (n - 1) exp(-(n / (n - 1)) / temperature)), keys on a simplex

Candidates j  batch: the tokens at position t of all images on all ranks; image: all positions of image b;
              all: both. T positions, G images on all ranks: n = G, T, G T.
CutMix        Which key is the positive changes, and nothing else: where the patch of a query came from the
              partner of its image, it is the partner's key at that position. The candidates stay the keys of
              all images, each once. With `image` they are those of the mixed image, a key per position.
Absent keys   Where a token was dropped by the encoder there is no key. Its row is zero, so the kernel counts
              it as exp(0) = 1: with m of them, log Sum over the others = lse + log(1 - m exp(-lse)).
Limits        1 - m exp(-lse) is a difference in fp32: below a temperature of 0.1 it loses digits for queries
              that are unlike every key there is.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from fastmim_kernels import info_nce
from torch import Tensor

from fastmim.methods.base import AcrossRanks
from fastmim.models.cutmix import from_partners

Distance = Literal["info_nce", "byol", "negative_cosine"]
Negatives = Literal["batch", "image", "all"]
TINY = 1e-7  # what is left of a sum when all of it was absent: finite, and of weight zero


def compare_tokens(
    q_BTD: Tensor,
    keys: "Keys",
    ranks: AcrossRanks,
    weight_BT: Tensor | None,
    *,
    distance: Distance,
    negatives: Negatives,
    temperature: float,
    scale: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the tokens of weight 1, the same on any number of ranks once they average theirs.

    Beside it `loss_chance` and `loss_floor`, the values it moves between. `negatives`, `temperature` and
    `scale` are those of info_nce.
    """
    if distance == "info_nce":
        scored = token_info_nce(q_BTD, keys, ranks, negatives=negatives, temperature=temperature)
        chance_BT, floor_BT = info_nce_range(scored.num_BT, temperature)
        rows = [x * scale for x in (scored.loss_BT, chance_BT, floor_BT)]
    else:
        a, b = (2.0, 2.0) if distance == "byol" else (0.0, 1.0)
        loss_BT = a - b * cosine(q_BTD, keys.positive_BTD())
        rows = [loss_BT, torch.full_like(loss_BT, a), torch.full_like(loss_BT, a - b)]
    if weight_BT is None:
        loss, chance, floor = (x.mean() for x in rows)
    else:
        total = weight_BT.sum()
        if keys.present_BT is not None:  # then ranks differ in how many tokens they score
            total = ranks.gather(total[None]).sum() / ranks.world
        loss, chance, floor = ((x * weight_BT).sum() / total.clamp(min=1) for x in rows)
    return loss, {"loss_chance": chance.detach(), "loss_floor": floor.detach()}


@dataclass(frozen=True)
class Keys:
    """The keys of this rank's images, and which of them is the positive of a query."""

    k_BTD: Tensor
    present_BT: Tensor | None = None
    """1 where there is a key and 0 where its row is zero; None: everywhere"""
    foreign_BT: Tensor | None = None
    """True where the positive of q[b, t] is the key of image b's partner, not k[b, t]; None: nowhere"""

    def positive_BTD(self) -> Tensor:
        """The positive of each query."""
        return self.k_BTD if self.foreign_BT is None else from_partners(self.k_BTD, self.foreign_BT)

    def positive_present_BT(self) -> Tensor | None:
        """1 where a query has a positive."""
        if self.present_BT is None or self.foreign_BT is None:
            return self.present_BT
        return from_partners(self.present_BT, self.foreign_BT)

    def mixed(self) -> "Keys":
        """The keys of the mixed images: each position has that of the image its patch came from."""
        return Keys(self.positive_BTD(), self.positive_present_BT())

    def images_BT(self) -> Tensor | None:
        """The image of this rank, 0 to B - 1, that has the positive of each query; None: its own."""
        if self.foreign_BT is None:
            return None
        own_BT = torch.arange(len(self.k_BTD), device=self.k_BTD.device)[:, None].expand_as(self.foreign_BT)
        return from_partners(own_BT, self.foreign_BT)


@dataclass(frozen=True)
class Scored:
    """Of every token: its loss, and how many candidates it was compared with. Fp32 `[B, T]`."""

    loss_BT: Tensor
    num_BT: Tensor


def cosine(q_BTD: Tensor, k_BTD: Tensor) -> Tensor:
    """Fp32 cosine of each pair of rows; 0 for a row of zeros. Differentiable in both."""
    return (F.normalize(q_BTD.float(), dim=-1) * F.normalize(k_BTD.float(), dim=-1)).sum(-1)


def token_info_nce(
    q_BTD: Tensor, keys: Keys, ranks: AcrossRanks, *, negatives: Negatives, temperature: float
) -> Scored:
    """InfoNCE of every query against the keys of this rank's images and the others'. Differentiable in q."""
    B, T, _ = q_BTD.shape
    if negatives == "image":
        keys = keys.mixed()
        loss_TB, _ = info_nce(q_BTD.transpose(0, 1), keys.k_BTD.transpose(0, 1), temperature=temperature)
        loss_BT, num = loss_TB.T, T
    elif negatives == "batch":
        k_GTD = ranks.gather(keys.k_BTD)
        named = labeled(keys.images_BT(), ranks.rank * B)
        loss_BT, _ = info_nce(q_BTD, k_GTD, temperature=temperature, **named)
        num = len(k_GTD)
    else:
        k_MD = ranks.gather(keys.k_BTD).flatten(0, 1)
        image_BT = keys.images_BT()
        if image_BT is not None:
            image_BT = (image_BT * T + torch.arange(T, device=image_BT.device)).flatten()
        named = labeled(image_BT, ranks.rank * B * T)
        loss_M, _ = info_nce(q_BTD.flatten(0, 1), k_MD, temperature=temperature, **named)
        loss_BT, num = loss_M.view(B, T), len(k_MD)
    if keys.present_BT is None:
        return Scored(loss_BT, loss_BT.new_full((1, 1), num).expand(B, T))
    there_BT = candidates(keys.present_BT, ranks, negatives)
    positive_BT = cosine(q_BTD, keys.positive_BTD()) / temperature
    return Scored(without_absent(loss_BT, positive_BT, num - there_BT), there_BT)


def labeled(own: Tensor | None, offset: int) -> dict[str, Any]:
    """How info_nce is told of the positives: rows of this rank, which begin at `offset`, or each its own."""
    return {"label_offset": offset} if own is None else {"labels": own + offset}


def candidates(present_BT: Tensor, ranks: AcrossRanks, negatives: Negatives) -> Tensor:
    """How many of the candidates of each query have a key. `[B, T]`."""
    if negatives == "image":
        return present_BT.sum(1, keepdim=True).expand_as(present_BT)
    present_GT = ranks.gather(present_BT)
    num = present_GT.sum(0, keepdim=True) if negatives == "batch" else present_GT.sum()
    return num.expand_as(present_BT)


def without_absent(loss_BT: Tensor, positive_BT: Tensor, absent_BT: Tensor) -> Tensor:
    """The loss without the zero keys among its candidates, exp(0) each."""
    lse_BT = loss_BT + positive_BT  # the kernel's own is not differentiable
    share_BT = 1 - absent_BT * (-lse_BT).exp()
    return loss_BT + share_BT.clamp(min=TINY).log()


def info_nce_range(num: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss by chance, and its floor, with `num` candidates each. Two tensors of that shape."""
    others = (num - 1).clamp(min=0)
    floor = (others * torch.exp(-num / others.clamp(min=1) / temperature)).log1p()
    return num.clamp(min=1).log(), floor
