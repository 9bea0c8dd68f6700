"""Weighted nearest neighbors on frozen features: accuracy of a vote, without any training.

    vote of class c = sum over the k nearest of the training set with label c of exp(cos(x, x_j) / 0.07)

Source  Wu et al., arXiv:1805.01978; the protocol of DINO, arXiv:2104.14294.
Shapes  N training and M test features of width D.
"""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from fastmim.evals.features import check_labeled

TEMPERATURE = 0.07
CHUNK = 1 << 26  # similarities held at once


def knn(
    train_ND: Tensor, train_N: Tensor, test_MD: Tensor, test_M: Tensor, ks: Sequence[int] = (10, 20, 100, 200)
) -> Iterator[tuple[str, float]]:
    """("knn_K", accuracy in 0 to 1) for each K that the training set allows. Labels are int64 from 0.

    ValueError for shapes that do not fit, or where no K is at most N.
    """
    check_labeled(train_ND, train_N, "knn")
    check_labeled(test_MD, test_M, "knn")
    ks = [k for k in ks if 1 <= k <= len(train_ND)]
    if not ks:
        raise ValueError(f"knn: want at least as many training images as neighbors, got {len(train_ND)}")
    train_ND = F.normalize(train_ND.float(), dim=1)
    num_classes = int(max(train_N.max(), test_M.max())) + 1
    right = dict.fromkeys(ks, 0)
    rows = max(1, CHUNK // len(train_ND))
    for x_BD, label_B in zip(test_MD.split(rows), test_M.split(rows), strict=True):
        cosine_BK, nearest_BK = (F.normalize(x_BD.float(), dim=1) @ train_ND.T).topk(max(ks))
        weight_BK = ((cosine_BK - cosine_BK[:, :1]) / TEMPERATURE).exp()  # the nearest weighs 1
        voted_BK = train_N[nearest_BK]
        for k in ks:
            votes_BC = weight_BK.new_zeros(len(x_BD), num_classes)
            votes_BC.scatter_add_(1, voted_BK[:, :k], weight_BK[:, :k])
            right[k] += int((votes_BC.argmax(1) == label_B).sum())
    for k in ks:
        yield f"knn_{k}", right[k] / len(test_M)
