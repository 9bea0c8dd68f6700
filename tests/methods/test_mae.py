"""MAE against its formulas written out plainly, and what the specification says must hold."""

import dataclasses

import pytest
import torch
from fastmim_kernels import split_patches
from fastmim_kernels.testing import assert_no_worse

from fastmim.interop.mae import to_mae
from fastmim.methods.mae import MAE, MAEConfig
from fastmim.models.cutmix import cutmix_mask
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.views import C_MAE, Batch

from .conftest import DECODER, MODEL, assert_overfits, make_batch
from .plain import decode, encode, patch_targets, visible_mask


def make_mae(**changes) -> MAE:
    torch.manual_seed(0)
    return MAEConfig(decoder=DECODER, **changes).build(MODEL)


def plain_loss(mae: MAE, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the plain formulation, the weights in `dtype`."""
    w = {name: t.detach().to(dtype).requires_grad_() for name, t in to_mae(mae.state_dict()).items()}
    (image,) = batch.crops
    seen, _ = split_patches(batch.seeds_B, MODEL.num_patches, mae.num_seen)
    visible = visible_mask(seen, MODEL.num_patches)
    pred = decode(encode(image, visible, w, MODEL.patch, MODEL.heads), visible, w, DECODER.heads)
    error = (pred - patch_targets(image, MODEL.patch, dtype, norm_pix=mae.config.norm_pix)).square().mean(-1)
    loss = error[~visible].sum() / (~visible).sum()
    loss.backward()
    return loss.detach(), {name: t.grad for name, t in w.items() if t.grad is not None}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_gradients_equal_the_plain_formulation(batch, norm_pix):
    mae = make_mae(norm_pix=norm_pix)
    oracle, oracle_grads = plain_loss(mae, batch, torch.float64)
    naive, naive_grads = plain_loss(mae, batch, torch.float32)
    loss = mae(batch).loss
    loss.backward()
    assert_no_worse("loss", loss.detach(), oracle, naive, slack=4)
    torch.testing.assert_close(loss.detach().double(), oracle, rtol=1e-6, atol=0)
    parameters = dict(mae.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == {
        n for n, p in parameters.items() if p.grad is not None
    }
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            key = name.split(".", 1)[1]
            assert_no_worse(name, parameter.grad, oracle_grads[key], naive_grads[key], slack=8)


def test_changing_hidden_pixels_changes_the_target_only(batch):
    mae = make_mae()
    _, hidden = split_patches(batch.seeds_B, MODEL.num_patches, mae.num_seen)
    image = batch.crops[0].clone()
    rows, columns = hidden[:, 0] // MODEL.grid[1] * 4, hidden[:, 0] % MODEL.grid[1] * 4
    for b, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        image[b, row : row + 2, column : column + 4] ^= 0x5F
    changed = dataclasses.replace(batch, crops=(image,))
    assert torch.equal(mae.reconstruct(batch).pred_BNP, mae.reconstruct(changed).pred_BNP)
    assert mae(batch).loss != mae(changed).loss


def test_no_gradient_flows_from_predictions_of_visible_patches(batch):
    mae = make_mae()
    seen, hidden = split_patches(batch.seeds_B, MODEL.num_patches, mae.num_seen)
    z = mae.encoder(Tokens(batch.crops[0], seen)).tokens_BTD
    (pred,) = mae.decoder(z, (seen,))
    pred.retain_grad()
    hidden_pred = pred.gather(1, hidden[..., None].expand(-1, -1, pred.shape[-1]))
    mae.pixel_loss(hidden_pred, batch.crops[0], hidden).mean().backward()
    visible = visible_mask(seen, MODEL.num_patches)
    assert not pred.grad[visible].any()
    assert pred.grad[~visible].any(dim=-1).all()
    torch.testing.assert_close(mae(batch).loss, mae.pixel_loss(hidden_pred, batch.crops[0], hidden).mean())


def test_mask_is_that_of_the_sample_not_of_the_batch(batch):
    mae = make_mae()
    one = Batch((batch.crops[0][2:3],), batch.seeds_B[2:3], batch.ids_B[2:3], 0)
    assert torch.equal(mae.reconstruct(batch).seen_BK[2:3], mae.reconstruct(one).seen_BK)


def test_it_can_overfit_one_batch():
    assert_overfits(make_mae(), make_batch(8))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_channel_counts_and_odd_grids(size):
    mean, std = (0.5,) * size, (0.25,) * size
    model = ViTConfig(
        width=16, depth=1, heads=2, patch=3, image_size=(9, 21), channels=size, mean=mean, std=std
    )
    mae = MAEConfig(decoder=DECODER).build(model)
    image = torch.randint(0, 256, (2, 9, 21, size), dtype=torch.uint8)
    batch = make_batch(2)
    loss = mae(Batch((image,), batch.seeds_B, batch.ids_B, 0)).loss
    assert loss.isfinite()
    assert mae.reconstruct(Batch((image,), batch.seeds_B, batch.ids_B, 0)).pred_BNP.shape == (2, 21, 9 * size)


def test_bad_ratios_are_refused():
    with pytest.raises(ValueError, match="mask-ratio: want a ratio between 0 and 1"):
        MAEConfig(mask_ratio=1.5)
    with pytest.raises(ValueError, match="leaves none of 24 patches seen"):
        MAEConfig(mask_ratio=0.99).build(MODEL)
    with pytest.raises(ValueError, match="of 24 patches hides none"):
        MAEConfig(mask_ratio=1e-20).build(MODEL)


# --- colors, CutMix, nothing hidden: tables 4 and 5 of arXiv:2208.04164 --------------------------------


def colored_batch(mae, size=6):
    """A batch of the method's crops; where there are two, the second is another picture."""
    first = make_batch(size)
    crops = tuple(make_batch(size, seed=3 + i).crops[0] for i in range(len(mae.crops)))
    return dataclasses.replace(first, crops=crops)


def plain_mixed(image, foreign, patch):
    mixed = image.clone()
    for b, n in foreign.nonzero().tolist():
        top, left = n // MODEL.grid[1] * patch, n % MODEL.grid[1] * patch
        mixed[b, top : top + patch, left : left + patch] = image[
            b ^ 1, top : top + patch, left : left + patch
        ]
    return mixed


@pytest.mark.parametrize("color", ["none", "visible", "whole"])
@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.0])
def test_the_clean_image_is_the_target(color, cutmix, mask_ratio):
    """Scored: what is hidden; where nothing is, what was replaced; without CutMix either, everything."""
    mae = make_mae(color=color, cutmix=cutmix, mask_ratio=mask_ratio)
    assert [view.color for view in mae.crops] == {
        "none": [None], "visible": [C_MAE, None], "whole": [C_MAE]
    }[color]  # fmt: skip
    batch = colored_batch(mae)
    shown, target = batch.crops[0], batch.crops[-1]
    foreign = cutmix_mask(batch.seeds_B, MODEL.grid)
    assert foreign.any() and not foreign.all()
    seen, _ = split_patches(batch.seeds_B, MODEL.num_patches, mae.num_seen)
    visible = visible_mask(seen, MODEL.num_patches)
    scored = ~visible if mask_ratio else foreign if cutmix else torch.ones_like(visible)
    shown = plain_mixed(shown, foreign, MODEL.patch) if cutmix else shown
    w = {name: t.double() for name, t in to_mae(mae.state_dict()).items()}
    pred = decode(encode(shown, visible, w, MODEL.patch, MODEL.heads), visible, w, DECODER.heads)
    error = (pred - patch_targets(target, MODEL.patch, torch.float64)).square().mean(-1)
    expected = error[scored].sum() / scored.sum()
    torch.testing.assert_close(mae(batch).loss.double(), expected, rtol=2e-6, atol=0)
    assert torch.equal(mae.reconstruct(batch).image_BHWC, target)


def test_cutmix_wants_pairs():
    with pytest.raises(ValueError, match="even number of images per micro-batch, got 3"):
        MAEConfig(cutmix=True).check_batch(3, 2)
    MAEConfig(cutmix=True).check_batch(2, 3)
    MAEConfig().check_batch(1, 1)
