"""block_mask and its kin: against a law written out patch by patch, the kernel against the definition, and
what the papers' masks are known to look like."""

import math
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from fastmim_kernels import (
    block_mask,
    grid_mask,
    ibot_targets,
    sample_seeds,
    split_mask,
    split_patches,
    uniform_mask,
)
from fastmim_kernels.block_masks import (
    MAX_TRIES,
    _side,
    block_mask_reference,
    launch,
    launch_uniform,
    level_factors,
    side_factors,
    uniform_mask_reference,
)
from fastmim_kernels.philox import draw_uint32, philox_4x32

ASPECT = 0.3, 1 / 0.3
# grid, target, min_area, max_area, aspect, patience (0: exact), tries, stream
CASES = [
    ((14, 14), 75, 16, 196, ASPECT, 0, 5, 0),  # out of tries: filled from the front
    ((14, 14), 75, 16, 196, ASPECT, 10, MAX_TRIES, 0),  # BEiT; both of the simulations known
    ((14, 14), 120, 16, 196, ASPECT, 10, MAX_TRIES, 1),
    ((14, 14), 98, 16, 98, ASPECT, 0, MAX_TRIES, 0),  # CAE
    ((8, 8), 24, 16, 64, ASPECT, 0, MAX_TRIES, 2**31 - 1),  # CIFAR
    ((12, 12), 57.59765625, 16, 144, ASPECT, 10, MAX_TRIES, 0),  # iBOT: a target in steps of 1/256
    ((7, 7), 20.25, 4, 49, ASPECT, 10, MAX_TRIES, 3),
    ((16, 10), 60, 16, 20, (0.5, 3.0), 10, MAX_TRIES, 0),  # not square, a bound on each block, other aspects
    ((5, 7), 30, 1, 35, (1.0, 1.0), 0, MAX_TRIES, 0),  # one aspect, most patches
    ((2, 3), 3, 0, 6, ASPECT, 10, MAX_TRIES, 0),  # the smallest: blocks of one patch and of none
    ((64, 64), 1500, 256, 4096, ASPECT, 10, MAX_TRIES, 0),  # the most patches
    ((14, 14), 0, 16, 196, ASPECT, 0, MAX_TRIES, 0),
    ((14, 14), 0.75, 16, 196, ASPECT, 10, MAX_TRIES, 0),  # less than one patch
]


def make_keys(B, device):
    return sample_seeds(7, 3, torch.arange(B, device=device))


def make_targets(keys, target):
    return torch.full_like(keys, int(target * 256))


def law(words, grid, target, min_area, max_area, aspect, patience, tries):
    """The patches that one sample hides, a set: as in the papers, with cells, sets and library functions."""
    (H, W), (low, high), hidden, tried, gave_up = grid, aspect, set(), 0, False
    while len(hidden) < target and not gave_up:
        m, failed, placed = min(target - len(hidden), max_area), 0, False
        while not placed and (patience == 0 or failed < patience) and tried < tries:
            u = [Fraction(word, 2**32) for word in words[4 * tried : 4 * tried + 4]]
            tried += 1
            area = float(min_area + u[0] * (Fraction(m) - min_area))
            x = (math.floor(u[1] * 4096) + 0.5) / 4096
            a = math.exp(math.log(low) + x * (math.log(high) - math.log(low)))
            h, w = round(math.sqrt(area * a)), round(math.sqrt(area / a))
            block = set()
            if h < H and w < W:
                top, left = math.floor(u[2] * (H - h + 1)), math.floor(u[3] * (W - w + 1))
                block = {(y, x) for y in range(top, top + h) for x in range(left, left + w)}
            if 0 < len(block - hidden) <= m:
                hidden |= block
                placed = True
            else:
                failed += 1
        gave_up = not placed
    if patience == 0:  # only when out of tries
        free = [(y, x) for y in range(H) for x in range(W) if (y, x) not in hidden]
        hidden |= set(free[: int(target) - len(hidden)])
    return {y * W + x for y, x in hidden}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_is_the_law(case, device):
    """... of which it differs in the last bits of the sides, before they are rounded to whole patches."""
    grid, target, *rest, tries, stream = case
    keys = make_keys(25, device)
    masks = block_mask_reference(keys, make_targets(keys, target), grid, *rest, tries, stream)
    assert masks.shape == (25, grid[0] * grid[1])
    words = draw_uint32(keys, 4 * 2048, stream).tolist()  # more than any of these takes
    for mask, w in zip(masks.tolist(), words, strict=True):
        assert {n for n, hidden in enumerate(mask) if hidden} == law(w, grid, target, *rest, min(tries, 2048))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_definition(case, device):
    grid, target, *rest = case
    keys = make_keys(3 if device == "cpu" else 1000, device)  # the interpreter takes its time
    targets = make_targets(keys, target)
    expected = block_mask_reference(keys, targets, grid, *rest)
    assert torch.equal(launch(keys, targets, 0, grid, *rest), expected)
    if target == int(target):
        assert torch.equal(launch(keys, None, int(target) << 8, grid, *rest), expected)


