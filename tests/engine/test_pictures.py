"""The pictures: real pixels come back exactly, hidden patches are gray, and the loss is read as written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.engine import pictures
from fastmim.engine.pictures import (
    draw_loss,
    draw_reconstruction,
    read_metrics,
    reconstruction_grid,
    smoothed,
)
from fastmim.methods.base import Reconstruction
from fastmim.models.vit import ViTConfig

GAP = pictures.GAP
STATISTICS = {1: ((0.45,), (0.22,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
# 4-pixel patches of an upright and of a lying image; one channel; a patch of 8 in a single row of patches
CASES = [(24, 16, 3, 4), (16, 24, 3, 4), (16, 40, 1, 4), (8, 32, 3, 8)]


def make(height: int, width: int, channels: int, patch: int, norm_pix: bool):
    """Two images, their visible patches, and what an all-knowing network would predict, by plain loops."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, height, width, channels), generator=rng, dtype=torch.uint8)
    image[0, :patch, :patch] = 77  # a flat patch: only eps keeps it finite
    num = height // patch * (width // patch)
    seen = torch.stack([torch.randperm(num, generator=rng)[: num // 4] for _ in range(2)])
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in STATISTICS[channels])
    pred = torch.empty(2, num, patch * patch * channels)
    for b in range(2):
        for n, (y, x) in enumerate(corners(height, width, patch)):
            cell = (image[b, y : y + patch, x : x + patch].double() / 255 - mean) / std
            values = cell.flatten()
            if norm_pix:
                values = (values - values.mean()) / (values.var(unbiased=True) + 1e-6).sqrt()
            pred[b, n] = values.float()
    return image, seen, pred


def corners(height: int, width: int, patch: int) -> list[tuple[int, int]]:
    return [(y, x) for y in range(0, height, patch) for x in range(0, width, patch)]


def column(grid: torch.Tensor, b: int, k: int, height: int, width: int) -> torch.Tensor:
    """`[H, W, 3]` of sample b, column k."""
    y, x = b * (height + GAP), k * (width + GAP)
    return grid[:, y : y + height, x : x + width].permute(1, 2, 0)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("height", "width", "channels", "patch"), CASES)
def test_the_truth_as_prediction_gives_the_image_back(height, width, channels, patch, norm_pix):
    image, seen, pred = make(height, width, channels, patch, norm_pix)
    grid = reconstruction_grid(image, seen, pred, patch, *STATISTICS[channels], norm_pix=norm_pix)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * height + GAP, 4 * width + 3 * GAP)
    for b in range(2):
        for k in (0, 2, 3):
            assert torch.equal(column(grid, b, k, height, width), image[b].expand(-1, -1, 3))
    assert (grid[:, :, width : width + GAP] == 255).all()
    assert (grid[:, height : height + GAP] == 255).all()


@pytest.mark.parametrize(("height", "width", "channels", "patch"), CASES)
def test_hidden_patches_are_gray_and_visible_ones_pasted(height, width, channels, patch):
    image, seen, pred = make(height, width, channels, patch, False)
    wild = torch.where(torch.arange(pred.shape[-1]) % 2 == 0, 99.0, -99.0).expand_as(pred)  # clamped
    grid = reconstruction_grid(image, seen, wild, patch, *STATISTICS[channels], norm_pix=False)
    black_and_white = torch.where(wild[0, 0] > 0, 255, 0).to(torch.uint8).reshape(patch, patch, channels)
    for b in range(2):
        _, masked, pasted, alone = (column(grid, b, k, height, width) for k in range(4))
        for n, (y, x) in enumerate(corners(height, width, patch)):
            at = slice(y, y + patch), slice(x, x + patch)
            true, wrong = image[b][at].expand(-1, -1, 3), black_and_white.expand(-1, -1, 3)
            visible = n in seen[b].tolist()
            assert torch.equal(masked[at], true if visible else torch.full_like(true, 128))
            assert torch.equal(pasted[at], true if visible else wrong)
            assert torch.equal(alone[at], wrong)


def test_a_patch_predicted_flat_has_the_true_mean():
    image, seen, pred = make(24, 16, 3, 4, True)
    grid = reconstruction_grid(image, seen, torch.zeros_like(pred), 4, (0.0,) * 3, (1.0,) * 3, norm_pix=True)
    cell = column(grid, 1, 3, 24, 16)[8:12, 4:8]
    assert (cell == round(image[1, 8:12, 4:8].double().mean().item())).all()


def test_bf16_predictions_are_drawn():
    image, seen, pred = make(16, 24, 3, 4, True)
    grid = reconstruction_grid(image, seen, pred.bfloat16(), 4, *STATISTICS[3], norm_pix=True)
    error = column(grid, 0, 3, 16, 24).int() - image[0].int()
    assert error.abs().max() <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_BHWC": torch.zeros(2, 16, 24, 3)}, "uint8"),
        ({"image_BHWC": torch.zeros(2, 16, 24, 4, dtype=torch.uint8)}, "1 or 3"),
        ({"patch": 5}, "divisible"),
        ({"pred_BNP": torch.zeros(2, 23, 48)}, "prediction"),
        ({"seen_BK": torch.zeros(3, 6, dtype=torch.int64)}, "visible"),
        ({"mean": (0.5,)}, "3 channels"),
    ],
)
def test_rejects_what_does_not_fit(change, message):
    image, seen, pred = make(16, 24, 3, 4, True)
    given = {"image_BHWC": image, "seen_BK": seen, "pred_BNP": pred, "patch": 4}
    given |= {"mean": STATISTICS[3][0], "std": STATISTICS[3][1]}
    with pytest.raises(ValueError, match=message):
        reconstruction_grid(**(given | change), norm_pix=True)


