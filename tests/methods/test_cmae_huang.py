"""CMAE of Huang et al. against its formulas written out plainly, and what the specification says holds."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fastmim.engine.ranks import Ranks
from fastmim.methods.cmae_huang import CMAEHuang, CMAEHuangConfig
from fastmim.models import VITS
from fastmim.models.vit import ViTConfig
from fastmim.views import SIMSIAM, Batch

from .conftest import DECODER, MODEL, make_batch
from .plain import decode, encode, patch_targets, visible_mask


def make(**changes) -> CMAEHuang:
    torch.manual_seed(0)
    fields = {"decoder": DECODER, "feature_depth": 1, "hidden": 24, "out": 16} | changes
    method = CMAEHuangConfig(**fields).build(MODEL)
    method.share(Ranks.single())
    with torch.no_grad():  # a target that is not the student
        for p in [*method.target_encoder.parameters(), *method.target_projector.parameters()]:
            p.add_(0.05 * torch.randn_like(p)) if p.ndim > 1 else None
    return method


def two_views(size: int = 6) -> Batch:
    """The target's view is another picture, so that the two cannot be taken for one another."""
    first, second = make_batch(size), make_batch(size, seed=11)
    return dataclasses.replace(first, crops=(first.crops[0], second.crops[0]))


def plain_head(x, w):
    """Linear, batch norm over the rows, ReLU, Linear without bias."""
    x = x @ w["0.weight"].T + w["0.bias"]
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt() * w["1.weight"] + w["1.bias"]
    return x.clamp(min=0) @ w["3.weight"].T


def plain(method: CMAEHuang, batch: Batch, dtype=torch.float64):
    """Both losses and the gradients of the sum, from the formulas."""
    c = method.config
    state = {
        n: t.detach().to(dtype).requires_grad_(n.split(".")[0] not in ("target_encoder", "target_projector"))
        for n, t in method.state_dict().items()
        if t.is_floating_point()
    }
    w = {part: {} for part in {n.split(".")[0] for n in state}}
    for name, t in state.items():
        part, _, rest = name.partition(".")
        w[part][rest] = t
    image, other = batch.crops
    seen, _ = method.split(batch.seeds_B)
    visible = visible_mask(seen, MODEL.num_patches)
    z = encode(image, visible, w["encoder"], MODEL.patch, MODEL.heads)
    pred = decode(z, visible, w["decoder"], DECODER.heads)
    error = (pred - patch_targets(image, MODEL.patch, dtype, norm_pix=c.norm_pix)).square().mean(-1)
    pixels = error[~visible].mean()
    y = decode(z, visible, w["feature_decoder"], DECODER.heads).mean(1)
    q = plain_head(plain_head(y, w["projector"]), w["predictor"])
    everything = torch.ones_like(visible)
    t = encode(
        other, everything, w["target_encoder"], MODEL.patch, MODEL.heads,
        cls_token=c.target_cls, final_norm=False,
    )  # fmt: skip
    k = plain_head((t[:, 1:] if c.target_cls else t).mean(1), w["target_projector"]).detach()
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    if c.loss == "byol":
        contrast = (2 - 2 * (q * k).sum(1)).mean()
    else:
        scale = 2 * c.temperature if c.loss_scale == "2tau" else 1.0
        contrast = scale * F.cross_entropy(q @ k.T / c.temperature, torch.arange(len(q)))
    (pixels + c.contrast_weight * contrast).backward()
    return pixels.detach(), contrast.detach(), {n: t.grad for n, t in state.items() if t.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": "uniform", "mask_ratio": 0.75},
        {"target_cls": False, "norm_pix": False},
        {"loss": "byol", "contrast_weight": 0.3},
        {"loss_scale": "none", "temperature": 0.3, "feature_depth": 0},
    ],
)
def test_losses_and_gradients_equal_the_formulas(changes):
    method, batch = make(**changes), two_views()
    pixels, contrast, grads = plain(method, batch)
    output = method(batch)
    output.loss.backward()
    torch.testing.assert_close(output.metrics["pixels"].double(), pixels, rtol=2e-6, atol=0)
    torch.testing.assert_close(output.metrics["contrast"].double(), contrast, rtol=2e-5, atol=0)
    expected = pixels + method.config.contrast_weight * contrast
    torch.testing.assert_close(output.loss.detach().double(), expected, rtol=1e-5, atol=0)
    checked = 0
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        largest = grads[name].abs().max()  # 0 for what batch norm takes away again
        assert (parameter.grad.double() - grads[name]).abs().max() <= 2e-4 * largest + 1e-5, name
        checked += largest > 1e-3
    assert checked > 40


def test_the_target_branch_gets_no_gradient_and_is_what_is_averaged():
    method = make()
    method(two_views()).loss.backward()
    pairs = method.averages()
    assert [student for _, student in pairs] == [method.encoder, method.projector]
    assert [teacher for teacher, _ in pairs] == [method.target_encoder, method.target_projector]
    for teacher, student in pairs:
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert [n for n, _ in teacher.named_parameters()] == [n for n, _ in student.named_parameters()]
        moved = [p for p in student.parameters() if p.requires_grad]
        assert moved and all(p.grad is not None for p in moved)
    assert method.momentum(0.0) == method.momentum(1.0) == 0.996


