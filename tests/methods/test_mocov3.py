"""MoCo v3: its loss against the released form, its heads, its frozen projection, its average."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmim.methods import MoCoV3Config
from fastmim.models.heads import NormedHead
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.recipes import METHOD_RECIPES
from tests.methods.crops import make_batch

VIT = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=16, init="moco")


def make(**changes):
    torch.manual_seed(0)
    return MoCoV3Config(**({"hidden": 48, "out": 24} | changes)).build(VIT)


def contrastive(q, k, tau):
    """ctr(q, k) of the paper's Algorithm 1, with the released factor."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return F.cross_entropy(q @ k.T / tau, torch.arange(len(q))) * 2 * tau


def published(method, batch):
    x1, x2 = (Tokens(image) for image in batch.crops)
    q1, q2 = (method.predictor(method.projector(method.encoder(x).tokens_BTD[:, 0])) for x in (x1, x2))
    with torch.no_grad():
        k1, k2 = (method.key_projector(method.key_encoder(x).tokens_BTD[:, 0]) for x in (x1, x2))
    return contrastive(q1, k2, 0.2) + contrastive(q2, k1, 0.2)


def test_the_loss_is_the_sum_of_both_directions_with_the_released_gradients():
    method, twin = make(), make()
    with torch.no_grad():  # keys of other weights than the queries
        for m in (method, twin):
            for p in m.key_encoder.parameters():
                p.mul_(1.1)
    batch = make_batch(method, 6)
    expected = published(twin, batch)
    expected.backward()
    loss = method(batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grads = dict(twin.named_parameters())
    for name, p in method.named_parameters():
        assert (p.grad is None) == (grads[name].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[name].grad, rtol=2e-3, atol=1e-6, msg=name)


def test_chance_is_twice_the_logarithm_of_the_images():
    method = make()
    out = method(make_batch(method, 8))
    assert out.metrics["loss_chance"].item() == pytest.approx(2 * 0.4 * math.log(8), rel=1e-6)


def test_a_head_is_torchs_own_layers():
    """Linear without bias, BatchNorm1d of eps 1e-5, the last one without affine; outputs and gradients."""
    torch.manual_seed(0)
    ours = NormedHead((6, 10, 10, 5))
    theirs = nn.Sequential(
        nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 10, bias=False),
        nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5, bias=False), nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip
    ours_now = ours.state_dict()
    assert ours_now.keys() | {"1.num_batches_tracked"} <= theirs.state_dict().keys() | {
        "1.num_batches_tracked"
    }
    theirs.load_state_dict(ours_now, strict=False)
    x = torch.randn(12, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), theirs(b)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn(12, 5)
    out.backward(dout)
    expected.backward(dout)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(ours[-1].running_var, theirs[-1].running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_projection_of_patches_stays_as_it_was_drawn(freeze):
    method = make(freeze_patches=freeze)
    before = method.encoder.patch_embed.proj.weight.detach().clone()
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    method(make_batch(method)).loss.backward()
    optimizer.step()
    assert torch.equal(method.encoder.patch_embed.proj.weight, before) == freeze


def test_keys_come_from_the_weights_of_the_step_before():
    """One that moves behind a step has the weights that the released one takes in front of the next."""
    method = make()
    assert method.momentum(0.0) == 0.99 and method.momentum(1.0) == 1.0
    assert method.momentum(0.5) == pytest.approx(0.995)
    pairs = method.averages()
    assert [type(t) for t, _ in pairs] == [type(s) for _, s in pairs]
    for teacher, student in pairs:
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            assert torch.equal(t, s) and not t.requires_grad  # so the first of the released moves is none


def test_statistics_of_the_keys_are_their_own():
    method = make()
    method(make_batch(method))
    ours, theirs = method.projector[1].running_mean, method.key_projector[1].running_mean
    assert theirs.any() and torch.allclose(ours, theirs, atol=1e-5)  # equal weights at first
    with torch.no_grad():
        method.encoder.blocks[0].mlp.fc2.weight.add_(0.3)
    method(make_batch(method))
    assert not torch.allclose(method.projector[1].running_mean, method.key_projector[1].running_mean)


def test_everything_decays():
    method = make()
    assert all(method.group(name, p).decay for name, p in method.named_parameters())


def test_one_image_alone_is_refused():
    with pytest.raises(ValueError, match="want at least two images to compare"):
        MoCoV3Config().check_batch(1, 1)
    MoCoV3Config().check_batch(1, 2)


def test_the_recipe_is_the_release():
    run = METHOD_RECIPES["mocov3"]()
    assert run.optim.peak_lr(4096) == pytest.approx(2.4e-3) and run.optim.weight_decay == 0.1
    crops = run.method.build(VIT).crops
    assert all(crop.scale == (0.08, 1.0) for crop in crops) and crops[0].box != crops[1].box
    assert (crops[0].color.blur, crops[1].color.blur, crops[1].color.solarize) == (1.0, 0.1, 0.2)