@pytest.mark.parametrize(("height", "width", "zoom"), [(24, 16, 8), (128, 160, 1)])
def test_the_file_shows_small_images_enlarged(height, width, zoom, tmp_path):
    image, seen, pred = make(height, width, 3, 4, True)
    picture = Reconstruction(*(x.repeat(5, *[1] * (x.ndim - 1)) for x in (image, seen, pred)), True)
    model = ViTConfig(width=32, depth=1, heads=2, patch=4, image_size=(height, width))
    draw_reconstruction(picture, model, tmp_path / "r.png")
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "r.png")))
    top = sheet.shape[0] - GAP - zoom * (8 * (height + GAP) - GAP)  # eight of the ten samples
    assert sheet.shape[1] == zoom * (4 * width + 3 * GAP) + 2 * GAP
    assert 10 < top < 40
    assert (sheet[:top] < 100).any()  # captions
    first = sheet[top : top + zoom * height, GAP : GAP + zoom * width]
    assert torch.equal(first, image[0].repeat_interleave(zoom, 0).repeat_interleave(zoom, 1))


# --- the loss -------------------------------------------------------------------------------------


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, loss: float | None, **more: float) -> dict:
    return {"step": step, "epoch": step / 10, "loss": loss, "lr": 1e-4 * step, **more}


def test_of_a_step_written_twice_the_last_row_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    resumed = [row(2, 0.7, anchor=0.1), row(3, float("nan")), row(4, None)]
    write(path, [row(1, 1.0), row(2, 0.9), row(3, 0.8), *resumed])
    steps, columns = read_metrics(path)
    assert steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(columns["loss"], [1.0, 0.7, np.nan, np.nan])
    np.testing.assert_array_equal(columns["anchor"], [np.nan, 0.1, np.nan, np.nan])
    np.testing.assert_allclose(columns["lr"], [1e-4, 2e-4, 3e-4, 4e-4])


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_smoothed_is_the_mean_of_what_is_finite(window):
    values = np.random.default_rng(0).normal(size=30)
    values[[0, 7, 8, 9, 10, 11, 29]] = [np.nan, np.nan, np.inf, np.nan, np.nan, np.nan, -np.inf]
    for i, got in enumerate(smoothed(values, window)):
        around = values[max(0, i + window // 2 + 1 - window) : i + window // 2 + 1]
        around = around[np.isfinite(around)]
        np.testing.assert_allclose(got, around.mean() if len(around) else np.nan, atol=1e-12)


def drawn(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_color(pixels: np.ndarray, rgb: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels - rgb).sum(-1) < 12).sum() > 40)


def test_the_picture_has_loss_parts_and_rate(tmp_path):
    blue, orange, green, red = (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)
    rows = []
    for step in range(1, 301):
        loss = 0.5 + np.exp(-step / 60) + 0.05 * np.sin(9.1 * step)
        more = {"images_per_s": 5e3, "data_wait": 0.5, "seconds": 3.0} if step % 10 == 0 else {}
        rows.append(
            row(step, float("nan") if step % 50 == 3 else loss, distance=0.8 * loss, anchor=0.2, **more)
        )
    write(tmp_path / "metrics.jsonl", rows)
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    pixels = drawn(tmp_path / "loss.png")
    assert all(has_color(pixels, c) for c in (blue, orange, green))
    assert not has_color(pixels, red)  # images_per_s and the like are no parts of the loss

    write(tmp_path / "plain.jsonl", [{k: r[k] for k in ("step", "epoch", "loss", "lr")} for r in rows])
    draw_loss(tmp_path / "plain.jsonl", tmp_path / "plain.png")
    pixels = drawn(tmp_path / "plain.png")
    assert has_color(pixels, blue)
    assert not has_color(pixels, orange)


def test_one_row_is_a_point(tmp_path):
    write(tmp_path / "metrics.jsonl", [row(7, 0.6)])
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    pixels = drawn(tmp_path / "loss.png")
    center = pixels[:, pixels.shape[1] // 4 : -pixels.shape[1] // 4]  # left of the legend's own marker
    assert has_color(center, (31, 119, 180))


def test_only_nan_is_drawn_and_nothing_is_refused(tmp_path):
    write(tmp_path / "metrics.jsonl", [row(1, float("nan")), row(2, float("nan"))])
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert drawn(tmp_path / "loss.png").shape == (720, 960, 3)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"none in .*empty\.jsonl"):
        draw_loss(tmp_path / "empty.jsonl", tmp_path / "empty.png")
