"""The health numbers against plain formulas and on features of a known kind."""

import pytest
import torch
import torch.nn.functional as F

from fastmim.methods.health import MAX_ROWS, collapse, health


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_similarities_and_spread_equal_loops_in_fp64():
    q, k = random(5, 6, 12), random(5, 6, 12, seed=1)
    weight = (random(5, 6, seed=2) > -0.5).float()
    row = {name: value.item() for name, value in health(q, k, weight).items()}
    q, k = q.double(), k.double()
    there = [(b, t) for b in range(5) for t in range(6) if weight[b, t]]
    same = [F.cosine_similarity(q[at], k[at], dim=0) for at in there]
    across = [
        F.cosine_similarity(q[b, t], k[c, t], dim=0)
        for b, t in there
        for c in range(5)
        if c != b and weight[c, t]
    ]
    assert row["positive_similarity"] == pytest.approx(torch.stack(same).mean().item(), abs=1e-6)
    assert row["negative_similarity"] == pytest.approx(torch.stack(across).mean().item(), abs=1e-6)
    covariance, freedom = torch.zeros(12, 12, dtype=torch.float64), 0
    for t in range(6):
        rows = F.normalize(k[weight[:, t] > 0, t], dim=-1)
        covariance += (len(rows) - 1) * rows.T.cov(correction=1) if len(rows) > 1 else 0
        freedom += max(0, len(rows) - 1)
    covariance /= freedom
    values = torch.linalg.eigvalsh(covariance)
    assert row["feature_std"] == pytest.approx((covariance.diagonal() * 12).sqrt().mean().item(), rel=1e-5)
    assert row["feature_rank"] == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-4)


def test_random_directions_are_healthy():
    row = health(random(64, 8, 32), random(64, 8, 32, seed=1))
    assert row["feature_std"] == pytest.approx(1.0, abs=0.05)
    assert 25 < row["feature_rank"] <= 32
    assert abs(row["negative_similarity"]) < 0.05
    assert collapse({k: v.item() for k, v in row.items()}, "") is None


def test_what_depends_on_the_position_alone_counts_as_collapse():
    k = random(8, 32).expand(16, 8, 32)
    row = {name: v.item() for name, v in health(k, k).items()}
    assert row["feature_std"] < 1e-3
    assert row["negative_similarity"] == pytest.approx(1.0)
    assert "feature_std 0.000 (1 is healthy)" in collapse(row, "try this") and "try this" in collapse(
        row, "try this"
    )


def test_one_direction_counts_as_collapse_however_far_it_reaches():
    sign = torch.where(random(16, 8, 1) > 0, 1.0, -1.0)
    k = sign * torch.ones(32)
    row = {name: v.item() for name, v in health(k, k).items()}
    assert row["feature_std"] > 0.9 and row["feature_rank"] == pytest.approx(1.0, rel=1e-3)
    assert collapse(row, "") is not None


def test_few_tokens_stand_for_many():
    """The numbers of more tokens than are looked at are those of the first images at even positions."""
    B, T = 20, 4 * MAX_ROWS // 20
    q, k = random(B, T, 4), random(B, T, 4, seed=1)
    seen = slice(None, None, 4)
    for name, value in health(q[:, seen], k[:, seen]).items():
        torch.testing.assert_close(health(q, k)[name], value)
    many = health(random(MAX_ROWS + 50, 1, 4), random(MAX_ROWS + 50, 1, 4, seed=1))
    few = health(random(MAX_ROWS + 50, 1, 4)[:MAX_ROWS], random(MAX_ROWS + 50, 1, 4, seed=1)[:MAX_ROWS])
    assert torch.equal(many["feature_std"], few["feature_std"])


def test_a_single_image_and_a_method_without_features_have_none():
    assert health(random(1, 4, 8), random(1, 4, 8)) == {}
    assert collapse({"loss": 1.0}, "") is None


def test_bf16_is_measured_in_fp32_and_no_graph_is_kept():
    q = random(8, 4, 16).bfloat16().requires_grad_()
    row = health(q, q)
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in row.values())
