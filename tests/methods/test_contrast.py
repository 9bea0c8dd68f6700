"""InfoNCE over tokens: random, scaled and position-only features; absent keys; many ranks as one."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastmim.engine.ranks import Ranks
from fastmim.methods.contrast import Keys, compare_tokens, cosine, info_nce_range, token_info_nce

from .test_cmae import make_cmae, make_pair

ONE = Ranks.single()


def mean_loss(q: Tensor, k: Tensor, negatives: str, temperature: float = 0.2) -> float:
    return token_info_nce(q, Keys(k), ONE, negatives=negatives, temperature=temperature).loss_BT.mean().item()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("negatives", "candidates"), [("batch", 32), ("image", 9), ("all", 288)])
def test_random_features_give_the_log_of_the_number_of_candidates(negatives, candidates):
    q, k = random(32, 9, 1000), random(32, 9, 1000, seed=1)
    scored = token_info_nce(q, Keys(k), ONE, negatives=negatives, temperature=0.2)
    assert scored.loss_BT.shape == (32, 9)
    assert torch.equal(scored.num_BT, torch.full((32, 9), float(candidates)))
    assert scored.loss_BT.mean().item() == pytest.approx(math.log(candidates), abs=0.05)


@pytest.mark.parametrize("negatives", ["batch", "image", "all"])
def test_positive_scale_does_not_matter(negatives):
    q, k = random(4, 5, 16), random(4, 5, 16, seed=1)
    scale = random(4, 5, 1, seed=2).exp()
    assert mean_loss(scale * q, k / scale, negatives) == pytest.approx(mean_loss(q, k, negatives), rel=1e-5)
    assert mean_loss(-q, k, negatives) != pytest.approx(mean_loss(q, k, negatives), rel=1e-2)


@pytest.mark.parametrize("negatives", ["batch", "image", "all"])
def test_a_joint_order_of_the_images_does_not_matter(negatives):
    q, k = random(6, 5, 16), random(6, 5, 16, seed=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert mean_loss(q[order], k[order], negatives) == pytest.approx(mean_loss(q, k, negatives), rel=1e-5)
    assert mean_loss(q[order], k, negatives) != pytest.approx(mean_loss(q, k, negatives), rel=1e-3)


def test_positions_alone_solve_negatives_of_the_image_and_not_those_of_the_batch():
    """196 keys on a simplex, the same for every image: the floor, 0.82, against log 196 = 5.28."""
    corner = torch.eye(196) - 1 / 196
    q = corner.expand(8, 196, 196)
    assert mean_loss(q, q, "image") == pytest.approx(0.82, abs=0.01)
    assert mean_loss(q, q, "batch") == pytest.approx(math.log(8), abs=1e-5)
    assert mean_loss(q, q, "all") == pytest.approx(0.82 + math.log(8), abs=0.01)


def test_chance_and_floor():
    chance, floor = info_nce_range(torch.tensor([1024.0, 196.0, 1.0, 2.0]), 0.2)
    assert chance.tolist() == pytest.approx([6.93, 5.28, 0.0, 0.693], abs=0.005)
    assert floor.tolist() == pytest.approx([2.06, 0.82, 0.0, math.log(1 + math.exp(-10))], abs=0.005)


@pytest.mark.parametrize("n", [2, 5, 17])
def test_a_simplex_reaches_the_floor(n):
    corner = (torch.eye(n) - 1 / n).expand(1, n, n)
    floor = info_nce_range(torch.tensor(float(n)), 0.2)[1].item()
    assert mean_loss(corner, corner, "image") == pytest.approx(floor, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("negatives", ["batch", "image", "all"])
def test_absent_keys_are_no_candidates(negatives):
    """Loss and gradient against a list of those that are there, in fp64."""
    B, T = 5, 7
    present = random(B, T, seed=5) > -0.3
    present[:, 3], present[1] = False, False  # a position without keys, an image without keys
    q, k = random(B, T, 16).requires_grad_(), random(B, T, 16, seed=1) * present[..., None]
    scored = token_info_nce(q, Keys(k, present.float()), ONE, negatives=negatives, temperature=0.2)
    loss = scored.loss_BT[present].sum()
    assert scored.loss_BT.isfinite().all()
    (grad,) = torch.autograd.grad(loss, q)
    wide, expected = q.detach().double().requires_grad_(), 0
    for b, t in present.nonzero().tolist():
        at = {"batch": [(g, t) for g in range(B)], "image": [(b, s) for s in range(T)]}
        at["all"] = list(itertools.product(range(B), range(T)))
        there = [place for place in at[negatives] if present[place]]
        assert scored.num_BT[b, t] == len(there)
        sims = torch.stack([torch.cosine_similarity(wide[b, t], k[p].double(), dim=0) for p in there]) / 0.2
        expected = expected + sims.logsumexp(0) - sims[there.index((b, t))]
    (oracle,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), oracle, rtol=1e-4, atol=1e-5)
    assert not grad[~present].any()


# --- CutMix: another key is the positive, the candidates stay ----------------------------------------------


def test_the_two_keys_of_a_pair_stay_candidates_when_both_queries_have_one_positive():
    """Both patches are image 1's. With its key twice in the sum the loss would be log 2, without gradient."""
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    q = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]], requires_grad=True)
    keys = Keys(k, foreign_BT=torch.tensor([[True], [False]]))
    loss_BT = token_info_nce(q, keys, ONE, negatives="batch", temperature=0.5).loss_BT
    expected = [math.log1p(math.exp(1 / 0.5)), math.log1p(math.exp((0.6 - 0.8) / 0.5))]
    assert loss_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    loss_BT.sum().backward()
    assert (q.grad.norm(dim=-1) > 0.1).all()


