"""split_patches: the kernel against the definition, word for word, then what a mask must be."""

import pytest
import torch
from fastmim_kernels import num_seen, sample_keys, split_patches
from fastmim_kernels.philox import draw_uint32
from fastmim_kernels.split_patches import launch, split_patches_reference

# 196 = 14x14 fills no power of two; 256 is one; 36 = 6x6; 147 is no multiple of four; 4096 is the most
SIZES = [(196, 49), (256, 64), (36, 9), (147, 146), (4096, 1024)]
EDGES = [(196, 0), (196, 196), (1, 1), (1, 0), (5, 2), (0, 0)]


def make_keys(B, device):
    return sample_keys(7, 3, torch.arange(B, device=device))


@pytest.mark.parametrize(("N", "K"), SIZES + EDGES)
@pytest.mark.parametrize("stream", [0, 1, 2**31 - 1])  # 1: Triton compiles it in
def test_kernel_is_the_definition(N, K, stream, device):
    keys = make_keys(3, device)
    for actual, expected in zip(
        launch(keys, N, K, stream), split_patches_reference(keys, N, K, stream), strict=True
    ):
        assert torch.equal(actual, expected)


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


def as_masks(seen, N):
    return torch.zeros(len(seen), N, device=seen.device).scatter(1, seen, 1.0)


def test_every_patch_is_seen_equally_often(device):
    B, N, K = 8000, 196, 49
    masks = as_masks(split_patches(make_keys(B, device), N, K)[0], N)
    p = K / N
    chi2 = ((masks.sum(0) - B * p) ** 2 / (B * p * (1 - p))).sum() * (N - 1) / N  # K fixed: N - 1 free
    assert 130 < chi2 < 270  # 195 degrees of freedom: mean 195, deviation 20
    both = masks[:, :-1] * masks[:, 1:]  # neighbours: drawn without replacement
    assert abs(both.mean() - p * (K - 1) / (N - 1)) < 2e-3


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


def test_op_is_registered_right(device):
    torch.library.opcheck(torch.ops.fastmim.split_patches.default, (make_keys(3, device), 36, 9, 1))


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


def test_rejects_what_it_cannot_do(device):
    keys = make_keys(2, device)
    for N, K in ((196, 197), (196, -1), (4097, 5)):
        with pytest.raises(ValueError, match="num_seen"):
            split_patches(keys, N, K)
    with pytest.raises(ValueError, match="stream"):
        split_patches(keys, 196, 49, stream=-1)
    with pytest.raises(ValueError, match="keys int64"):
        split_patches(keys.float(), 196, 49)
    with pytest.raises(NotImplementedError, match="fastmim::split_patches"):
        torch.ops.fastmim.split_patches(keys.to_sparse(), 196, 49, 0)
