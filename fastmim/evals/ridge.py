"""Ridge regression onto one-hot labels: a linear probe with a closed form, in seconds.

    x^ = (x - mean) / std of the training set;    W = (X^T X^ + lambda N I)^-1 X^T (Y - mean Y)
    class = argmax of x^ W + mean Y

Lambda is the one that reads every tenth training image best, which are held out for it; W is then made anew
from all. Not the published linear probe, which trains for 90 epochs: for comparing runs with one another.

Shapes  N training and M test features of width D, C classes.
Dtypes  fp64.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.evals.features import check_labeled

LAMBDAS = tuple(10.0**e for e in range(-6, 2))
HELD_OUT = 10  # one image of so many


def ridge(
    train_ND: Tensor, train_N: Tensor, test_MD: Tensor, test_M: Tensor, lambdas: Sequence[float] = LAMBDAS
) -> Iterator[tuple[str, float]]:
    """("ridge", accuracy in 0 to 1) and ("ridge_lambda", what was chosen). Labels are int64 from 0.

    ValueError for shapes that do not fit.
    """
    check_labeled(train_ND, train_N, "ridge")
    check_labeled(test_MD, test_M, "ridge")
    num_classes = int(max(train_N.max(), test_M.max())) + 1
    held = torch.arange(len(train_ND), device=train_ND.device) % HELD_OUT == HELD_OUT - 1
    best = lambdas[0]
    if len(lambdas) > 1 and held.any():
        solved = solve(train_ND[~held], train_N[~held], num_classes, lambdas)
        scores = [accuracy(w, train_ND[held], train_N[held]) for w in solved]
        best = lambdas[scores.index(max(scores))]
    [weights] = solve(train_ND, train_N, num_classes, [best])
    yield "ridge", accuracy(weights, test_MD, test_M)
    yield "ridge_lambda", best


Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # mean and deviation [D], W [D, C], mean of Y [C]


def solve(x_ND: Tensor, labels_N: Tensor, num_classes: int, lambdas: Sequence[float]) -> list[Weights]:
    """The weights for each lambda, from one eigendecomposition."""
    x_ND = x_ND.double()
    mean_D, std_D = x_ND.mean(0), x_ND.std(0, correction=0).clamp(min=1e-12)
    x_ND = (x_ND - mean_D) / std_D
    y_NC = F.one_hot(labels_N, num_classes).double()
    middle_C = y_NC.mean(0)
    eigenvalues, basis = torch.linalg.eigh(x_ND.T @ x_ND)
    projected = basis.T @ (x_ND.T @ (y_NC - middle_C))
    scales = [(eigenvalues.clamp(min=0) + value * len(x_ND))[:, None] for value in lambdas]
    return [(mean_D, std_D, basis @ (projected / scale), middle_C) for scale in scales]


def accuracy(weights: Weights, x_MD: Tensor, labels_M: Tensor) -> float:
    mean_D, std_D, w_DC, middle_C = weights
    predicted_M = ((x_MD.double() - mean_D) / std_D @ w_DC + middle_C).argmax(1)
    return float((predicted_M == labels_M).double().mean())