def test_every_sample_has_its_own_target(device):
    keys = make_keys(4, device)
    targets = torch.tensor([0.0, 30.7, 75.25, 98.0], dtype=torch.float64, device=device)
    masks = block_mask(keys, (14, 14), targets)
    steps_B = (targets * 256).long()
    gapped = torch.stack([steps_B, steps_B + 999], 1)[:, 0]
    launched = launch(keys, gapped, 0, (14, 14), 16, 196, ASPECT, 10, MAX_TRIES, 0)
    assert torch.equal(launched, masks)
    for i, target in enumerate(targets.tolist()):
        words = draw_uint32(keys[i : i + 1], 4 * 512, 0)[0].tolist()
        steps = math.floor(target * 256) / 256
        expected = law(words, (14, 14), steps, 16, 196, ASPECT, 10, 512)
        assert masks[i].nonzero().flatten().tolist() == sorted(expected)


def test_a_mask_is_the_same_in_any_batch_order_and_rank(device):
    keys = make_keys(40, device)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    for settings in ({}, {"exact": True}, {"min_area": 4, "stream": 5}):
        masks = block_mask(keys, (14, 14), 75, **settings)
        for part in (slice(0, 7), slice(13, 14), slice(1, None, 2)):  # a prefix, one, every second
            assert torch.equal(block_mask(keys[part], (14, 14), 75, **settings), masks[part])
        assert torch.equal(block_mask(keys[order], (14, 14), 75, **settings), masks[order])
    rest = (14, 14), 16, 196, ASPECT, 10, MAX_TRIES, 0
    assert torch.equal(launch(keys[1::13], None, 75 << 8, *rest), block_mask(keys, (14, 14), 75)[1::13])
    counts = torch.arange(40, device=device)
    uniform = uniform_mask(keys, 196, counts)
    assert torch.equal(uniform_mask(keys[order], 196, counts[order]), uniform[order])
    assert torch.equal(launch_uniform(keys[1::13], counts[1::13], 196, 0), uniform[1::13])
    targets = ibot_targets(keys, 196)
    assert torch.equal(ibot_targets(keys[order], 196), targets[order])


