"""iBOT: its two losses written out, its masks, its centers, and what stays as it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastmim.methods import IBOTConfig
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.recipes import METHOD_RECIPES
from tests.methods.crops import assert_same_gradients, make_batch

VIT = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=24, positions="learned", init="dino")
SIZES = {"hidden": 24, "bottleneck": 12, "out": 40, "local_size": 8}


def make(local_crops: int = 3, **changes):
    torch.manual_seed(0)
    return IBOTConfig(**SIZES, local_crops=local_crops, **changes).build(VIT)


def published(method, batch):
    """The released loss: all patches through the heads, loops over crops, fp64 from the logits on."""
    c, masks, L = method.config, method.masks(batch.seeds_B), len(batch.crops) - 2

    def encode(encoder, head, images, hidden=None):
        tokens = encoder(Tokens(images, hidden_BN=hidden)).tokens_BTD
        return head(tokens)[1].double()

    with torch.no_grad():
        teacher = [encode(method.teacher, method.teacher_head, batch.crops[i]) for i in range(2)]
    student = [encode(method.encoder, method.head, batch.crops[i], masks[i]) for i in range(2)]
    student += [encode(method.encoder, method.head, batch.crops[2 + i]) for i in range(L)]
    T = c.temperature(batch.epoch)
    c1, c2 = method.center.value_K.double(), method.patch_center.value_K.double()
    class_loss, terms, patch_loss = 0.0, 0, 0.0
    for q in range(2):
        p = ((teacher[q][:, 0] - c1) / T).softmax(-1)
        for v, s in enumerate(student):
            if v != q:
                log_q = F.log_softmax(s[:, 0] / c.student_temperature, -1)
                class_loss, terms = class_loss - (p * log_q).sum(-1).mean(), terms + 1
        p = ((teacher[q][:, 1:] - c2) / T).softmax(-1)
        log_q = F.log_softmax(student[q][:, 1:] / c.student_temperature, -1)
        per_patch = -(p * log_q).sum(-1) * masks[q]
        patch_loss = patch_loss + (per_patch.sum(-1) / masks[q].sum(-1).clamp(min=1)).mean() / 2
    means = [
        torch.cat([t[:, 0] for t in teacher]).mean(0),
        torch.cat([t[:, 1:] for t in teacher]).mean((0, 1)),
    ]
    return class_loss / terms + patch_loss, means


@pytest.mark.parametrize("changes", [{}, {"local_crops": 0}, {"mask_shape": "rand"}], ids=str)
def test_the_loss_and_its_gradients_are_the_published_ones(changes):
    method = make(**changes)
    with torch.no_grad():
        for center in (method.center, method.patch_center):
            center.value_K.copy_(0.1 * torch.randn(40))
    batch = make_batch(method, epoch=12)
    masks = method.masks(batch.seeds_B)
    assert sum(int(m.any(1).sum()) for m in masks) > 0  # some crops have a mask here
    expected, _ = published(method, batch)
    torch.testing.assert_close(method(batch).loss.double(), expected, rtol=1e-5, atol=0)
    found = assert_same_gradients(method, expected, lambda: method(batch).loss)
    assert "encoder.mask_token" in found and not any(name.startswith("teacher") for name in found)


def test_both_centers_after_one_step_are_a_tenth_of_the_teachers_means():
    method = make()
    batch = make_batch(method)
    _, means = published(method, batch)
    method(batch)
    assert not method.center.value_K.any() and not method.patch_center.value_K.any()
    method.after_step(0.1)
    for center, mean in zip((method.center, method.patch_center), means, strict=True):
        torch.testing.assert_close(center.value_K.double(), 0.1 * mean, rtol=1e-4, atol=1e-6)


def test_codes_that_say_nothing_cost_log_k_each():
    """Every logit 0: uniform teacher and student, so H = log K for classes and for each hidden patch."""
    method = make()
    with torch.no_grad():
        for head in (method.head, method.teacher_head):
            head.codes.weight_g.zero_()
    batch = make_batch(method, 8)
    out = method(batch)
    assert out.metrics["class_loss"].item() == pytest.approx(math.log(40), rel=1e-5)
    masked = torch.stack(method.masks(batch.seeds_B)).any(-1).float().mean().item()
    assert 0 < masked < 1  # a crop without a mask counts with loss 0
    assert out.metrics["patch_loss"].item() == pytest.approx(masked * math.log(40), rel=1e-5)


def test_small_crops_are_never_masked_and_the_teacher_sees_all(monkeypatch):
    method, seen = make(), []
    for encoder in (method.teacher, method.encoder):
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append([t.masks for t in inputs]))
    method(make_batch(method))
    assert seen == [[False, False], [True, True, False, False, False]]


def test_the_law_of_masks_is_ibots():
    method = IBOTConfig(**SIZES, local_crops=0).build(
        ViTConfig(width=32, depth=1, heads=2, patch=4, image_size=56, positions="learned")
    )
    ids = torch.arange(4000)
    from fastmim_kernels import sample_seeds

    masks = torch.stack(method.masks(sample_seeds(3, 0, ids))).float()
    assert masks[0].mean().item() == pytest.approx(0.148, abs=0.01)
    assert masks[0][masks[0].any(1)].mean().item() == pytest.approx(0.292, abs=0.01)
    assert (masks.sum(-1) <= method.most_hidden).all()
    assert not torch.equal(masks[0], masks[1])  # each large crop has its own


def test_codes_keep_their_directions_in_the_first_epochs():
    method = make(freeze_last_layer=3)
    frozen = {name: method.group(name, p).frozen_epochs for name, p in method.named_parameters()}
    assert frozen["head.codes.weight_v"] == 3 and frozen["head.mlp.0.weight"] == 0


def test_the_recipe_is_the_release():
    run = METHOD_RECIPES["ibot"]()
    assert run.method.temperature(0) == 0.04 and run.method.temperature(50) == 0.07
    assert run.optim.peak_lr(1024) == pytest.approx(3e-3) and run.optim.min_lr == 2e-6
    assert (run.optim.clip, run.optim.clip_per) == (0.3, "tensor") and run.method.freeze_last_layer == 3
    crops = run.method.build(VIT.__class__(width=32, depth=1, heads=2, positions="learned")).crops
    assert [crop.size for crop in crops] == [(224, 224)] * 2 + [(96, 96)] * 10
    assert crops[0].scale == (0.32, 1.0) and crops[-1].scale == (0.05, 0.32)
    assert (crops[0].color.blur, crops[1].color.blur, crops[1].color.solarize, crops[2].color.blur) == (
        1,
        0.1,
        0.2,
        0.5,
    )


def test_mask_token_starts_at_zero():
    method = make()
    assert not method.encoder.mask_token.any() and not method.teacher.mask_token.any()
