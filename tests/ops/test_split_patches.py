"""split_patches, by patches and by cells, and split_mask: kernel against definition, then the laws."""

import pytest
import torch
from fastmim_kernels import (
    num_hidden,
    num_seen,
    sample_seeds,
    split_mask,
    split_patches,
    split_patches_grouped,
)
from fastmim_kernels.philox import draw_uint32
from fastmim_kernels.split_patches import (
    _mask_kernel,
    launch,
    launch_mask,
    split_mask_reference,
    split_patches_grouped_reference,
    split_patches_reference,
    tile,
)

# 196 = 14x14 fills no power of two; 256 is one; 36 = 6x6; 147 is no multiple of four; 4096 is the most
SIZES = [(196, 49), (256, 64), (36, 9), (147, 146), (4096, 1024)]
EDGES = [(196, 0), (196, 196), (1, 1), (1, 0), (5, 2), (0, 0)]
# grid, unit, hidden cells: SimMIM at 224 and 192 pixels, CMAE, CIFAR with cells of 16, a grid that is not
# square in cells of 2, in cells of 3, one row, one cell, cells of one patch, the most patches, none and all
GROUPED = [
    ((14, 14), 2, 30),
    ((12, 12), 2, 22),
    ((14, 14), 2, 32),
    ((8, 8), 4, 2),
    ((16, 10), 2, 17),
    ((6, 9), 3, 2),
    ((1, 6), 1, 2),
    ((7, 7), 7, 1),
    ((7, 7), 1, 20),
    ((64, 64), 4, 100),
    ((4, 6), 2, 0),
    ((4, 6), 2, 6),
]


def make_keys(B, device):
    return sample_seeds(7, 3, torch.arange(B, device=device))


@pytest.mark.parametrize(("N", "K"), SIZES + EDGES)
@pytest.mark.parametrize("stream", [0, 1, 2**31 - 1])  # 1: Triton compiles it in
def test_kernel_is_the_definition(N, K, stream, device):
    keys = make_keys(3, device)
    for actual, expected in zip(
        launch(keys, N, K, stream), split_patches_reference(keys, N, K, stream), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("grid", "unit", "hidden"), GROUPED)
