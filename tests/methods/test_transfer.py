"""Fine-tuning and linear probes: their numbers against formulas, timm and the repository; what is frozen."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmim.data.augment.crop import draw_boxes
from fastmim.interop.encoders import Pretrained, transfer
from fastmim.methods.supervised import judged
from fastmim.methods.transfer import FinetuneConfig, LinearConfig
from fastmim.models.embed import resize_positions
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.optim.groups import parameter_groups
from fastmim.optim.lars import LARS
from fastmim.recipes import RECIPES, varied
from fastmim.views import Batch, Crop

MODEL = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=16)


def make_batch(B=8, classes=3, size=16):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8)
    return Batch((image,), torch.arange(B) * 7919 + 1, torch.arange(B), 0, torch.arange(B) % classes)


# --- fine-tuning ------------------------------------------------------------------------------------------


def test_recipes_are_the_published_numbers():
    run = RECIPES["finetune"]()
    kz, repo = (varied(run, run.method.variants[name]) for name in ("kz", "mae-repo"))
    assert kz == run and run.optim.peak_lr(1024) == 4e-3 and run.optim.layer_decay == 0.75
    assert repo.optim.peak_lr(1024) == 2e-3 and repo.optim.layer_decay == 0.65
    assert run.model.drop_path == 0.1 and not run.model.final_norm and run.optim.betas == (0.9, 0.999)
    linear = RECIPES["linear"]()
    assert linear.optim.peak_lr(16384) == pytest.approx(6.4) and linear.optim.weight_decay == 0
    assert linear.epochs == 90 and linear.optim.warmup_epochs == 10 and linear.zero == 0


def test_layer_decay_is_one_for_the_head_and_thirteen_powers_for_the_patches():
    model = ViTConfig(width=32, depth=12, heads=2, patch=4, image_size=16, final_norm=False)
    method = FinetuneConfig(classes=3).build(model)
    groups = parameter_groups(
        method.named_parameters(), weight_decay=0.05, layer_decay=0.75, depth=12, group=method.group
    )
    of = {id(p): group for group in groups for p in group["params"]}
    scale = {name: of[id(p)]["lr_scale"] for name, p in method.named_parameters() if p.requires_grad}
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1
    assert scale["encoder.patch_embed.proj.weight"] == pytest.approx(0.75**13)
    assert scale["encoder.blocks.11.mlp.fc1.weight"] == pytest.approx(0.75)
    assert (
        of[id(method.head.bias)]["weight_decay"] == 0 and of[id(method.head.weight)]["weight_decay"] == 0.05
    )


@pytest.mark.usefixtures("torchvision_loads")
def test_layer_decay_is_that_of_timm():
    from timm.models import VisionTransformer
    from timm.optim import param_groups_layer_decay

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
    theirs = VisionTransformer(**sizes, global_pool="avg")
    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.65)
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    method = FinetuneConfig(classes=3).build(
        ViTConfig(width=32, depth=3, heads=2, patch=4, image_size=16, final_norm=False, positions="learned")
    )
    ours = parameter_groups(
        method.named_parameters(), weight_decay=0.05, layer_decay=0.65, depth=3, group=method.group
    )
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in ours for p in group["params"]}
    names = dict(theirs.named_parameters())
    for name, parameter in method.named_parameters():
        scale, decay = of[id(names[name.removeprefix("encoder.")])]
        assert found[id(parameter)] == (pytest.approx(scale), decay), name


def pretrained(model, seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(model)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Pretrained(encoder, {}, "x", "x", {})


def test_an_encoder_is_taken_without_its_norm_and_positions_are_resized():
    found = pretrained(MODEL)
    larger = ViTConfig(
        width=32, depth=2, heads=2, patch=4, image_size=(24, 16), positions="learned", final_norm=False
    )
    method = FinetuneConfig(classes=3).build(larger)
    words = transfer(found, method.start)
    assert "without its last norm" in words and "4 x 4 patches resized to 6 x 4" in words
    mine, theirs = method.encoder.state_dict(), found.encoder.state_dict()
    assert torch.equal(mine["pos_embed"], resize_positions(theirs["pos_embed"], (4, 4), (6, 4)))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name != "pos_embed")
    assert torch.equal(method.fc_norm.weight, torch.ones(32)) and not method.head.bias.any()
    assert method.encoder.pos_embed.requires_grad


def test_what_cannot_be_taken_is_said():
    relative = pretrained(ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=16, positions="relative"))
    other = ViTConfig(
        width=32, depth=2, heads=2, patch=4, image_size=24, positions="relative", final_norm=False
    )
    with pytest.raises(
        ValueError, match="relative positions of x are of, which cannot be resized; got 6 x 6"
    ):
        transfer(relative, Encoder(other))
    with pytest.raises(ValueError, match="patch_embed.proj.weight is"):
        transfer(pretrained(MODEL), Encoder(ViTConfig(width=32, depth=2, heads=2, patch=8, image_size=32)))


def test_judged_counts_what_is_there():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2, -3]] * 4)
    found = judged(logits, torch.tensor([0, 4, 5, -1]), "cls/")
    assert {name: float(v) for name, v in found.metrics.items() if "loss" not in name} == {
        "images": 3, "cls/top1": 1, "cls/top5": 2,
    }  # fmt: skip
    expected = F.cross_entropy(logits[:3], torch.tensor([0, 4, 5]), reduction="sum")
    assert float(found.metrics["cls/loss"]) == pytest.approx(float(expected))
    few = judged(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert float(few.metrics["top1"]) == 0 and float(few.metrics["top5"]) == 1


def test_an_evaluation_is_of_the_clean_images():
    method = FinetuneConfig(classes=3).build(
        ViTConfig(**{**vars(MODEL), "final_norm": False, "drop_path": 0.5})
    )
    torch.nn.init.normal_(method.head.weight)
    method.eval()
    batch = make_batch()
    with torch.no_grad():
        logits, found = method.logits(batch.crops[0]), method(batch).metrics
    assert float(found["top1"]) == float((logits.argmax(1) == batch.labels_B).sum())
    assert float(found["loss"]) == pytest.approx(
        float(F.cross_entropy(logits, batch.labels_B, reduction="sum"))
    )


# --- the linear probe -------------------------------------------------------------------------------------


def probe(**changes):
    torch.manual_seed(0)
    method = LinearConfig(classes=3, **changes).build(MODEL)
    for module in method.frozen.values():
        module.requires_grad_(False)
    return method


def test_two_classifiers_learn_apart_and_the_encoder_stays():
    method, batch = probe(), make_batch()
    before = copy.deepcopy(method.start.state_dict())
    method.train()
    method(batch).loss.backward()
    features = method.features(batch.crops[0])
    for name, head in method.heads.items():
        x = features[name]
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
        weight = head.linear.weight.detach().clone().requires_grad_()
        F.cross_entropy(x @ weight.T + head.linear.bias.detach(), batch.labels_B).backward()
        torch.testing.assert_close(head.linear.weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
        assert head.linear.weight.std() < 0.012 and not head.linear.bias.any()
    assert [name for name, _ in method.named_parameters()] == [
        f"heads.{name}.linear.{part}" for name in ("cls", "mean") for part in ("weight", "bias")
    ]
    after = method.start.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in method.start.parameters())


def test_batch_norm_is_by_running_means_in_evaluation():
    method, batch = probe(), make_batch()
    method.train()
    for _ in range(3):
        method(batch)
    method.eval()
    whole = method(batch).metrics
    parts = [
        method(Batch((batch.crops[0][i : i + 1],), batch.seeds_B[i : i + 1], batch.ids_B[i : i + 1], 0,
                     batch.labels_B[i : i + 1])).metrics
        for i in range(8)
    ]  # fmt: skip
    for name in ("cls/top1", "mean/top1", "cls/loss", "mean/loss", "images"):
        assert float(whole[name]) == pytest.approx(sum(float(part[name]) for part in parts), rel=1e-4)
    assert isinstance(probe(norm=False).heads["cls"].norm, torch.nn.Identity)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_its_formula(weight_decay):
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([matrix, vector, zero], lr=0.1, weight_decay=weight_decay)
    wanted = [p.detach().double().clone() for p in (matrix, vector, zero)]
    momenta = [torch.zeros_like(p) for p in wanted]
    for step in range(3):
        gradients = [torch.randn_like(p) for p in (matrix, vector, zero)]
        if step == 2:
            gradients[2].zero_()
        for p, g in zip((matrix, vector, zero), gradients, strict=True):
            p.grad = g
        optimizer.step()
        for i, g in enumerate(gradients):
            g = g.double()
            if i != 1:
                g = g + weight_decay * wanted[i]
                if wanted[i].norm() > 0 and g.norm() > 0:
                    g = g * 0.001 * wanted[i].norm() / g.norm()
            momenta[i] = 0.9 * momenta[i] + g
            wanted[i] = wanted[i] - 0.1 * momenta[i]
    for p, w in zip((matrix, vector, zero), wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-7)


def test_lars_wants_whole_tensors():
    from dataclasses import replace

    run = RECIPES["linear"]()
    with pytest.raises(ValueError, match="zero: want 0 with --optim.name lars"):
        replace(run, zero=1)


def test_its_crops_are_one_draw_cut_to_the_image():
    crop = Crop(size=(16, 16), scale=(0.08, 1.0), clamp=True)
    sizes = np.array([[100, 400], [300, 90], [64, 64]] * 4000)
    boxes, _ = draw_boxes(torch.arange(len(sizes)) * 1009 + 5, sizes, crop)
    top, left, h, w = boxes.T
    assert (
        (h >= 1).all()
        and (top >= 0).all()
        and (top + h <= sizes[:, 0]).all()
        and (left + w <= sizes[:, 1]).all()
    )
    random = np.random.default_rng(0)  # the same law by other numbers
    for k, (height, width) in enumerate(((100, 400), (300, 90), (64, 64))):
        area = height * width * random.uniform(0.08, 1.0, 40_000)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), 40_000))
        their_h = np.minimum(np.round(np.sqrt(area / aspect)), height)
        their_w = np.minimum(np.round(np.sqrt(area * aspect)), width)
        for ours, theirs in ((h[k::3], their_h), (w[k::3], their_w)):
            assert abs(ours.mean() - theirs.mean()) < 0.02 * theirs.mean()
            for q in (0.1, 0.5, 0.9):
                assert abs(np.quantile(ours, q) - np.quantile(theirs, q)) < 0.04 * theirs.mean() + 1
    plain, _ = draw_boxes(torch.arange(len(sizes)) * 1009 + 5, sizes, Crop(size=(16, 16), scale=(0.08, 1.0)))
    assert (plain != boxes).any()
