"""CutMix of whole patches: the law of its boxes, pairs, and pixels where they belong."""

import math

import pytest
import torch
from fastmim_kernels import sample_seeds

from fastmim.data import SampleOrder
from fastmim.models.cutmix import cutmix_mask, mix_patches, partners


def keys(count):
    return sample_seeds(5, 2, torch.arange(count))


def test_foreign_patches_are_a_rectangle():
    sides = set()
    for mask in cutmix_mask(keys(4000), (6, 9)).view(-1, 6, 9):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        for line in (rows, columns):
            [found] = line.nonzero().T
            assert len(found) == 0 or found[-1] - found[0] + 1 == len(found)
        sides.add((int(rows.sum()), int(columns.sum())))
    assert (0, 0) in sides and (6, 9) in sides and len(sides) > 25


def test_shares_and_places_are_those_of_cutmix():
    """Against the continuous law on a grid too fine to matter: side sqrt(u), center uniform, cut off."""
    mask = cutmix_mask(keys(20_000), (64, 64)).view(-1, 64, 64).double()
    u, c = torch.rand(3, 200_000, dtype=torch.float64)[0], torch.rand(2, 200_000, dtype=torch.float64)
    half = u.sqrt() / 2
    side = ((c + half).clamp(max=1) - (c - half).clamp(min=0)).prod(0)
    assert abs(mask.mean() - side.mean()) < 0.01
    share = mask.mean((1, 2))
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(share.quantile(q) - side[:200_000].quantile(q)) < 0.015
    assert abs(mask[:, :32].mean() - mask[:, 32:].mean()) < 0.01  # as often above as below
    assert abs(mask[:, :, :32].mean() - mask[:, :, 32:].mean()) < 0.01
    assert math.isclose(mask[:, 0].mean(), mask[:, -1].mean(), abs_tol=0.01)


def test_pixels_are_the_partners_inside_and_its_own_outside():
    image = torch.randint(0, 256, (6, 8, 12, 3), dtype=torch.uint8)
    foreign = cutmix_mask(keys(6), (2, 3))
    mixed = mix_patches(image, foreign, 4)
    for b in range(6):
        for n in range(6):
            rows, columns = slice(n // 3 * 4, n // 3 * 4 + 4), slice(n % 3 * 4, n % 3 * 4 + 4)
            source = b ^ 1 if foreign[b, n] else b
            assert torch.equal(mixed[b, rows, columns], image[source, rows, columns])


def test_partners_do_not_depend_on_ranks_and_micro_batches():
    found = []
    for world, accumulate in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        pairs = {}
        for rank in range(world):
            order = SampleOrder(100, 16, world=world, rank=rank, accumulate=accumulate, seed=1)
            for step in range(12):
                for a in range(accumulate):
                    epoch, ids = order.ids(step, a)
                    ids = torch.from_numpy(ids)
                    pairs |= {
                        (epoch, i): j for i, j in zip(ids.tolist(), partners(ids).tolist(), strict=True)
                    }
        found.append(pairs)
    assert all(pairs == found[0] for pairs in found) and len(found[0]) == 192
    assert all(found[0][epoch, partner] == i for (epoch, i), partner in found[0].items())


def test_an_odd_micro_batch_has_no_pairs():
    with pytest.raises(ValueError, match="even micro-batch.*got 5"):
        partners(torch.zeros(5))