@pytest.mark.parametrize("stream", [0, 2**31 - 1])
def test_grouped_kernel_is_the_definition(grid, unit, hidden, stream, device):
    keys, (h, w) = make_keys(3, device), grid
    seen_cells = h * w // unit**2 - hidden
    expected = split_patches_grouped_reference(keys, grid, unit, seen_cells, stream)
    launched = launch(keys, h * w, seen_cells * unit**2, stream, w, unit)
    public = split_patches_grouped(keys, grid, unit, hidden, stream=stream)
    for results in (launched, public):
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("grid", "unit", "hidden"), GROUPED)
def test_patches_go_with_their_cells(grid, unit, hidden, device):
    """The cells with the smallest words are seen; a patch belongs to the cell that it lies in."""
    keys, (h, w) = make_keys(4, device), grid
    across = w // unit
    cells = (h // unit) * across
    seen, gone = split_patches_grouped(keys, grid, unit, hidden, stream=2)
    for row, rest, words in zip(
        seen.tolist(), gone.tolist(), draw_uint32(keys, cells, 2).tolist(), strict=True
    ):
        kept = set(sorted(range(cells), key=lambda c: (words[c], c))[: cells - hidden])
        inside = [(y // unit) * across + x // unit in kept for y in range(h) for x in range(w)]
        assert row == [n for n in range(h * w) if inside[n]]
        assert rest == [n for n in range(h * w) if not inside[n]]


def test_cells_of_one_patch_are_split_patches(device):
    keys = make_keys(4, device)
    for a, b in zip(split_patches_grouped(keys, (14, 14), 1, 147), split_patches(keys, 196, 49), strict=True):
        assert torch.equal(a, b)


def test_the_definition_is_the_k_smallest_words(device):
    keys = make_keys(4, device)
    seen, _ = split_patches(keys, 196, 49, stream=2)
    words = draw_uint32(keys, 196, 2).tolist()
    for row, w in zip(seen.tolist(), words, strict=True):
        assert row == sorted(sorted(range(196), key=lambda n: (w[n], n))[:49])


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_seen_and_hidden_partition_the_patches(N, K, device):
    seen, hidden = split_patches(make_keys(5, device), N, K)
    assert seen.shape == (5, K)
    assert hidden.shape == (5, N - K)
    everything = torch.cat([seen, hidden], 1).sort(1).values
    assert torch.equal(everything, torch.arange(N, device=device).expand(5, N))
    assert (seen.diff(dim=1) > 0).all()
    assert (hidden.diff(dim=1) > 0).all()


def test_a_mask_is_the_same_in_any_batch_and_order(device):
    keys = make_keys(40, device)
    seen, _ = split_patches(keys, 196, 49)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(split_patches(keys[order], 196, 49)[0], seen[order])
    assert torch.equal(split_patches(keys[13:14], 196, 49)[0], seen[13:14])
    for strided in (launch, split_patches_reference):
        assert torch.equal(strided(keys[1::3], 196, 49, 0)[0], seen[1::3])
    _, hidden = split_patches_grouped(keys, (14, 14), 2, 30)
    assert torch.equal(split_patches_grouped(keys[order], (14, 14), 2, 30)[1], hidden[order])
    for strided in (keys[13:14], keys[1::3]):
        rows = slice(13, 14) if len(strided) == 1 else slice(1, None, 3)
        assert torch.equal(split_patches_grouped(strided, (14, 14), 2, 30)[1], hidden[rows])
    assert torch.equal(launch(keys[1::3], 196, 76, 0, 14, 2)[1], hidden[1::3])


def as_masks(seen, N):
    return torch.zeros(len(seen), N, device=seen.device).scatter(1, seen, 1.0)


def test_every_patch_is_seen_equally_often(device):
    B, N, K = 8000, 196, 49
    masks = as_masks(split_patches(make_keys(B, device), N, K)[0], N)
    p = K / N
    chi2 = ((masks.sum(0) - B * p) ** 2 / (B * p * (1 - p))).sum() * (N - 1) / N  # K fixed: N - 1 free
    assert 130 < chi2 < 270  # 195 degrees of freedom: mean 195, deviation 20
    both = masks[:, :-1] * masks[:, 1:]  # neighbors: drawn without replacement
    assert abs(both.mean() - p * (K - 1) / (N - 1)) < 2e-3


def test_every_cell_is_hidden_equally_often(device):
    """SimMIM's law: 30 of 49 cells of 2 x 2 patches, uniformly, without replacement; CMAE's alike."""
    B, C, L = 8000, 49, 30
    _, hidden = split_patches_grouped(make_keys(B, device), (14, 14), 2, L)
    masks = as_masks(hidden, 196).view(B, 7, 2, 7, 2)
    assert torch.equal(masks.amin((2, 4)), masks.amax((2, 4)))  # whole cells
    cells, p = masks[:, :, 0, :, 0].flatten(1), L / C
    chi2 = ((cells.sum(0) - B * p) ** 2 / (B * p * (1 - p))).sum() * (C - 1) / C
    assert 16 < chi2 < 92  # 48 degrees of freedom: mean 48, deviation 9.8
    both = (cells[:, :-1] * cells[:, 1:]).mean()
    assert abs(both - p * (L - 1) / (C - 1)) < 4e-3


def test_complementary_and_independent_pairs(device):
    """Two masks of one sample: what one hides the other sees; or another stream."""
    keys, N, K = make_keys(6, device), 196, 49
    seen1, hidden1 = split_patches(keys, N, K)
    seen2, hidden2 = hidden1, seen1
    assert torch.equal(as_masks(seen1, N) + as_masks(seen2, N), torch.ones(6, N, device=device))
    assert torch.equal(as_masks(hidden1, N) * as_masks(hidden2, N), torch.zeros(6, N, device=device))
    other, _ = split_patches(keys, N, K, stream=1)
    assert (as_masks(seen1, N) * as_masks(other, N)).sum(1).lt(K).all()
    cells1, cells2 = (split_patches_grouped(keys, (14, 14), 2, 30, stream=s)[1] for s in (0, 1))
    assert (as_masks(cells1, N) * as_masks(cells2, N)).sum(1).lt(120).all()


def test_streams_are_independent(device):
    keys, N, K = make_keys(4000, device), 196, 49
    first, second = (as_masks(split_patches(keys, N, K, stream=s)[0], N) for s in (0, 1))
    overlap = (first * second).sum(1)  # hypergeometric: mean K * K / N = 12.25, variance 6.9
    assert abs(overlap.mean() - 12.25) < 4 * (6.93 / 4000) ** 0.5
    assert 6 < overlap.var() < 8


def test_num_seen_is_maes_floating_point_rule():
    table = [num_seen(196, r / 10) for r in range(1, 10)]
    assert table == [176, 156, 137, 117, 98, 78, 58, 39, 19]
    assert num_seen(196, 0.75) == 49
    assert num_seen(196, 0) == 196
    for bad in (1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="mask_ratio"):
            num_seen(196, bad)
    with pytest.raises(ValueError, match="leaves none of 4"):
        num_seen(4, 0.9)


def test_num_hidden_is_simmims_floating_point_rule():
    assert num_hidden(49, 0.6) == 30  # 224 pixels in cells of 32
    assert num_hidden(36, 0.6) == 22  # 192
    assert num_hidden(49, 0) == 0
    assert num_hidden(25, 0.28) == 8  # the product is 7.000000000000001
    assert num_seen(49, 0.65) == 17  # CMAE keeps floor(49 * 0.35) cells
    _, hidden = split_patches_grouped(make_keys(1, "cpu"), (14, 14), 2, 49 - num_seen(49, 0.65))
    assert hidden.shape == (1, 128)
    for bad in (1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="mask_ratio"):
            num_hidden(49, bad)
    with pytest.raises(ValueError, match="leaves none of 4"):
        num_hidden(4, 0.76)


def make_mask(B, N, L, device):
    rng = torch.Generator().manual_seed(N)
    order = torch.rand(B, N, generator=rng).argsort(1)
    return (order < L).to(device)


@pytest.mark.parametrize(("N", "K"), SIZES + EDGES)
def test_split_mask_finds_what_is_hidden(N, K, device):
    mask = make_mask(3, N, N - K, device)
    expected = (
        [[n for n, hidden in enumerate(row) if hidden == value] for row in mask.tolist()]
        for value in (False, True)
    )
    results = [split(mask, N - K) for split in (split_mask, launch_mask, split_mask_reference)]
    for i, rows in enumerate(expected):
        for result in results:
            assert result[i].tolist() == rows and result[i].dtype == torch.int64


def test_split_mask_takes_any_strides(device):
    mask = make_mask(4, 36, 27, device)
    turned, gapped = mask.T.contiguous().T, torch.cat([mask, ~mask], 1)[:, :36]
    for split in (split_mask, launch_mask):
        for other in (turned, gapped):
            assert torch.equal(split(other, 27)[1], split_mask_reference(mask, 27)[1])
        same = mask[:1].expand(4, -1)
        assert torch.equal(split(same, 27)[0], split_mask_reference(mask, 27)[0][:1].expand(4, -1))


@pytest.mark.parametrize("count", [0, 20, 30, 36])
def test_a_wrong_count_is_found_on_the_cpu_and_hurts_no_other_row(count, device):
    mask = make_mask(3, 36, 27, device)
    expected = split_mask_reference(mask, 27)
    mask[1] = torch.arange(36, device=device) < count
    for actual, wanted in zip(launch_mask(mask, 27), expected, strict=True):
        assert torch.equal(actual[::2], wanted[::2])
    seen, hidden = (torch.full((72,), -1, device=device) for _ in range(2))  # what lies behind is not touched
    _mask_kernel[(1,)](mask[1:], seen, hidden, 36, 36, 9, **tile(36))
    assert (seen[9:] == -1).all() and (hidden[27:] == -1).all()
    with pytest.raises(ValueError, match="want 27 hidden in each row"):
        split_mask(mask.cpu(), 27)


def test_op_is_registered_right(device):
    keys, op = make_keys(3, device), torch.ops.fastmim.split_patches.default
    torch.library.opcheck(op, (keys, 36, 9, 1))
    torch.library.opcheck(op, (keys, 36, 12, 1, 6, 2))
    torch.library.opcheck(torch.ops.fastmim.split_mask.default, (make_mask(3, 36, 27, device), 27))


def test_cells_and_masks_compile_to_one_graph(device):
    keys, mask = make_keys(3, device), make_mask(3, 36, 27, device)

    def both(k, m):
        return [x + 1 for x in (*split_patches_grouped(k, (6, 6), 2, 6), *split_mask(m, 27))]

    expected = *split_patches_grouped_reference(keys, (6, 6), 2, 3, 0), *split_mask_reference(mask, 27)
    compiled = torch.compile(both, fullgraph=True)(keys, mask)
    for actual, wanted in zip(compiled, expected, strict=True):
        assert torch.equal(actual, wanted + 1)


def test_compiles_to_one_graph(device):
    keys = make_keys(3, device)
    compiled = torch.compile(lambda k: [x + 1 for x in split_patches(k, 36, 9)], fullgraph=True)
    for actual, expected in zip(compiled(keys), split_patches_reference(keys, 36, 9, 0), strict=True):
        assert torch.equal(actual, expected + 1)


def test_no_samples(device):
    empty = make_keys(0, device)
    for split in (launch, split_patches_reference):
        seen, hidden = split(empty, 196, 49, 0)
        assert seen.shape == (0, 49)
        assert hidden.shape == (0, 147)
    assert [x.shape for x in split_patches_grouped(empty, (14, 14), 2, 30)] == [(0, 76), (0, 120)]
    assert [x.shape for x in launch(empty, 196, 76, 0, 14, 2)] == [(0, 76), (0, 120)]
    for split in (split_mask, launch_mask, split_mask_reference):
        assert [x.shape for x in split(make_mask(0, 36, 27, device), 27)] == [(0, 9), (0, 27)]


def test_rejects_what_it_cannot_do(device):
    keys = make_keys(2, device)
    for N, K in ((196, 197), (196, -1), (4097, 5)):
        with pytest.raises(ValueError, match="num_seen"):
            split_patches(keys, N, K)
    with pytest.raises(ValueError, match="stream"):
        split_patches(keys, 196, 49, stream=-1)
    with pytest.raises(ValueError, match="seeds int64"):
        split_patches(keys.float(), 196, 49)
    with pytest.raises(NotImplementedError, match="fastmim::split_patches"):
        torch.ops.fastmim.split_patches(keys.to_sparse(), 196, 49, 0)


def test_cells_and_masks_reject_what_they_cannot_do(device):
    keys, mask = make_keys(2, device), make_mask(2, 36, 27, device)
    for grid, unit in (((14, 14), 3), ((14, 15), 2), ((15, 14), 2), ((14, 14), 0), ((0, 4), 2)):
        with pytest.raises(ValueError, match="want a unit that divides the grid"):
            split_patches_grouped(keys, grid, unit, 1)
    for grid, hidden in (((14, 14), 50), ((14, 14), -1), ((66, 66), 5)):
        with pytest.raises(ValueError, match="want 0 <= num_hidden_cells"):
            split_patches_grouped(keys, grid, 2, hidden)
    with pytest.raises(ValueError, match="stream"):
        split_patches_grouped(keys, (14, 14), 2, 30, stream=2**31)
    with pytest.raises(ValueError, match="seeds int64"):
        split_patches_grouped(keys[None], (14, 14), 2, 30)
    for bad in (mask.byte(), mask[0]):
        with pytest.raises(ValueError, match="want a mask bool"):
            split_mask(bad, 27)
    for count in (37, -1):
        with pytest.raises(ValueError, match="want 0 <= num_hidden <= N"):
            split_mask(mask, count)