@pytest.mark.parametrize("negatives", ["batch", "all"])
def test_queries_at_their_positives_reach_the_floor_under_cutmix(negatives):
    k = torch.eye(8)[:, None]
    q = k.clone()
    q[0] = k[1]
    keys = Keys(k, foreign_BT=torch.arange(8)[:, None] == 0)
    loss_BT = token_info_nce(q, keys, ONE, negatives=negatives, temperature=0.2).loss_BT
    floor = math.log1p(7 * math.exp(-1 / 0.2))  # of orthogonal keys: 0.046
    assert loss_BT[:, 0].tolist() == pytest.approx([floor] * 8, abs=1e-6)


def test_among_the_positions_of_a_mixed_image_each_has_one_key():
    """The keys of image 0 but at position 1, which it has from image 1."""
    k = torch.eye(8).view(2, 4, 8)
    foreign = torch.zeros(2, 4, dtype=torch.bool)
    foreign[0, 1] = True
    q = k.clone()
    q[0, 1] = k[1, 1]
    loss_BT = token_info_nce(q, Keys(k, foreign_BT=foreign), ONE, negatives="image", temperature=0.2).loss_BT
    floor = math.log1p(3 * math.exp(-1 / 0.2))
    assert loss_BT.flatten().tolist() == pytest.approx([floor] * 8, abs=1e-6)


def test_byol_lies_between_0_and_4_and_negative_cosine_between_minus_1_and_1():
    q = random(3, 5, 8)
    ends = {}
    for distance in ("byol", "negative_cosine"):
        options = {"distance": distance, "negatives": "batch", "temperature": 0.2, "scale": 1.0}
        ends[distance] = [
            compare_tokens(q, Keys(k), ONE, None, **options) for k in (q * 3, -q, random(3, 5, 8, seed=1))
        ]
    assert [loss.item() for loss, _ in ends["byol"][:2]] == pytest.approx([0, 4], abs=1e-5)
    assert [loss.item() for loss, _ in ends["negative_cosine"][:2]] == pytest.approx([-1, 1], abs=1e-5)
    assert 0 < ends["byol"][2][0] < 4
    assert [m["loss_chance"] for _, m in ends["byol"]] == [2.0] * 3
    assert ends["negative_cosine"][0][1]["loss_floor"] == -1


def test_a_row_of_zeros_has_cosine_zero_and_no_gradient():
    q = torch.zeros(1, 1, 4, requires_grad=True)
    cosine(q, torch.ones(1, 1, 4)).sum().backward()
    assert cosine(q, torch.ones(1, 1, 4)) == 0 and q.grad.isfinite().all()


# --- ranks ----------------------------------------------------------------------------------------------


class TwoPasses:
    """Ranks in one process: first each leaves what it would gather, then each gets what all have left."""

    def __init__(self, world: int):
        self.left: list[list[Tensor]] = [[] for _ in range(world)]

    def rank(self, rank: int, *, leave: bool):
        return type("Rank", (), {"rank": rank, "world": len(self.left), "gather": self.gather(rank, leave)})()

    def gather(self, rank: int, leave: bool):
        calls = itertools.count()

        def gather(_, x: Tensor) -> Tensor:
            if leave:
                self.left[rank].append(x.detach().clone())
                return torch.cat([x.detach()] * len(self.left))
            call = next(calls)
            assert torch.equal(self.left[rank][call], x)
            return torch.cat([calls_of_rank[call] for calls_of_rank in self.left])

        return gather


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negatives": "all"},
        {"negatives": "image"},
        {"compare": "cls"},
        {"positions": "masked", "loss": "byol"},
        {"symmetric": True, "cutmix": True},
        {"cutmix": True, "negatives": "all"},
        {"mask_token": False, "t2": "independent", "compare": "patch+cls"},
        {"mask_token": False, "t2": "independent", "negatives": "image"},
        {"mask_token": False, "t2": "independent", "negatives": "all"},
    ],
    ids=str,
)
def test_any_number_of_ranks_gives_the_loss_and_the_gradients_of_one(world, changes):
    cmae = make_cmae(**changes)
    batch = make_pair(8)
    out = cmae(batch)
    out.loss.backward()
    whole = {n: p.grad.clone() for n, p in cmae.named_parameters() if p.grad is not None}
    cmae.zero_grad()
    passes, size = TwoPasses(world), 8 // world
    mean = 0.0
    for leave in (True, False):
        for r in range(world):
            cmae.share(passes.rank(r, leave=leave))
            own = slice(r * size, (r + 1) * size)
            part = type(batch)(tuple(v[own] for v in batch.crops), batch.seeds_B[own], batch.ids_B[own], 0)
            result = cmae(part)
            if not leave:
                (result.loss / world).backward()
                mean += result.loss.item() / world
    assert mean == pytest.approx(out.loss.item(), rel=1e-5)
    grads = {n: p.grad for n, p in cmae.named_parameters() if p.grad is not None}
    assert grads.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(grads[name], whole[name], rtol=1e-3, atol=2e-5, msg=name)
