"""DINO: its loop written out, its center on any number of ranks, its schedules, its crops and its head."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastmim.methods import DINOConfig
from fastmim.methods.codes import pairs
from fastmim.methods.targets import Center
from fastmim.models.heads import CodeHead
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.optim.groups import parameter_groups
from fastmim.recipes import METHOD_RECIPES
from fastmim.views import BYOL_FIRST, BYOL_SECOND, DINO_SMALL
from tests.methods.crops import assert_same_gradients, make_batch

VIT = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=16, positions="learned", init="dino")
SIZES = {"hidden": 24, "bottleneck": 12, "out": 40, "local_size": 8}


def make(local_crops: int = 3, **changes):
    torch.manual_seed(0)
    return DINOConfig(**SIZES, local_crops=local_crops, **changes).build(VIT)


def published(method, batch):
    """The released loss: crops of a size at a time, a loop over pairs, fp64 from the logits on."""
    c = method.config

    def logits(encoder, head, crops):
        groups = [crops[:2], crops[2:]]
        features = [encoder(Tokens(torch.cat(group))).tokens_BTD[:, 0] for group in groups if group]
        return head(torch.cat(features))[1].double()

    student = logits(method.encoder, method.head, batch.crops) / c.student_temperature
    with torch.no_grad():
        teacher = logits(method.teacher, method.teacher_head, batch.crops[:2])
    T = c.temperature(batch.epoch)
    p = ((teacher - method.center.value_K.double()) / T).softmax(-1).chunk(2)
    total, terms = 0.0, 0
    for i, q in enumerate(p):
        for j, s in enumerate(student.chunk(len(batch.crops))):
            if i != j:
                total = total + (-q * F.log_softmax(s, -1)).sum(-1).mean()
                terms += 1
    return total / terms, teacher.mean(0)


@pytest.mark.parametrize("local_crops", [3, 0])
def test_the_loss_and_its_gradients_are_the_published_ones(local_crops):
    method = make(local_crops)
    with torch.no_grad():
        method.center.value_K.copy_(0.1 * torch.randn(40))
    batch = make_batch(method)
    expected, _ = published(method, batch)
    torch.testing.assert_close(method(batch).loss.double(), expected, rtol=1e-5, atol=0)
    found = assert_same_gradients(method, expected, lambda: method(batch).loss)
    assert not any(name.startswith("teacher") for name in found) and "head.codes.weight_g" not in found


def test_every_crop_meets_the_teachers_others():
    found = pairs(2, 5, device=torch.device("cpu"))
    assert found.shape == (10, 2) and (found >= 0).sum() == 2 * (2 * (2 + 3) - 2)
    assert found.tolist()[:5] == [[-1, 1], [0, -1], [0, 1], [0, 1], [0, 1]]
    assert found.tolist()[5:7] == [[-1, 3], [2, -1]]


def test_the_center_after_one_step_is_a_tenth_of_the_teachers_mean():
    method, batch = make(), None
    batch = make_batch(method)
    _, mean = published(method, batch)
    method(batch)
    assert not method.center.value_K.any()  # updated after the step, not before
    method.after_step(0.1)
    torch.testing.assert_close(method.center.value_K.double(), 0.1 * mean, rtol=1e-4, atol=1e-7)
    method.after_step(0.2)
    assert method.center.count == 0


def test_micro_batches_and_ranks_are_one_batch_to_the_center():
    whole, halves = make(), make()
    whole(make_batch(whole, 4))
    for first in (0, 2):
        halves(make_batch(halves, 2, first=first))
    for method in (whole, halves):
        method.after_step(0.1)
    torch.testing.assert_close(halves.center.value_K, whole.center.value_K)

    class Two:
        """The second of two ranks, whose means are those of both."""

        rank, world = 1, 2

        def __init__(self, other):
            self.other = other

        def gather(self, x):
            raise AssertionError("DINO gathers nothing")

        def mean(self, x):
            return (x + self.other) / 2

    one, two = make(), make()
    one(make_batch(one, 2)), two(make_batch(two, 2, first=2))
    two.share(Two(one.center.sum_K / one.center.count))
    two.after_step(0.1)
    torch.testing.assert_close(two.center.value_K, whole.center.value_K)


def test_the_center_stays_in_fp32():
    center = Center(4, 0.9).to(torch.bfloat16)
    assert center.value_K.dtype == center.sum_K.dtype == torch.float32
    assert set(center.state_dict()) == {"value_K"}


def test_uniform_teacher_and_student_have_the_loss_of_chance():
    method = make()
    with torch.no_grad():
        for head in (method.head, method.teacher_head):
            head.codes.weight_v.copy_(torch.ones(40, 12))
    out = method(make_batch(method))
    assert out.loss.item() == pytest.approx(math.log(40), rel=1e-5)
    assert out.metrics["teacher_entropy"].item() == pytest.approx(math.log(40), rel=1e-5)
    row = {"teacher_entropy": math.log(40), "feature_std": 1.0, "feature_rank": 5.0}
    assert "all codes alike" in method.diagnose(row)
    assert "one code for all images" in method.diagnose(row | {"teacher_entropy": 0.01})
    assert method.diagnose(row | {"teacher_entropy": 2.0}) is None
    assert "features of different images" in method.diagnose(
        row | {"teacher_entropy": 2.0, "feature_std": 0.01}
    )


def test_temperatures_are_of_epochs():
    c = DINOConfig(teacher_temperature=0.07, warmup_temperature=0.04, warmup_epochs=30)
    assert c.temperature(0) == 0.04 and c.temperature(29) == pytest.approx(0.07) and c.temperature(99) == 0.07
    assert c.temperature(1) == pytest.approx(0.04 + 0.03 / 29)
    assert DINOConfig().temperature(0) == DINOConfig().temperature(500) == 0.04
    method = make(teacher_temperature=0.07, warmup_epochs=3)
    first, later = (method(make_batch(method, epoch=epoch)).loss for epoch in (0, 5))
    assert first != later


def test_momentum_rises_along_half_a_cosine():
    method = make()
    assert method.momentum(0.0) == pytest.approx(0.996) and method.momentum(1.0) == 1.0
    assert method.momentum(0.5) == pytest.approx(0.998)


def test_crops_are_those_of_the_paper():
    method = METHOD_RECIPES["dino"]().method
    with torch.device("meta"):
        crops = method.build(METHOD_RECIPES["dino"]().model).crops
    assert [c.size for c in crops] == [(224, 224)] * 2 + [(96, 96)] * 8
    assert [c.color for c in crops] == [BYOL_FIRST, BYOL_SECOND] + [DINO_SMALL] * 8
    assert crops[0].scale == (0.4, 1.0) and crops[2].scale == (0.05, 0.4)
    assert len({c.box for c in crops}) == len({c.draw for c in crops}) == 10
    assert make(0).crops[0].scale == (0.14, 1.0)


def test_the_head_is_dinos():
    torch.manual_seed(0)
    head = CodeHead((384, 2048, 2048, 256), 1000)
    points, logits = head(torch.randn(6, 384))
    torch.testing.assert_close(points.norm(dim=1), torch.ones(6))
    assert logits.abs().max() <= 1.0001
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert 0.98 / 16 < head.codes.weight_v.abs().max() <= 1 / 16  # of nn.Linear
    assert not head.codes.weight_g.requires_grad and (head.codes.weight_g == 1).all()
    assert CodeHead((8, 8), 4, train_lengths=True).codes.weight_g.requires_grad


def test_the_last_layer_is_frozen_and_decay_is_of_matrices():
    method = make()
    groups = parameter_groups(method.named_parameters(), weight_decay=0.04, group=method.group)
    found = {
        name: g for g in groups for name, p in method.named_parameters() if any(p is q for q in g["params"])
    }
    assert found["head.codes.weight_v"]["frozen_epochs"] == 1 and found["head.codes.weight_v"]["decays"]
    assert {g["frozen_epochs"] for name, g in found.items() if "codes" not in name} == {0}
    assert found["encoder.pos_embed"]["decays"] and not found["encoder.norm.weight"]["decays"]


def test_the_teacher_has_no_drop_path():
    torch.manual_seed(0)
    method = DINOConfig(**SIZES).build(replace(VIT, drop_path=0.5)).train()
    batch = make_batch(method)
    first, second = (method.teacher(Tokens(batch.crops[0])).tokens_BTD for _ in range(2))
    assert torch.equal(first, second)
    assert method(batch).loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_size": 6}, "local-size: want a multiple of the patch, 4"),
        ({"local_size": 20}, "at most the 16 px of the image, of which there are positions, got 20"),
        ({"out": 0}, "method.out: want at least 1, got 0"),
        ({"local_crops": -1}, "method.local-crops: want 0 or more, got -1"),
        ({"teacher_temperature": 0.0}, "method.teacher-temperature: want more than 0, got 0.0"),
        ({"ema": 1.0}, "method.ema: want 0 or more and below 1, got 1.0"),
    ],
)
def test_bad_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DINOConfig(**(SIZES | changes)).build(VIT)