@pytest.mark.parametrize(
    ("num_hidden", "mean", "exactly", "least"), [(75, 74.5, 0.67, 64), (120, 119.5, 0.70, 105)]
)
def test_beits_counts_are_those_of_its_own_code(num_hidden, mean, exactly, least, device):
    count = block_mask(make_keys(8000, device), (14, 14), num_hidden).sum(1)
    assert count.max() == num_hidden and least - 4 <= count.min() < num_hidden - 5
    assert abs(count.double().mean() - mean) < 0.06  # of which 0.05 is the rounding of the known figure
    assert abs((count == num_hidden).double().mean() - exactly) < 0.005 + 3 * (0.7 * 0.3 / 8000) ** 0.5


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (12, 12), (7, 7), (3, 2), (16, 10), (24, 24)])
def test_exact_masks_are_exact_and_split_into_fixed_sizes(grid, device):
    N = grid[0] * grid[1]
    for L in {0, 1, N // 2, 3 * N // 4} | ({N} if N < 50 else set()):
        mask = block_mask(make_keys(50, device), grid, L, exact=True)
        assert (mask.sum(1) == L).all()
        seen, hidden = split_mask(mask, L)
        assert seen.shape == (50, N - L) and hidden.shape == (50, L)
        everything = torch.cat([seen, hidden], 1).sort(1).values
        assert torch.equal(everything, torch.arange(N, device=device).expand(50, N))
        assert mask.gather(1, hidden).all() and not mask.gather(1, seen).any()


def test_blocks_are_blocks_and_lie_anywhere(device):
    """Far more neighbors of a hidden patch are hidden than at random, and no side or corner is preferred."""
    masks = block_mask(make_keys(6000, device), (14, 14), 75).view(-1, 14, 14).double()
    both = (masks[:, :, 1:] * masks[:, :, :-1]).mean()
    assert both > 1.8 * masks.mean() ** 2
    rate = masks.mean(0)
    assert rate[0, 0] < 0.2 < 0.45 < rate[6:8, 6:8].min()  # the middle is in more blocks than a corner
    for mirrored in (rate.flip(0), rate.flip(1), rate.T):  # the law has these symmetries
        assert (rate - mirrored).abs().max() < 0.04  # deviation of a difference: below 0.009


def test_min_and_max_area_bound_the_blocks(device):
    keys = make_keys(200, device)
    for max_area in (1, 9):  # one try takes one block, at most
        one = block_mask_reference(
            keys, make_targets(keys, 75), (14, 14), 0, max_area, (0.5, 2.0), 10, 1, 0
        ).sum(1)
        assert 0 < one.max() <= max_area
    big = block_mask_reference(keys, make_targets(keys, 75), (14, 14), 60, 196, (0.8, 1.25), 10, 1, 0).sum(1)
    assert big[big > 0].min() >= 54 and (big > 0).any()


def test_ibots_targets_and_masks(device):
    keys = make_keys(8000, device)
    targets = ibot_targets(keys, 196)
    on = targets > 0
    assert abs(on.double().mean() - 0.5) < 4 * (0.25 / 8000) ** 0.5
    ratio = targets[on] / 196
    assert 0.1 - 1e-4 <= ratio.min() < 0.101 and 0.499 < ratio.max() < 0.5
    for q in (0.25, 0.5, 0.75):  # uniform in between
        assert abs(ratio.quantile(q) - (0.1 + 0.4 * q)) < 0.012
    masks = block_mask(keys, (14, 14), targets, min_area=16)
    assert (masks.sum(1) <= targets).all()
    hidden = masks.double().mean(1)
    assert abs(hidden.mean() - 0.148) < 0.0075  # deviation 0.16: four of its mean's 0.0018
    assert abs(hidden[on].mean() - 0.292) < 0.0075
    rand = uniform_mask(keys, 196, targets.long())
    assert torch.equal(rand.sum(1), targets.long())


def test_ibots_targets_are_their_words(device):
    """Integers, from the first stream that no mask can have; not the words of the mask's own."""
    for stream in (0, 9):
        for key, target in zip(
            make_keys(20, device).tolist(),
            ibot_targets(make_keys(20, device), 49, stream=stream),
            strict=True,
        ):
            words = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
            coin, word, *_ = philox_4x32(words, (0, 2**31 + stream, 0, 0))
            high = 49 * (Fraction(1, 10) + Fraction(4, 10) * Fraction(word, 2**32))
            assert target.item() == (0 if coin >= 2**31 else math.floor(high * 256) / 256)


@pytest.mark.parametrize("N", [0, 1, 36, 196, 4096])
def test_uniform_masks_are_those_of_split_patches(N, device):
    keys = make_keys(3, device)
    for L in {0, N // 3, N}:
        counts = torch.full((3,), L, device=device)
        expected = torch.zeros(3, N, dtype=torch.bool, device=device)
        expected.scatter_(1, split_patches(keys, N, N - L, stream=4)[1], True)
        assert torch.equal(uniform_mask(keys, N, counts, stream=4), expected)
        assert torch.equal(launch_uniform(keys, counts, N, 4), expected)
        assert torch.equal(uniform_mask_reference(keys, counts, N, 4), expected)
    counts = torch.tensor([N, 0, N // 2], device=device)  # one of its own for each
    assert torch.equal(launch_uniform(keys, counts, N, 4).sum(1), counts)
    gapped = torch.stack([counts, counts], 1)[:, 0]
    assert torch.equal(launch_uniform(keys, gapped, N, 4), uniform_mask_reference(keys, counts, N, 4))


def test_complementary_and_independent_pairs(device):
    keys = make_keys(4000, device)
    pair = block_mask(keys, (14, 14), 98, exact=True), ~block_mask(keys, (14, 14), 98, exact=True)
    assert (pair[0] ^ pair[1]).all() and (pair[1].sum(1) == 98).all()  # complementary: one draw, negated
    first, second = (block_mask(keys, (14, 14), 75, stream=s).double() for s in (0, 1))
    centered = (first - first.mean(0)) * (second - second.mean(0))
    assert (centered.mean(0) / 0.25).abs().mean() < 0.02  # deviation of one mean: 0.016
    assert not torch.equal(ibot_targets(keys, 196), ibot_targets(keys, 196, stream=1))


def test_grid_mask_keeps_one_of_four(device):
    mask = grid_mask((4, 6), device=device)
    assert mask.logical_not().nonzero().flatten().tolist() == [0, 2, 4, 12, 14, 16]
    seen, hidden = split_mask(mask.expand(2, -1), 18)
    assert seen.tolist() == [[0, 2, 4, 12, 14, 16]] * 2 and hidden.shape == (2, 18)
    assert grid_mask((14, 14)).sum() == 147
    for bad in ((7, 8), (8, 7), (0, 4)):
        with pytest.raises(ValueError, match="want an even grid"):
            grid_mask(bad)


def test_the_levels_are_log_uniform():
    """Half the product of both sides' factors is the area's unit; their ratio the aspect, at mid-level."""
    tall, wide = level_factors(0.3, 1 / 0.3)
    step = (math.log(1 / 0.3) - math.log(0.3)) / 4096
    expected = torch.exp(math.log(0.3) + step * (torch.arange(4096, dtype=torch.float64) + 0.5))
    torch.testing.assert_close(tall / wide, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(tall * wide, torch.full_like(tall, 4 * 2.0**-40), rtol=1e-14, atol=0)


@triton.jit
def _sides_of(area_ptr, word_ptr, out_ptr, FACTORS: tl.constexpr):
    i = tl.program_id(0)
    root = tl.sqrt(tl.load(area_ptr + i).to(tl.float64))
    tl.store(out_ptr + i, _side(root, tl.load(word_ptr + i).to(tl.uint32), FACTORS, 12))


@pytest.mark.parametrize("side", [0, 1])
def test_the_kernel_rounds_as_the_definition_where_a_bit_decides(side, device):
    """Areas at which a side is half a patch more than whole, and their neighbors a 2**-40th away."""
    level = torch.arange(0, 4096, 97, device=device)
    factor = level_factors(*ASPECT)[side].to(device)[level]
    half = torch.arange(len(level), device=device) % 12 * 2 + 1
    area = ((half / factor) ** 2).round().long()[:, None] + torch.arange(-1, 2, device=device)
    expected = (area.double().sqrt() * factor[:, None]).long() + 1 >> 1
    assert (expected[:, 0] < expected[:, 2]).any()  # a bit decides
    out = torch.full_like(area, -1)
    word = (level << 20)[:, None].expand_as(area).contiguous()
    _sides_of[(area.numel(),)](area.contiguous(), word, out, FACTORS=side_factors(*ASPECT)[side])
    assert torch.equal(out, expected)


def test_no_samples(device):
    empty = make_keys(0, device)
    none = torch.empty(0, dtype=torch.float64, device=device)
    assert block_mask(empty, (14, 14), 75).shape == (0, 196)
    assert block_mask(empty, (14, 14), none).shape == (0, 196)
    assert launch(empty, None, 75 << 8, (14, 14), 16, 196, ASPECT, 10, MAX_TRIES, 0).shape == (0, 196)
    assert uniform_mask(empty, 196, none.long()).shape == (0, 196)
    assert launch_uniform(empty, none.long(), 196, 0).shape == (0, 196)
    assert ibot_targets(empty, 196).shape == (0,)


def test_ops_are_registered_right(device):
    keys = make_keys(3, device)
    settings = 6, 4, 2, 24, *ASPECT, 10, MAX_TRIES, 0
    torch.library.opcheck(torch.ops.fastmim.block_mask.default, (keys, None, 10 << 8, *settings))
    torch.library.opcheck(torch.ops.fastmim.block_mask.default, (keys, make_targets(keys, 8.5), 0, *settings))
    torch.library.opcheck(torch.ops.fastmim.uniform_mask.default, (keys, make_targets(keys, 0.1), 36, 1))


def test_compiles_to_one_graph(device):
    keys = make_keys(3, device)

    def masks(k):
        exact = block_mask(k, (6, 6), 10, exact=True, min_area=4)
        targets = ibot_targets(k, 36)
        return [*split_mask(exact, 10), ~block_mask(k, (6, 6), targets), ~uniform_mask(k, 36, targets.long())]

    for actual, expected in zip(torch.compile(masks, fullgraph=True)(keys), masks(keys), strict=True):
        assert torch.equal(actual, expected)


def test_rejects_what_it_cannot_do(device):
    keys = make_keys(2, device)
    for grid in ((1, 14), (14, 1), (65, 64)):
        with pytest.raises(ValueError, match="want a grid of 2 x 2 or more"):
            block_mask(keys, grid, 1)
    for bad in (-1, 197):
        with pytest.raises(ValueError, match="want 0 <= num_hidden <= 196"):
            block_mask(keys, (14, 14), bad)
    for areas in ({"min_area": -1}, {"min_area": 4097}, {"max_area": 0}, {"max_area": 4097}):
        with pytest.raises(ValueError, match="want 0 <= min_area"):
            block_mask(keys, (14, 14), 75, **areas)
    for aspect in ((0.0, 1.0), (2.0, 1.0), (0.5, 1e4), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="aspect"):
            block_mask(keys, (14, 14), 75, aspect=aspect)
    targets = torch.tensor([3.0, 4.0], dtype=torch.float64, device=device)
    for bad in (targets.float(), targets[:1], targets[:, None]):
        with pytest.raises(ValueError, match="want num_hidden torch.float64"):
            block_mask(keys, (14, 14), bad)
    with pytest.raises(ValueError, match="one device"):
        block_mask(keys, (14, 14), targets.to("meta"))
    with pytest.raises(ValueError, match="exact mask wants one"):
        block_mask(keys, (14, 14), targets, exact=True)
    with pytest.raises(ValueError, match="want num_hidden torch.int64"):
        uniform_mask(keys, 196, targets)
    with pytest.raises(ValueError, match="want 0 <= num_patches"):
        uniform_mask(keys, 4097, targets.long())
    for draw in (
        lambda k, s: block_mask(k, (14, 14), 75, stream=s),
        lambda k, s: uniform_mask(k, 196, targets.long(), stream=s),
        lambda k, s: ibot_targets(k, 196, stream=s),
    ):
        with pytest.raises(ValueError, match="stream"):
            draw(keys, -1)
        with pytest.raises(ValueError, match="seeds int64"):
            draw(keys.int(), 0)


@pytest.mark.parametrize("bad", [-0.5, 196.5, float("nan")])
def test_a_wrong_target_is_found_on_the_cpu(bad):
    keys, targets = make_keys(2, "cpu"), torch.tensor([3.0, bad], dtype=torch.float64)
    with pytest.raises(ValueError, match="want 0 <= num_hidden <= 196"):
        block_mask(keys, (14, 14), targets)
    if bad == bad:
        with pytest.raises(ValueError, match="want 0 <= num_hidden <= 196"):
            uniform_mask(keys, 196, torch.tensor([3, 197 if bad > 0 else -1]))
