"""SimMIM: the published loss written out, its masks, its head's layout, its ViT and its Swin."""

from dataclasses import replace

import pytest
import torch
from fastmim_kernels import sample_seeds

from fastmim.methods import SimMIMConfig
from fastmim.models.vit import ViTConfig
from fastmim.optim.groups import parameter_groups
from fastmim.recipes import METHOD_RECIPES, varied
from fastmim.views import Batch

VIT = ViTConfig(
    width=32, depth=2, heads=2, patch=4, image_size=(16, 24), positions="relative", layer_scale=0.1,
    drop_path=0.2, qkv_bias="qv", init="beit",
)  # fmt: skip
SWIN = ViTConfig(width=16, depth=8, heads=1, patch=4, image_size=64)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def make(backbone: str = "vit"):
    torch.manual_seed(0)
    if backbone == "vit":
        return SimMIMConfig(mask_unit=8).build(VIT)
    return SimMIMConfig(mask_unit=32, backbone="swin").build(SWIN)


def make_batch(model: ViTConfig, size: int = 5, seed: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, *model.size, 3), generator=rng, dtype=torch.uint8)
    ids = torch.arange(size)
    return Batch((image,), sample_seeds(0, 0, ids), ids, 0)


def published(method, batch):
    """The released loss on whole images: convolution, pixel shuffle, a mask of pixels, L1."""
    (image,), model, s = batch.crops, method.model, method.stride
    seen, hidden = method.split(batch.seeds_B, s)
    z = method.encode(image, batch.seeds_B, seen)
    rows, columns = method.grid
    features = z.transpose(1, 2).unflatten(2, (rows, columns))
    weight = method.head.weight[..., None, None]
    predicted = torch.nn.functional.conv2d(features, weight, method.head.bias)
    predicted = torch.nn.functional.pixel_shuffle(predicted, s)
    mask = torch.zeros(len(image), rows * columns).scatter_(1, hidden, 1.0).view(-1, 1, rows, columns)
    mask = mask.repeat_interleave(s, 2).repeat_interleave(s, 3)
    target = ((image / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    difference = (predicted - target).abs()
    assert model.channels == 3
    return (difference * mask).sum() / (mask.sum() + 1e-5) / 3


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_the_loss_and_its_gradients_are_the_published_ones(backbone, torchvision_loads):
    method = make(backbone)
    batch = make_batch(method.model)
    expected = published(method, batch)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    loss = method(batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, p in method.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-6, msg=name)
    assert {"encoder.mask_token", "head.weight"} <= grads.keys()


def test_visible_pixels_are_no_target_and_hidden_ones_no_input():
    method = make().eval()
    batch = make_batch(VIT)
    (image,) = batch.crops
    seen, hidden = method.split(batch.seeds_B, 4)
    z = method.encode(image, batch.seeds_B, seen)
    changed = image.clone()
    for b in range(len(image)):
        for n in hidden[b].tolist():
            changed[b, n // 6 * 4 : n // 6 * 4 + 4, n % 6 * 4 : n % 6 * 4 + 4] ^= 0x7F
    assert torch.equal(method.encode(changed, batch.seeds_B, seen), z)
    assert method(replace(batch, crops=(changed,))).loss != method(batch).loss
    with torch.no_grad():
        method.head.weight.zero_()  # the encoder apart: a prediction that does not depend on what is seen
    before = method(batch).loss
    for b in range(len(image)):
        for n in seen[b].tolist():
            image[b, n // 6 * 4 : n // 6 * 4 + 4, n % 6 * 4 : n % 6 * 4 + 4] ^= 0x7F
    assert method(batch).loss == before


def test_masks_are_of_whole_cells():
    """120 of 196 patches at 224 px: 30 of 49 cells; 22 of 36 at 192 px."""
    run = METHOD_RECIPES["simmim"]()
    assert run.method.num_hidden_cells(run.model) == 30
    swin = varied(run, run.method.variants["swin-base"])
    assert swin.method.num_hidden_cells(swin.model) == 22 and swin.method.stride(swin.model) == 32
    with torch.device("meta"):
        method = run.method.build(run.model)
    seen, hidden = method.split(sample_seeds(0, 0, torch.arange(4)), 16)
    assert hidden.shape == (4, 120) and seen.shape == (4, 76)
    cells = torch.zeros(4, 196).scatter_(1, hidden, 1.0).view(4, 7, 2, 7, 2)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))


def test_parameter_counts_of_the_papers():  # specification, 1.3
    run = METHOD_RECIPES["simmim"]()
    with torch.device("meta"):
        method = run.method.build(run.model)
    assert sum(p.numel() for p in method.parameters()) == 86_256_720


def test_swin_base_is_timms_with_the_window_of_192_px(torchvision_loads):
    import timm

    run = METHOD_RECIPES["simmim"]()
    swin = varied(run, run.method.variants["swin-base"])
    with torch.device("meta"):
        encoder = swin.method.build(swin.model).encoder
        theirs = timm.create_model(
            "swin_base_patch4_window7_224", img_size=192, window_size=6, num_classes=0, global_pool=""
        )
    shapes = {name: p.shape for name, p in theirs.state_dict().items()}
    ours = {name: p.shape for name, p in encoder.state_dict().items() if name != "mask_token"}
    assert ours == shapes
    assert swin.epochs == 100 and swin.optim.schedule == "simmim"
    # 15.4 G multiplications at 224 px are 11.3 at 192: twice as many operations, and thrice with the backward
    assert swin.method.work(swin.model).flops == pytest.approx(3 * 2 * 11.3e9, rel=0.1)


def test_what_decays():
    method = make()
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05, group=method.group)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    names = dict(method.named_parameters())
    assert decay[id(names["encoder.cls_token"])] == 0 and decay[id(names["encoder.mask_token"])] == 0.05
    assert decay[id(names["encoder.rel_pos_bias.relative_position_bias_table"])] == 0.05
    assert decay[id(names["encoder.blocks.0.gamma_1"])] == 0


def test_what_decays_in_swin(torchvision_loads):
    method = make("swin")
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05, group=method.group)
    kept = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in kept and p.ndim > 1}
    assert "encoder.mask_token" in names
    assert names - {"encoder.mask_token"} == {n for n in names if n.endswith("relative_position_bias_table")}


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_picture_has_every_pixel_at_its_place(backbone, torchvision_loads):
    method = make(backbone).eval()
    batch = make_batch(method.model, 2)
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(torch.arange(len(method.head.bias)).float())
    picture = method.reconstruct(batch)
    p, s = method.model.patch, method.stride
    pixels = picture.pred_BNP.view(2, *method.model.grid, p, p, 3).permute(0, 1, 3, 2, 4, 5)
    pixels = pixels.reshape(2, *method.model.size, 3)
    for y, x, c in ((0, 0, 0), (1, 2, 1), (s - 1, s + 1, 2)):
        assert pixels[0, y, x, c] == c * s * s + (y % s) * s + x % s  # channel, row, column
    assert picture.pred_BNP.shape[1] == method.model.num_patches and not picture.norm_pix


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (
            {"mask_unit": 6},
            VIT,
            "mask-unit: want a divisor of the image, 16 x 24 px, and a multiple of the 4",
        ),
        ({"mask_unit": 16}, VIT, "mask-unit: want a divisor"),
        ({"mask_unit": 8, "mask_ratio": 0.99}, VIT, "mask-ratio: 0.99 of 6 cells leaves none visible"),
        ({"backbone": "swin"}, replace(SWIN, image_size=48), "image-size: want multiples of 32 px for swin"),
        ({"backbone": "swin"}, replace(SWIN, drop_path=0.1), "no drop path, for swin"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, model, message):
    with pytest.raises(ValueError, match=message):
        SimMIMConfig(**config).build(model)


def test_without_timm_swin_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm.models.swin_transformer", None)
    with pytest.raises(ImportError, match="swin: want timm"):
        make("swin")
