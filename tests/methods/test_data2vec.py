"""data2vec: its target and its loss written out, its masks, its teacher."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import sample_seeds

from fastmim.methods import Data2VecConfig
from fastmim.methods.data2vec import deviation_hinge
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.recipes import METHOD_RECIPES
from tests.methods.crops import Second, assert_same_gradients, make_batch

VIT = ViTConfig(
    width=32, depth=4, heads=2, patch=4, image_size=24, positions="relative", layer_scale=0.1, qkv_bias="qv",
    init="beit",
)  # fmt: skip


def make(vit: ViTConfig = VIT, **changes):
    torch.manual_seed(0)
    method = Data2VecConfig(**({"top_blocks": 2} | changes)).build(vit)
    with torch.no_grad():  # a head that says something
        method.head.weight.normal_(std=0.2)
    return method


def blocks_of(method, image):
    """The stream behind each block and what its MLP adds, block by block with the parts of the encoder."""
    encoder = method.teacher
    x, streams, mlps = encoder.embed((Tokens(image),), (VIT.grid,))[0], [], []
    bias = (encoder.rel_pos_bias(VIT.grid),)
    for block in encoder.blocks:
        x = x + block.gamma_1 * block.attn(
            F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias, 1e-6), bias=bias
        )
        added = block.mlp(F.layer_norm(x, (32,), block.norm2.weight, block.norm2.bias, 1e-6))
        x = x + block.gamma_2 * added
        streams.append(x)
        mlps.append(added)
    return [[y[:, 1:] for y in ys] for ys in (streams, mlps)]


def plain_norm(x, dims):
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, keepdim=True, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("of", ["block", "mlp"])
@pytest.mark.parametrize(
    ("inner", "dims"), [("layer", (2,)), ("instance", (1,)), ("batch", (0, 1)), ("none", None)]
)
def test_the_target_is_the_mean_of_the_last_blocks(of, inner, dims):
    method = make(of=of, inner_norm=inner, outer_norm=False)
    (image,) = make_batch(method).crops
    with torch.no_grad():
        outputs = blocks_of(method, image)[of == "mlp"][-2:]
        expected = sum(x if dims is None else plain_norm(x, dims) for x in outputs) / 2
    torch.testing.assert_close(method.target(image), expected, rtol=1e-4, atol=1e-4)


def test_each_target_has_mean_0_and_variance_1():
    method = make()
    target = method.target(make_batch(method).crops[0])
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 36), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(-1, correction=0), torch.ones(4, 36), rtol=1e-3, atol=0)


@pytest.mark.parametrize("masks", [1, 3])
def test_the_loss_and_its_gradients_are_those_of_the_definition(masks):
    method = make(masks=masks)
    batch = make_batch(method)
    target, hidden, errors = method.target(batch.crops[0]), method.masks(batch.seeds_B), []
    assert len({int(n) for mask in hidden for n in mask.sum(1)}) > 1  # counts differ from image to image
    for mask in hidden:
        z = method.encoder(Tokens(batch.crops[0], hidden_BN=mask)).tokens_BTD[:, 1:]
        errors.append((method.head(z[mask]) - target[mask]).double())
    e = torch.cat(errors).abs()
    expected = torch.where(e <= 2, e**2 / 4, e - 1).mean()
    torch.testing.assert_close(method(batch).loss.double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(method, expected, lambda: method(batch).loss)


def test_the_teacher_drops_no_path_and_has_no_gradient():
    vit = replace(VIT, drop_path=0.5)
    method = make(vit)
    method.train()
    (image,) = make_batch(method).crops
    assert torch.equal(method.target(image), method.target(image))
    assert all(not p.requires_grad for p in method.teacher.parameters()) and method.momentum(0.3) == 0.9998


def test_two_ranks_weigh_their_hidden_patches_as_one():
    method = make()
    parts = [make_batch(method, 2, first=first) for first in (0, 2)]
    whole = method(make_batch(method)).loss.item()
    counts = [method.masks(part.seeds_B)[0].sum().float()[None] for part in parts]
    losses = []
    for part, other in zip(parts, reversed(counts), strict=True):
        method.ranks = Second([other])
        losses.append(method(part).loss.item())
    assert sum(losses) / 2 == pytest.approx(whole, rel=1e-6)


def test_the_hinge_is_half_of_predictions_alike_and_nothing_of_such_that_differ():
    """Predictions at patches that are not there do not count."""
    there = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    alike = torch.ones(2, 3, 4)
    alike[0, 2] = 100.0
    assert deviation_hinge(alike, there).item() == pytest.approx(0.5, abs=2e-3)
    assert deviation_hinge(torch.randn(2, 3, 4) * 5, torch.ones(2, 3)).item() == 0
    method = make(variance_weight=2.0)
    plain, batch = make(), make_batch(make())
    out = method(batch)
    with_hinge = plain(batch).loss + 2 * out.metrics["variance_hinge"]
    torch.testing.assert_close(out.loss, with_hinge)


def test_masks_hide_120_of_196():
    method = make(replace(VIT, patch=16, image_size=224, depth=1))
    seeds = sample_seeds(1, 0, torch.arange(500))
    (mask,) = method.masks(seeds)
    counts = mask.sum(1)
    assert counts.max() == 120 and counts.float().mean().item() == pytest.approx(119.5, abs=0.5)
    assert (counts == 120).float().mean().item() == pytest.approx(0.7, abs=0.08)


def test_the_recipe_is_the_release():
    run = METHOD_RECIPES["data2vec"]()
    assert run.optim.peak_lr(2048) == pytest.approx(2e-3) and run.optim.clip == 3.0
    assert (run.model.layer_scale, run.model.drop_path, run.method.beta) == (1e-4, 0.25, 2.0)
