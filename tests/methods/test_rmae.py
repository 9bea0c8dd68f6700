"""R-MAE against what the paper says about it, with two separate passes written from Eq. 6 and 8."""

from dataclasses import replace

import pytest
import torch
from fastmim_kernels import sample_seeds, split_patches
from fastmim_kernels.testing import assert_no_worse

from fastmim.interop.mae import to_mae
from fastmim.methods.losses import scored_mean
from fastmim.methods.mae import MAEConfig
from fastmim.methods.rmae import RMAE, RMAEConfig
from fastmim.models.tokens import Tokens
from fastmim.views import Batch

from .conftest import DECODER, MODEL, assert_overfits
from .plain import decode, encode, patch_targets, visible_mask

N = MODEL.num_patches
VARIANTS = ["complement", "independent", "full"]


def make_rmae(**changes) -> RMAE:
    torch.manual_seed(0)
    return RMAEConfig(decoder=DECODER, **changes).build(MODEL)


def gradients(method, loss) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def two_pass_loss(rmae: RMAE, batch: Batch) -> torch.Tensor:
    """The reference of the packed form: each view encoded and decoded on its own."""
    (image,) = batch.crops
    seen1, seen2, scored, weight = rmae.transform(batch.seeds_B)
    (pred1,) = rmae.decoder(rmae.encoder(Tokens(image, seen1)).tokens_BTD, (seen1,), scored)
    second = rmae.decoder if rmae.decoder2 is None else rmae.decoder2
    (pred2,) = second(rmae.encoder(Tokens(image, seen2)).tokens_BTD, (seen2,), scored)
    target = pred2.detach() if rmae.config.detach_target == "distance" else pred2
    per_patch = (pred1 - target).square().mean(-1)
    per_patch = per_patch + rmae.config.relax_weight * rmae.pixel_loss(pred2, image, scored)
    weight = torch.ones_like(per_patch) if weight is None else weight
    return (per_patch * weight).sum() / weight.sum()


