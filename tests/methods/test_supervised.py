"""The supervised baseline: mixing and erasing by their published laws, the loss, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import sample_seeds

from fastmim.engine.config import make_plan
from fastmim.methods import SupervisedConfig
from fastmim.methods.mixing import (
    AREA,
    ASPECT,
    Mixing,
    beta,
    erased,
    erased_boxes,
    mixed,
    mixing_weights,
    smoothed,
)
from fastmim.models.vit import ViTConfig
from fastmim.optim.groups import parameter_groups
from fastmim.recipes import METHOD_RECIPES, varied
from tests.methods.crops import make_batch

MODEL = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=(16, 24), **SupervisedConfig.encoder)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 20_000


def seeds(count: int = COUNT) -> torch.Tensor:
    return sample_seeds(0, 0, torch.arange(count))


def make(**changes):
    torch.manual_seed(0)
    return SupervisedConfig(classes=3, **changes).build(MODEL)


def assert_same_law(ours: torch.Tensor, theirs: np.ndarray):
    """Two samples of 20,000: Kolmogorov-Smirnov, p = 0.001."""
    grid = np.unique(theirs)
    a = np.searchsorted(np.sort(ours.numpy()), grid + 1e-6, side="right") / len(ours)
    b = np.searchsorted(np.sort(theirs), grid + 1e-6, side="right") / len(theirs)
    assert abs(a - b).max() < 1.95 * math.sqrt(2 / len(ours))


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_shares_follow_timm_s_law(torchvision_loads, alphas):

    from timm.data.mixup import Mixup, cutmix_bbox_and_lam

    _, share = mixing_weights(seeds(), (32, 32), Mixing(*alphas, 1.0, 0.5))
    np.random.seed(0)
    mixup, theirs = Mixup(*alphas, None, 1.0, 0.5, "batch", 0.1, 10), []
    for _ in range(COUNT):
        lam, is_cut = mixup._params_per_batch()
        theirs.append(cutmix_bbox_and_lam((1, 3, 32, 32), lam)[1] if is_cut else lam)
    assert_same_law(share, np.array(theirs))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_beta(alpha):
    rng = torch.Generator().manual_seed(0)
    u = torch.rand(COUNT, 32, 2, generator=rng, dtype=torch.float64)
    ours = beta(u, torch.full((COUNT,), alpha, dtype=torch.float64))
    assert_same_law(ours, np.random.default_rng(0).beta(alpha, alpha, COUNT))


def test_a_cut_box_is_the_partner_s_and_its_share_that_of_the_label():
    image = torch.rand(8, 16, 24, 3)
    target = smoothed(torch.arange(8), 8, 0.1)
    x, t = mixed(image, target, seeds(8), Mixing(0.0, 1.0, 1.0, 0.5), 4)
    for b in range(8):
        partner = b // 4 * 4 + 3 - b % 4
        own, other = (x[b] == image[b]).all(-1), (x[b] == image[partner]).all(-1)
        assert (own ^ other).all()
        share = own.float().mean()
        torch.testing.assert_close(t[b], target[b] * share + target[partner] * (1 - share))


def test_mixup_and_blocks():
    image, target = torch.rand(8, 4, 4, 1), torch.eye(8)
    x, t = mixed(image, target, seeds(8), Mixing(0.8, 0.0, 1.0, 0.5), 4)
    shares = t[torch.arange(8), torch.arange(8)]
    assert len(set(shares.tolist())) == 2  # one for each block
    for b in range(8):
        partner = b // 4 * 4 + 3 - b % 4
        torch.testing.assert_close(x[b], shares[b] * image[b] + (1 - shares[b]) * image[partner])
    again, _ = mixed(image[4:], target[4:], seeds(8)[4:], Mixing(0.8, 0.0, 1.0, 0.5), 4)
    assert torch.equal(again, x[4:])  # another rank's micro-batch of the same images
    unmixed, _ = mixed(image, target, seeds(8), Mixing(0.8, 1.0, 0.0, 0.5), 4)
    assert torch.equal(unmixed, image)


def test_smoothed_labels():
    t = smoothed(torch.tensor([1, 0]), 4, 0.1)
    torch.testing.assert_close(t, torch.tensor([[0.025, 0.925, 0.025, 0.025], [0.925, 0.025, 0.025, 0.025]]))


def test_erased_boxes_follow_the_published_law():
    """Against timm's loop of tries, in plain Python."""
    size, rng, theirs = (32, 48), np.random.default_rng(0), []
    box, erases = erased_boxes(seeds(), size, 0.25)
    assert abs(erases.float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / COUNT)
    for _ in range(COUNT):
        for _ in range(10):
            area = rng.uniform(*AREA) * size[0] * size[1]
            aspect = math.exp(rng.uniform(*map(math.log, ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < size[0] and w < size[1]:
                theirs.append((h, w, rng.integers(0, size[0] - h + 1), rng.integers(0, size[1] - w + 1)))
                break
    assert len(theirs) == COUNT
    h, w, top, left = np.array(theirs).T
    for ours, other in (
        (box[:, 2] - box[:, 0], h),
        (box[:, 3] - box[:, 1], w),
        (box[:, 0], top),
        (box[:, 1], left),
    ):
        assert_same_law(ours, other)
    assert (box[:, :2] >= 0).all() and (box[:, 2] <= 32).all() and (box[:, 3] <= 48).all()


def test_what_is_erased_is_noise_of_normalized_pixels_and_the_rest_stays():
    image = torch.full((400, 16, 16, 3), 0.5)
    x = erased(image, seeds(400), 1.0, MEAN, STD)
    box, _ = erased_boxes(seeds(400), (16, 16), 1.0)
    inside = (x != image).any(-1)
    assert torch.equal(inside.sum((1, 2)), (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))
    noise = ((x - torch.tensor(MEAN)) / torch.tensor(STD))[inside]
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n) and abs(noise.std() - 1) < 4 / math.sqrt(2 * n)
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 4 * math.sqrt(0.22 / n)
    assert torch.equal(erased(image, seeds(400), 0.0, MEAN, STD), image)


def test_the_loss_is_the_published_one():
    """timm's soft-target cross entropy of the logits of what is shown, in training and without any of it."""
    method = make()
    batch = make_batch(method)
    image, target = method.shown(batch, batch.labels_B)
    logits = method.logits(image, batch.seeds_B)
    torch.testing.assert_close(method(batch).loss, F.cross_entropy(logits, target))
    plain = make(mixup=0.0, cutmix=0.0, erase=0.0, rand_augment=0.0, smoothing=0.0)
    expected = F.cross_entropy(plain.logits(batch.crops[0], batch.seeds_B), batch.labels_B)
    torch.testing.assert_close(plain(batch).loss, expected)
    assert plain.crops[0].rand_augment is None and method.crops[0].rand_augment is not None


def test_it_begins_at_the_logarithm_of_the_classes():
    method = make()
    assert float(method(make_batch(method)).loss.detach()) == pytest.approx(math.log(3), rel=1e-3)


def test_floats_are_encoded_as_the_same_bytes():
    method = make().eval()
    (image,) = make_batch(method).crops
    torch.testing.assert_close(method.logits(image.float() / 255), method.logits(image))


def test_the_class_token_is_classified_where_that_is_asked_for():
    model = replace(MODEL, final_norm=True)
    torch.manual_seed(0)
    method = SupervisedConfig(classes=3, pool="cls").build(model)
    assert not isinstance(method.fc_norm, torch.nn.LayerNorm)
    loss = method(make_batch(method)).loss
    loss.backward()
    assert method.encoder.norm.weight.grad is not None
    for pool, model in (("cls", MODEL), ("mean", replace(MODEL, final_norm=True))):
        with pytest.raises(ValueError, match="model.final-norm: want"):
            SupervisedConfig(pool=pool).build(model)


def test_timm_loads_it_strictly(torchvision_loads):

    from timm.models.vision_transformer import VisionTransformer

    method = make().eval()
    theirs = VisionTransformer(
        img_size=(16, 24), patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3, global_pool="avg"
    ).eval()
    state = {name.removeprefix("encoder."): t for name, t in method.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    batch = make_batch(method)
    x = (batch.crops[0].float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.nn.init.normal_(theirs.head.weight)
    with torch.no_grad():
        method.head.weight.copy_(theirs.head.weight)
        torch.testing.assert_close(
            method.logits(batch.crops[0]), theirs(x.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4
        )


def test_decay_and_layer_decay():
    method = make()
    groups = parameter_groups(
        method.named_parameters(), weight_decay=0.05, layer_decay=0.75, depth=2, group=method.group
    )
    names = {p: name for name, p in method.named_parameters()}
    of = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert of["head.weight"] == (1.0, 0.05) and of["fc_norm.weight"] == (1.0, 0.0)
    assert of["encoder.pos_embed"] == (0.75**3, 0.0) == of["encoder.cls_token"]
    assert of["encoder.patch_embed.proj.weight"] == (0.75**3, 0.05)
    assert of["encoder.blocks.1.mlp.fc1.weight"] == (0.75, 0.05)


def test_the_recipe_is_the_paper_s():
    run = METHOD_RECIPES["supervised"]()
    assert (run.optim.peak_lr(run.batch), run.optim.layer_decay, run.epochs) == (4e-3, 0.75, 100)
    long = varied(run, run.method.variants["300-epochs"])
    assert (long.optim.peak_lr(long.batch), long.optim.weight_decay, long.batch) == (1.6e-3, 0.3, 4096)


class Labeled:
    def __init__(self, classes: int):
        self.labels = None if classes == 0 else np.arange(48, dtype=np.int32) % classes
        self.root = "IMAGES"

    def __len__(self):
        return 48


def test_what_cannot_be_is_refused_in_words():
    run = replace(METHOD_RECIPES["supervised"](), method=SupervisedConfig(classes=5), model=MODEL, batch=16)
    assert make_plan(run, Labeled(5), world=1, device="cpu").micro_batch == 16
    with pytest.raises(ValueError, match="want at least the 6 of the data, got 5"):
        make_plan(run, Labeled(6), world=1, device="cpu")
    with pytest.raises(ValueError, match="want labeled images"):
        make_plan(run, Labeled(0), world=1, device="cpu")
    with pytest.raises(ValueError, match="multiple of 32 images, or a smaller even one, got 15"):
        run.method.check_batch(15, 1)
    with pytest.raises(ValueError, match="got 48"):
        run.method.check_batch(48, 1)
    replace(run.method, mixup=0.0, cutmix=0.0).check_batch(15, 1)
    for changes in ({"erase": 1.5}, {"mixup": 1.2}, {"classes": 1}, {"mix_block": 3}, {"rand_augment": 11.0}):
        with pytest.raises(ValueError, match="method"):
            SupervisedConfig(**changes)
    method = make()
    with pytest.raises(ValueError, match="a batch with labels"):
        method(replace(make_batch(method), labels_B=None))