def test_what_the_target_sees_does_not_alter_the_pixel_loss():
    method, batch = make(), two_views()
    changed = dataclasses.replace(batch, crops=(batch.crops[0], make_batch(6, seed=12).crops[0]))
    before, after = method(batch).metrics, method(changed).metrics
    assert torch.equal(before["pixels"], after["pixels"])
    assert before["contrast"] != after["contrast"]


def test_the_views_are_two_windows_of_one_master():
    online, target = CMAEHuangConfig().build(dataclasses.replace(VITS["vit_tiny"], depth=1)).crops
    assert online.size == target.size == (224, 224) and online.master == target.master == (256, 256)
    assert (online.shift, target.shift) == (0, 31) and online.box == target.box
    assert online.color is None and target.color == SIMSIAM
    still, unmoved = make(shift=0, color=False).crops
    assert still == unmoved and still.master == still.size


def test_sizes_are_the_published_ones():
    method = CMAEHuangConfig().build(dataclasses.replace(VITS["vit_base"], depth=1))
    assert sum(p.numel() for p in method.feature_decoder.parameters()) == 7_194_880
    assert [tuple(p.shape) for p in method.predictor.parameters()] == [
        (1536, 256), (1536,), (1536,), (1536,), (256, 1536)
    ]  # fmt: skip
    seen, hidden = method.split(make_batch(3).seeds_B)
    assert seen.shape == (3, 68) and hidden.shape == (3, 128)
    cells = torch.zeros(3, 196).scatter_(1, hidden, 1.0).view(3, 7, 2, 7, 2)
    assert torch.equal(cells.amin((2, 4)), cells.amax((2, 4)))  # no cell is half hidden
    paper = CMAEHuangConfig(mask="uniform", mask_ratio=0.75).build(
        dataclasses.replace(VITS["vit_tiny"], depth=1)
    )
    assert paper.split(make_batch(3).seeds_B)[0].shape == (3, 49)


def test_what_decays_is_what_the_code_lets_decay():
    method = make()
    decayed = {name for name, p in method.named_parameters() if method.group(name, p).decay}
    assert {"projector.1.weight", "predictor.1.weight", "encoder.patch_embed.proj.weight"} <= decayed
    for name in ("encoder.cls_token", "encoder.norm.weight", "projector.0.bias", "decoder.mask_token"):
        assert name in dict(method.named_parameters()) and name not in decayed


def test_the_loss_starts_near_chance_and_says_so():
    torch.manual_seed(0)
    model = ViTConfig(width=32, depth=1, heads=2, patch=4, image_size=(16, 24))
    method = CMAEHuangConfig(decoder=DECODER, feature_depth=1, hidden=64, out=256, temperature=5.0).build(
        model
    )
    method.share(Ranks.single())
    metrics = method(two_views(32)).metrics
    scale = 2 * 5.0
    assert metrics["loss_chance"] == pytest.approx(scale * math.log(32))
    assert metrics["contrast"] == pytest.approx(scale * math.log(32), rel=0.03)
    floor = math.log(1 + 31 * math.exp(-32 / 31 / 5.0))
    assert metrics["loss_floor"] == pytest.approx(scale * floor)


def test_it_learns_to_tell_images_apart():
    method, batch = make(temperature=0.2), two_views(16)
    batch = dataclasses.replace(batch, crops=(batch.crops[1], batch.crops[1]))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    first = method(batch).metrics
    for _ in range(60):
        loss = method(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = method(batch).metrics
    assert last["pixels"] < 0.8 * first["pixels"] and last["contrast"] < 0.5 * first["contrast"]
    assert method.diagnose({k: float(v) for k, v in last.items()}) is None
    assert "are alike" in method.diagnose({"feature_std": 0.001, "feature_rank": 1.0})


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="want at least 2, got 1"):
        CMAEHuangConfig().check_batch(1, 1)
    CMAEHuangConfig().check_batch(1, 2)
    odd = ViTConfig(width=16, depth=1, heads=2, patch=4, image_size=(12, 16))
    with pytest.raises(ValueError, match=r"even sides.*got 3 x 4; --method.mask uniform"):
        CMAEHuangConfig().build(odd)
    CMAEHuangConfig(mask="uniform", decoder=DECODER).build(odd)
    for changes, message in [
        ({"mask_ratio": 0.0}, "mask-ratio"),
        ({"shift": -1}, "shift: want 0 or more, got -1"),
        ({"feature_depth": -1}, "feature-depth"),
        ({"temperature": 0.0}, "temperature"),
        ({"ema": 1.0}, "ema"),
        ({"out": 0}, "widths of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CMAEHuangConfig(**changes)