@pytest.mark.parametrize("t2", VARIANTS)
@pytest.mark.parametrize("changes", [{}, {"detach_target": "distance"}, {"tie_decoders": False}], ids=str)
def test_packed_equals_two_passes(batch, t2, changes):
    rmae = make_rmae(t2=t2, relax_weight=0.7, **changes)
    packed, two_pass = rmae(batch).loss, two_pass_loss(rmae, batch)
    torch.testing.assert_close(packed, two_pass, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(rmae, packed), gradients(rmae, two_pass)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("t2", VARIANTS)
def test_loss_and_gradients_equal_the_formulas(batch, t2):  # Eq. 6 and 8, in fp64, nothing of fastmim
    rmae = make_rmae(t2=t2, relax_weight=0.5)
    (image,) = batch.crops
    seen1, seen2, *_ = rmae.transform(batch.seeds_B)
    m1, m2 = visible_mask(seen1, N), visible_mask(seen2, N)
    scored = ~m1 & m2

    def plain(dtype):
        w = {name: t.detach().to(dtype).requires_grad_() for name, t in to_mae(rmae.state_dict()).items()}
        pred1 = decode(encode(image, m1, w, MODEL.patch, MODEL.heads), m1, w, DECODER.heads)
        pred2 = decode(encode(image, m2, w, MODEL.patch, MODEL.heads), m2, w, DECODER.heads)
        distance = (pred1 - pred2).square().mean(-1)
        anchor = (pred2 - patch_targets(image, MODEL.patch, dtype)).square().mean(-1)
        loss = (distance + 0.5 * anchor)[scored].sum() / scored.sum()
        loss.backward()
        return loss.detach(), {name: t.grad for name, t in w.items() if t.grad is not None}

    (oracle, oracle_grads), (naive, naive_grads) = plain(torch.float64), plain(torch.float32)
    loss = rmae(batch).loss
    assert_no_worse("loss", loss.detach(), oracle, naive, slack=4)
    for name, grad in gradients(rmae, loss).items():
        key = name.split(".", 1)[1]
        assert_no_worse(name, grad, oracle_grads[key], naive_grads[key], slack=8)


def test_complement_partitions_the_patches(batch):  # Eq. 6: M and 1 - M
    seen1, seen2, scored, weight = make_rmae().transform(batch.seeds_B)
    assert seen1.shape == (5, 6) and seen2.shape == (5, 18)
    assert torch.equal(torch.cat([seen1, seen2], 1).sort(1).values, torch.arange(N).expand(5, N))
    assert torch.equal(scored, seen2) and weight is None


def test_full_shows_everything_and_scores_what_t1_hides(batch):
    _, seen2, scored, weight = make_rmae(t2="full").transform(batch.seeds_B)
    assert torch.equal(seen2, torch.arange(N).expand(5, N))
    assert torch.equal(scored, split_patches(batch.seeds_B, N, 6)[1]) and weight is None


def test_independent_region_sizes_are_hypergeometric():
    """196 patches: 147 hidden by T1, of which T2 shows 147/196: mean 110.25, sd 2.63, between 98 and 147."""
    model = replace(MODEL, patch=16, image_size=224)
    rmae = RMAEConfig(decoder=DECODER, t2="independent").build(model)
    _, seen2, scored, weight = rmae.transform(sample_seeds(0, 0, torch.arange(4000)))
    size = weight.sum(1)
    assert seen2.shape == (4000, 147) and scored.shape == (4000, 147)
    assert size.min() >= 98 and size.max() <= 147
    assert abs(size.mean() - 110.25) < 4 * 2.63 / 4000**0.5
    assert abs(size.std() - 2.63) < 0.1


def test_lambda_zero_is_the_distance_of_two_decodes(batch):
    rmae = make_rmae(relax_weight=0.0)
    out = rmae(batch)
    seen1, seen2, scored, _ = rmae.transform(batch.seeds_B)
    z = rmae.encoder(Tokens(batch.crops[0], seen1), Tokens(batch.crops[0], seen2))
    pred1, pred2 = rmae.decoder(z.tokens_BTD, (seen1, seen2), scored)
    torch.testing.assert_close(out.loss, (pred1 - pred2).square().mean())
    torch.testing.assert_close(out.loss.detach(), out.metrics["distance"])


def test_with_an_exact_second_branch_it_is_mae(batch):  # Eq. 8 -> Eq. 7 -> Eq. 3
    rmae = make_rmae()
    exact = patch_targets(batch.crops[0], MODEL.patch, torch.float32)

    def decode_exactly(z, seen, scored):
        z1, _ = z.split()
        (pred1,) = rmae.decoder(z1, seen[:1], scored)
        return pred1, exact.gather(1, scored[..., None].expand(-1, -1, exact.shape[-1]))

    rmae.decode = decode_exactly
    torch.manual_seed(0)
    mae = MAEConfig(decoder=DECODER).build(MODEL)
    out = rmae(batch)
    torch.testing.assert_close(out.loss, mae(batch).loss)
    assert out.metrics["anchor"] < 1e-9


@pytest.mark.parametrize(("detach", "reaches"), [("none", True), ("distance", False)])
def test_gradient_of_the_distance_reaches_the_second_view(batch, detach, reaches):
    rmae = make_rmae(relax_weight=0.0, detach_target=detach, tie_decoders=False)
    rmae(batch).loss.backward()
    grads = [p.grad for p in rmae.decoder2.parameters() if p.requires_grad]
    touched = any(g is not None and g.any() for g in grads)
    assert touched == reaches
    assert any(p.grad.any() for p in rmae.decoder.parameters() if p.grad is not None)


def test_every_parameter_learns(batch):
    for changes in ({}, {"tie_decoders": False}):
        rmae = make_rmae(**changes)
        rmae(batch).loss.backward()
        trained = [(n, p) for n, p in rmae.named_parameters() if p.requires_grad]
        assert [n for n, p in trained if p.grad is None or not p.grad.any()] == []


def test_it_can_overfit_one_batch(batch):
    assert_overfits(make_rmae(), batch)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="relax-weight: want 0 or more, got -1"):
        RMAEConfig(relax_weight=-1.0)
    with pytest.raises(ValueError, match="mask-ratio: want a ratio between 0 and 1, got 0"):
        RMAEConfig(mask_ratio=0.0)
    with pytest.raises(ValueError, match="t2-ratio: want a ratio between 0 and 1, got 0"):
        RMAEConfig(t2_ratio=0.0)


def test_nothing_scored_is_no_loss_and_not_nan():
    x = torch.ones(2, 3, requires_grad=True)
    loss = scored_mean(x, torch.zeros(2, 3))
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()
