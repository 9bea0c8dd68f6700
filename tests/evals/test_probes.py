"""Nearest neighbors and ridge regression against plain formulas, and on features that say all or nothing."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from fastmim.evals.knn import knn
from fastmim.evals.ridge import accuracy, ridge, solve


def blobs(count, num_classes=5, width=12, spread=0.3, seed=0):
    """Features around one center for each class; equal seeds of centers for training and test."""
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(9))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=rng)
    return centers[labels] + spread * torch.randn(count, width, generator=rng), labels


def plain_knn(train, labels, test, truth, k):
    right = 0
    for x, label in zip(test.double(), truth.tolist(), strict=True):
        cosines = [float(x @ y / (x.norm() * y.norm())) for y in train.double()]
        votes = defaultdict(float)
        for j in sorted(range(len(cosines)), key=lambda j: -cosines[j])[:k]:
            votes[int(labels[j])] += math.exp(cosines[j] / 0.07)
        right += max(votes, key=votes.get) == label
    return right / len(test)


def test_knn_is_the_weighted_vote(monkeypatch):
    monkeypatch.setattr("fastmim.evals.knn.CHUNK", 1000)  # several chunks, the last one short
    train, labels = blobs(150, spread=2.0)
    test, truth = blobs(41, spread=2.0, seed=1)
    found = dict(knn(train, labels, test, truth, (1, 10, 100, 500)))
    assert list(found) == ["knn_1", "knn_10", "knn_100"]  # 500 neighbors there are not
    for k in (1, 10, 100):
        assert found[f"knn_{k}"] == pytest.approx(plain_knn(train, labels, test, truth, k))
    assert 0.3 < found["knn_10"] < 0.95


def test_neighbors_are_those_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    train, labels = blobs(400, spread=2.5)
    test, truth = blobs(200, spread=2.5, seed=1)
    found = dict(knn(train, labels, test, truth, (5, 20, 100)))
    for k in (5, 20, 100):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        theirs.fit(train.double().numpy(), labels.numpy())
        assert found[f"knn_{k}"] == pytest.approx(theirs.score(test.double().numpy(), truth.numpy()))


def test_ridge_is_that_of_scikit_learn():
    """Standardized features, one-hot labels without their mean, penalty lambda N."""
    from sklearn.linear_model import Ridge

    train, labels = blobs(120, spread=1.5)
    test, truth = blobs(300, spread=1.5, seed=1)
    x, mean, std = train.double().numpy(), train.double().numpy().mean(0), train.double().numpy().std(0)
    for value in (1e-3, 0.5):
        theirs = Ridge(alpha=value * len(x)).fit((x - mean) / std, np.eye(5)[labels.numpy()])
        right = theirs.predict((test.double().numpy() - mean) / std).argmax(1) == truth.numpy()
        assert dict(ridge(train, labels, test, truth, (value,)))["ridge"] == pytest.approx(right.mean())


@pytest.mark.parametrize("probe", [knn, ridge])
def test_clear_classes_are_read_and_noise_is_not(probe):
    train, labels = blobs(400)
    test, truth = blobs(300, seed=1)
    assert max(value for name, value in probe(train, labels, test, truth) if "lambda" not in name) > 0.98
    noise = torch.randn(400, 12)
    [first, *_] = probe(noise, labels, torch.randn(300, 12), truth)
    assert abs(first[1] - 0.2) < 0.1


def test_ridge_is_the_least_squares_solution():
    train, labels = blobs(60, spread=1.5)
    test, truth = blobs(50, spread=1.5, seed=1)
    for value in (0.0, 0.03, 7.0):
        [weights] = solve(train, labels, 5, [value])
        x = train.double().numpy()
        mean, std = x.mean(0), x.std(0)
        x, y = (x - mean) / std, np.eye(5)[labels.numpy()]
        # the penalty as rows of data
        rows = np.vstack([x, math.sqrt(value * len(x)) * np.eye(x.shape[1])])
        targets = np.vstack([y - y.mean(0), np.zeros((x.shape[1], 5))])
        w = np.linalg.lstsq(rows, targets, rcond=None)[0]
        np.testing.assert_allclose(weights[2].numpy(), w, atol=1e-9)
        predicted = ((test.double().numpy() - mean) / std @ w + y.mean(0)).argmax(1)
        assert accuracy(weights, test, truth) == (predicted == truth.numpy()).mean()


def test_ridge_chooses_on_training_images_alone():
    train, labels = blobs(200, width=150, spread=3.0)
    test, truth = blobs(200, width=150, spread=3.0, seed=1)
    chosen = dict(ridge(train, labels, test, truth))["ridge_lambda"]
    assert chosen == dict(ridge(train, labels, -test, truth))["ridge_lambda"]
    held = torch.arange(200) % 10 == 9
    scores = {
        value: accuracy(solve(train[~held], labels[~held], 5, [value])[0], train[held], labels[held])
        for value in (1e-6, 1e-3, 0.1, 1.0, 10.0)
    }
    assert scores[1e-6] < max(scores.values())  # there is something to choose
    assert chosen > 1e-6


def test_a_feature_that_never_changes_is_no_obstacle():
    train, labels = blobs(100)
    test, truth = blobs(100, seed=1)
    train[:, 3], test[:, 3] = 5.0, 5.0
    assert dict(ridge(train, labels, test, truth))["ridge"] > 0.95


@pytest.mark.parametrize("probe", [knn, ridge])
def test_shapes_that_do_not_fit_are_refused(probe):
    x, y = blobs(20)
    for arguments in [(x, y[:5], x, y), (x, y, x[:0], y[:0]), (x[0], y, x, y)]:
        with pytest.raises(ValueError, match="want features"):
            list(probe(*arguments))
    with pytest.raises(ValueError, match="at least as many training images as neighbors, got 20"):
        list(knn(x, y, x, y, (50,)))
