"""philox: the published vectors, then what the rest of the project relies on."""

import pytest
import torch
from fastmim_kernels.philox import draw_uint32, draw_uniform, philox_4x32, sample_seeds

ONES = 0xFFFFFFFF
# Known answers of Random123 (kat_vectors, philox4x32 10): key, counter, result
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),  # digits of pi
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers_in_tensors_and_in_plain_integers(key, counter, words, device):
    tensors = philox_4x32(*(tuple(torch.tensor([x], device=device) for x in xs) for xs in (key, counter)))
    assert tuple(int(x) for x in tensors) == words
    assert philox_4x32(key, counter) == words


def test_draws_are_the_lanes_of_the_block_function(device):
    keys = torch.tensor([0, -1, 0x0123456789ABCDEF], device=device)
    words = draw_uint32(keys, 7, stream=5)  # 7: the last block is cut
    for row, key in zip(words.tolist(), keys.tolist(), strict=True):
        blocks = [philox_4x32((key & ONES, key >> 32 & ONES), (n, 5, 0, 0)) for n in range(2)]
        assert row == [*blocks[0], *blocks[1]][:7]


def test_a_sample_key_is_its_definition_for_large_seeds_and_negative_ids():
    seed, epoch, sample = 2**64 - 3, 2**32 - 1, -5
    low, high, _, _ = philox_4x32((seed & ONES, seed >> 32), (sample & ONES, sample >> 32 & ONES, epoch, 1))
    assert int(sample_seeds(seed, epoch, torch.tensor([sample]))) & (2**64 - 1) == low | high << 32


def test_keys_depend_on_seed_epoch_and_id_and_on_nothing_else(device):
    ids = torch.arange(1000, device=device)
    keys = sample_seeds(1, 2, ids)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(sample_seeds(1, 2, ids[shuffled]), keys[shuffled])
    both = torch.cat(
        [keys, sample_seeds(1, 3, ids), sample_seeds(2, 2, ids), sample_seeds(1 + 2**32, 2, ids)]
    )
    assert both.unique().numel() == 4000
    assert sample_seeds(1, 2, ids + 2**32).ne(keys).all()  # ids beyond 32 bits count


def test_uniform_draws_fill_the_unit_interval_evenly(device):
    u = draw_uniform(sample_seeds(0, 0, torch.arange(2000, device=device)), 50, stream=1)
    assert u.dtype == torch.float64
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u.float().cpu(), 100, 0, 1)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, deviation 14
    for shift in (1, 4):  # neighbors in a block, the same lane of neighboring blocks
        pair = torch.stack([u[:, :-shift].flatten(), u[:, shift:].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 4 / pair.shape[1] ** 0.5


def test_streams_and_prefixes(device):
    keys = sample_seeds(0, 0, torch.arange(50, device=device))
    assert torch.equal(draw_uint32(keys, 200, 3)[:, :9], draw_uint32(keys, 9, 3))
    assert not torch.equal(draw_uint32(keys, 9, 3), draw_uint32(keys, 9, 4))
    assert draw_uint32(keys, 0, 0).shape == (50, 0)
    assert draw_uniform(keys[:0], 3, 0).shape == (0, 3)
    assert torch.equal(draw_uint32(keys[::2], 5, 0), draw_uint32(keys, 5, 0)[::2])


def test_rejects_what_it_cannot_do():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="seed"):
        sample_seeds(-1, 0, ids)
    with pytest.raises(ValueError, match="epoch"):
        sample_seeds(0, 2**32, ids)
    with pytest.raises(ValueError, match=r"ids int64 \[B\]"):
        sample_seeds(0, 0, ids.int())
    with pytest.raises(ValueError, match=r"seeds int64 \[B\]"):
        draw_uint32(ids[None], 3, 0)
    with pytest.raises(ValueError, match="stream"):
        draw_uniform(ids, 3, 2**31)
    with pytest.raises(ValueError, match="count"):
        draw_uniform(ids, -1, 0)


def test_compiled_draws_are_the_same():
    """Inductor's own code for them is not: it shifts and multiplies 64 bits wrong."""
    seeds = sample_seeds(3, 1, torch.arange(5))
    compiled = torch.compile(draw_uint32, fullgraph=True)
    assert torch.equal(compiled(seeds, 9, 700), draw_uint32(seeds, 9, 700))
