"""C-MAE against a slow form written from the paper; what learns and what does not; what is refused."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fastmim_kernels import sample_seeds
from fastmim_kernels.testing import assert_no_worse

from fastmim.engine.ranks import Ranks
from fastmim.methods import CMAEConfig
from fastmim.methods.cmae import CMAE
from fastmim.models.cutmix import cutmix_mask
from fastmim.views import C_MAE, Batch

from .cmae_plain import loss_and_gradients
from .conftest import MODEL

N = MODEL.num_patches
NO_TOKEN = {"mask_token": False}
CHOICES = [
    {},
    {"compare": "cls"},
    {"compare": "avg", "negatives": "all"},
    {"compare": "patch+cls"},
    {"compare": "patch+cls", "positions": "masked", "negatives": "image"},
    {"positions": "visible", "temperature": 0.5, "loss_scale": "2tau"},
    {"loss": "byol", "compare": "patch+cls", "positions": "masked"},
    {"loss": "negative_cosine", "positions": "visible"},
    {"negatives": "image"},
    {"negatives": "all", "t2": "full"},
    {"symmetric": True, "t2": "independent", "t2_ratio": 0.4},
    {"symmetric": True, "positions": "masked", "mask_ratio": 0.5},
    {"head_norm": "ln"},
    {"head_norm": "bn", "symmetric": True},
    {"color": False},
    {"mask_ratio": 0.0, "t2": "full"},
    {"mask_ratio": 0.0, "t2": "independent", "t2_ratio": 0.5},
    {"cutmix": True},
    {"cutmix": True, "negatives": "image", "symmetric": True},
    {"cutmix": True, "negatives": "all"},
    {"cutmix": True, "loss": "byol", "positions": "masked"},
    {"freeze_patch_embed": True},
    {**NO_TOKEN, "t2": "full"},
    {**NO_TOKEN, "t2": "full", "symmetric": True, "compare": "patch+cls"},
    {**NO_TOKEN, "t2": "full", "head_norm": "bn"},
    {**NO_TOKEN, "t2": "full", "loss": "byol"},
    {**NO_TOKEN, "t2": "independent"},
    {**NO_TOKEN, "t2": "independent", "negatives": "image", "compare": "patch+cls"},
    {**NO_TOKEN, "t2": "independent", "negatives": "all", "t2_ratio": 0.5},
    {**NO_TOKEN, "t2": "independent", "cutmix": True, "symmetric": True},
    {**NO_TOKEN, "t2": "independent", "cutmix": True, "negatives": "all", "compare": "patch"},
    {**NO_TOKEN, "compare": "avg"},
    {**NO_TOKEN, "compare": "cls"},
]


def make_cmae(**changes) -> CMAE:
    """With a target branch that differs from the online one, as it does after a step."""
    torch.manual_seed(0)
    cmae = CMAEConfig(**({"hidden": 40, "out": 20} | changes)).build(MODEL)
    cmae.share(Ranks.single())
    with torch.no_grad():
        for p in [*cmae.target_encoder.parameters(), *cmae.target_projector.parameters()]:
            p.add_(0.02 * torch.randn_like(p))
        for module in (cmae.projector, cmae.predictor):
            for p in module.parameters():  # biases and norms that matter
                p.add_(0.1 * torch.randn_like(p))
    return cmae


def make_pair(size: int = 6, seed: int = 3, crops: int = 2) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (crops, size, 16, 24, 3), generator=rng, dtype=torch.uint8)
    ids = torch.arange(size)
    return Batch(tuple(images), sample_seeds(0, 0, ids), ids, 0)


def batch_of(cmae: CMAE, size: int = 6) -> Batch:
    return make_pair(size, crops=len(cmae.crops))


@pytest.mark.parametrize("changes", CHOICES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_loss_and_gradients_equal_the_formulas(changes):
    cmae = make_cmae(**changes)
    batch = batch_of(cmae)
    foreign = cutmix_mask(batch.seeds_B, MODEL.grid) if cmae.config.cutmix else None
    oracle, oracle_grads = loss_and_gradients(cmae, batch, foreign, torch.float64)
    naive, naive_grads = loss_and_gradients(cmae, batch, foreign, torch.float32)
    loss = cmae(batch).loss
    assert_no_worse("loss", loss.detach(), oracle, naive, slack=16)
    loss.backward()
    trained = {name: p for name, p in cmae.named_parameters() if p.requires_grad}
    assert {name for name, p in trained.items() if p.grad is not None} <= oracle_grads.keys()
    for name, p in trained.items():
        if name in oracle_grads and (p.grad is not None or oracle_grads[name].any()):
            assert_no_worse(name, p.grad, oracle_grads[name], naive_grads[name], slack=16)


def test_no_gradient_in_the_target_branch():
    cmae = make_cmae(symmetric=True)
    cmae(batch_of(cmae)).loss.backward()
    target = [*cmae.target_encoder.parameters(), *cmae.target_projector.parameters()]
    assert target and all(not p.requires_grad and p.grad is None for p in target)


def test_every_other_parameter_learns():
    for changes in ({}, {"compare": "cls"}, {"mask_token": False, "t2": "full"}, {"head_norm": "bn"}):
        cmae = make_cmae(**changes)
        cmae(batch_of(cmae)).loss.backward()
        idle = [
            n for n, p in cmae.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        # a constant before a batch norm is taken out again
        assert [n for n in idle if not (changes.get("head_norm") and n.endswith("0.bias"))] == []


def test_averages_are_encoder_with_mask_token_and_projector_and_start_as_copies():
    torch.manual_seed(0)
    cmae = CMAEConfig(hidden=40, out=20).build(MODEL)
    pairs = cmae.averages()
    assert [s for _, s in pairs] == [cmae.encoder, cmae.projector]
    for teacher, student in pairs:
        states = teacher.state_dict(), student.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert "mask_token" in cmae.target_encoder.state_dict()


def test_momentum():
    assert [CMAEConfig().build(MODEL).momentum(p) for p in (0.1, 1.0)] == [0.996, 0.996]
    cosine = CMAEConfig(ema_schedule="cosine").build(MODEL)
    assert [cosine.momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.996, 0.998, 1.0])


def test_one_crop_two_draws_of_colors():
    cmae = make_cmae(blur_p=0.5)
    a, b = cmae.crops
    assert a.box == b.box and {a.draw, b.draw} == {0, 1}
    assert a.color == b.color == replace(C_MAE, blur=0.5)
    (only,) = make_cmae(color=False).crops
    assert only.color is None
    assert make_cmae().crops[0].color == C_MAE


def test_a_frozen_patch_embedding_stays():
    cmae = make_cmae(freeze_patch_embed=True)
    cmae(batch_of(cmae)).loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in cmae.encoder.patch_embed.parameters())


def test_views_partition_the_patches():  # Eq. 6
    seen1, seen2 = make_cmae().transform(make_pair().seeds_B)
    assert seen1.shape == (6, N // 4)
    assert torch.equal(torch.cat([seen1, seen2], 1).sort(1).values, torch.arange(N).expand(6, N))


def test_independent_views_are_draws_of_their_own():
    keys = sample_seeds(0, 0, torch.arange(400))
    seen1, seen2 = make_cmae(t2="independent", mask_ratio=0.5, t2_ratio=0.5).transform(keys)
    common = (seen1[:, :, None] == seen2[:, None, :]).sum((1, 2)).float()
    assert abs(common.mean() - N / 4) < 4 * 1.25 / 400**0.5  # hypergeometric: 6, deviation 1.25
    seen1, everything = make_cmae(t2="full").transform(keys)
    assert seen1.shape == (400, N // 4) and torch.equal(everything, torch.arange(N).expand(400, N))


def test_each_branch_sees_its_own_patches_of_its_own_view():
    cmae = make_cmae()
    batch = make_pair()
    (seen1, seen2), loss = cmae.transform(batch.seeds_B), cmae(batch).loss
    for view, hidden, seen in ((0, seen2, seen1), (1, seen1, seen2)):
        for index, matters in ((hidden, False), (seen, True)):
            images = [v.clone() for v in batch.crops]
            t = index[2, 0].item()
            y, x = t // MODEL.grid[1] * 4, t % MODEL.grid[1] * 4
            images[view][2, y : y + 4, x : x + 4] ^= 0x7F
            assert (cmae(replace(batch, crops=tuple(images))).loss != loss) == matters


def test_loss_does_not_depend_on_the_order_of_the_batch():
    cmae, batch = make_cmae(), make_pair()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = Batch(tuple(v[order] for v in batch.crops), batch.seeds_B[order], batch.ids_B[order], 0)
    torch.testing.assert_close(cmae(shuffled).loss, cmae(batch).loss)


def test_patch_and_class_is_the_average_of_its_parts():
    parts = {}
    for compare in ("patch", "cls", "patch+cls"):
        cmae = make_cmae(compare=compare)
        parts[compare] = cmae(batch_of(cmae)).loss
    torch.testing.assert_close(parts["patch+cls"], (N * parts["patch"] + parts["cls"]) / (N + 1))


def train(cmae: CMAE, batches: Iterator[Batch], steps: int) -> list[dict[str, float]]:
    """The metrics and the loss of each step; the averages are moved by the plain formula."""
    optimizer = torch.optim.AdamW([p for p in cmae.parameters() if p.requires_grad], lr=2e-3)
    rows = []
    for step in range(steps):
        output = cmae(next(batches))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        m = cmae.momentum((step + 1) / steps)
        with torch.no_grad():
            for teacher, student in cmae.averages():
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.mul_(m).add_(s, alpha=1 - m)
        rows.append({"loss": output.loss.item()} | {k: v.item() for k, v in output.metrics.items()})
    return rows


TINY = replace(MODEL, depth=1, image_size=16)


def tiny(ema: float = 0.9, **changes) -> CMAE:
    torch.manual_seed(0)
    cmae = CMAEConfig(hidden=64, out=32, ema=ema, **changes).build(TINY)
    cmae.share(Ranks.single())
    return cmae


def mosaics(size: int = 16) -> Iterator[Batch]:
    """Ever new images of four colors, each view with noise of its own."""
    rng = torch.Generator().manual_seed(0)
    for step in itertools.count():
        color = torch.randint(0, 256, (size, 2, 2, 3), generator=rng)
        color = color.repeat_interleave(8, 1).repeat_interleave(8, 2)
        noise = torch.randint(-30, 30, (2, *color.shape), generator=rng)
        ids = torch.arange(size) + size * step
        yield Batch(tuple((color + noise).clamp(0, 255).to(torch.uint8)), sample_seeds(0, 0, ids), ids, 0)


def test_it_can_overfit_one_batch():
    """InfoNCE falls from chance, log 8 = 2.08, half of the way to its floor, 0.02, and more."""
    rows = train(tiny(), itertools.repeat(next(mosaics(8))), steps=60)
    assert rows[0]["loss"] > 1.9 and rows[-1]["loss"] < 1.0
    assert rows[-1]["loss"] > rows[-1]["loss_floor"] > 0
    assert rows[-1]["positive_similarity"] > rows[-1]["negative_similarity"] + 0.5


@pytest.mark.slow
def test_byol_without_its_predictor_collapses_and_is_told_so():
    cmae = tiny(loss="byol")
    cmae.predictor = torch.nn.Identity()
    row = train(cmae, mosaics(), steps=150)[-1]
    assert row["feature_std"] < 0.1 and row["loss"] < 0.02  # the loss alone looks splendid
    assert "features of different images are alike" in cmae.diagnose(row)
    assert "--method.loss info_nce" in cmae.diagnose(row)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "ema"), [("byol", 0.99), ("info_nce", 0.9)])
def test_a_healthy_run_is_told_nothing(loss, ema):
    cmae = tiny(loss=loss, ema=ema)
    rows = train(cmae, mosaics(), steps=100)
    assert [cmae.diagnose(row) for row in rows] == [None] * len(rows)
    assert rows[-1]["feature_std"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.0}, "want full or independent with mask-ratio 0, got complement"),
        ({"mask_token": False}, "complementary views share no position"),
        ({"mask_token": False, "t2": "full", "positions": "masked"}, "encoder drops what is masked"),
        ({"compare": "cls", "positions": "visible"}, "got visible and compare cls"),
        ({"mask_ratio": 0.0, "t2": "full", "positions": "masked"}, "nothing is hidden"),
        ({"t2": "full", "symmetric": True, "positions": "masked"}, "nothing is hidden"),
        ({"compare": "avg", "negatives": "image"}, "an image has one such token"),
        ({"loss": "byol", "loss_scale": "2tau"}, "2tau is of loss info_nce, got loss byol"),
        ({"color": False, "blur_p": 0.5}, "blur is one of the colors"),
        ({"cutmix": True, "compare": "patch+cls"}, "no single positive, got patch\\+cls"),
        ({"temperature": 0.0}, "method.temperature: want more than 0, got 0"),
        ({"ema": 1.0}, "method.ema: want 0 or more and less than 1, got 1"),
        ({"out": 2000}, "at most 1024 out, got 2048 and 2000"),
        ({"blur_p": 1.5}, "want a probability, got 1.5"),
        ({"mask_ratio": 1.0}, "method.mask-ratio: want a ratio between 0 and 1"),
        ({"t2_ratio": 0.0}, "method.t2-ratio: want a ratio between 0 and 1"),
    ],
)
def test_bad_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CMAEConfig(**changes)


def test_choices_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match="T1 shows 2 and T2 4 of 24 patches, which share less than one"):
        CMAEConfig(mask_token=False, t2="independent", mask_ratio=0.9, t2_ratio=0.8).build(MODEL)
    with pytest.raises(ValueError, match="want two or more positions for image, got one"):
        CMAEConfig(negatives="image", mask_ratio=0.0, t2="full").build(replace(MODEL, image_size=4))


def test_a_batch_of_one_has_no_negatives():
    assert CMAEConfig().couples_batch and CMAEConfig(loss="byol", head_norm="bn").couples_batch
    assert not CMAEConfig(loss="byol").couples_batch and not CMAEConfig(negatives="image").couples_batch
    with pytest.raises(ValueError, match="wants two or more images in a micro-batch of all ranks, got 1"):
        CMAEConfig().check_batch(1, 1)
    CMAEConfig().check_batch(1, 2)
    CMAEConfig(loss="byol").check_batch(1, 1)
    CMAEConfig(negatives="image").check_batch(1, 1)
    with pytest.raises(ValueError, match="want an even number of images per micro-batch, got 3"):
        CMAEConfig(cutmix=True).check_batch(3, 2)
    with pytest.raises(ValueError, match="got 1; take a larger --batch"):
        make_cmae()(make_pair(1))
    assert make_cmae(loss="byol")(make_pair(1)).loss.isfinite()


def test_parameter_counts_of_the_heads():  # specification, 2.3
    with torch.device("meta"):
        cmae = CMAEConfig().build(replace(MODEL, width=768, depth=1, heads=12))
    for head in (cmae.projector, cmae.predictor, cmae.target_projector):
        assert sum(p.numel() for p in head.parameters()) == 3_148_544


def test_2tau_scales_the_loss_and_nothing_else():
    a, b = (make_cmae(loss_scale=scale)(make_pair()) for scale in ("none", "2tau"))
    torch.testing.assert_close(b.loss, 0.4 * a.loss)
    torch.testing.assert_close(b.metrics["loss_chance"], torch.tensor(0.4 * math.log(6)))
