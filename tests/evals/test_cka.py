"""CKA against plain fp64 formulas, its invariances, and the command on encoders whose answers are known."""

import csv
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastmim import cli
from fastmim.evals.cka import MinibatchCKA, cka_under_occlusion, hsic_biased, hsic_unbiased, shown
from fastmim.interop.metadata import encoder_metadata
from fastmim.models.vit import Encoder, ViTConfig
from tests.data.conftest import encode

CPU = torch.device("cpu")
MODEL = ViTConfig(width=32, depth=3, heads=2, patch=4, image_size=16)


def features(B=24, D=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, D, generator=generator, dtype=torch.float64)


def u_centered(k):
    """The other way to write HSIC_1: rows and columns centered off the diagonal."""
    n = len(k)
    k = k.clone().fill_diagonal_(0)
    m = k.sum(1) / (n - 2) - k.sum() / (2 * (n - 1) * (n - 2))
    return (k - m[:, None] - m[None, :]).fill_diagonal_(0)


def test_unbiased_hsic_is_that_of_u_centered_matrices():
    x, y = features(), features(D=5, seed=1)
    k, l = x @ x.mT, y @ y.mT  # noqa: E741  as in the paper
    n = k.shape[1]
    wanted = torch.stack(
        [(u_centered(a) * u_centered(b)).sum() / (n * (n - 3)) for a, b in zip(k, l, strict=True)]
    )
    assert torch.allclose(hsic_unbiased(k, l), wanted, rtol=1e-12)


def test_biased_cka_is_that_of_column_centered_features():
    x, y = features(), features(D=5, seed=1)
    cka = MinibatchCKA("biased")
    cka.add(x.float(), y.float())
    a, b = x.float().double(), y.float().double()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norm = torch.linalg.matrix_norm
    assert torch.allclose(cka.value(), norm(b.mT @ a) ** 2 / (norm(a.mT @ a) * norm(b.mT @ b)), rtol=1e-12)
    assert torch.allclose(hsic_biased(x @ x.mT, y @ y.mT) * 23**2, ((a.mT @ b) ** 2).sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_it_is_one_of_itself_rotated_scaled_and_shifted(estimator):
    x = features()
    q, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    cka = MinibatchCKA(estimator)
    for part in x.split(8, dim=1):
        cka.add(part, 3 * part @ q + 5)
    assert torch.allclose(cka.value(), torch.ones(2, dtype=torch.float64), atol=1e-10)


def test_independent_features_are_near_zero_and_the_biased_form_is_not():
    unbiased, biased = MinibatchCKA("unbiased"), MinibatchCKA("biased")
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        x, y = (torch.randn(1, 32, 768, generator=generator) for _ in range(2))
        unbiased.add(x, y)
        biased.add(x, y)
    assert abs(float(unbiased.value())) < 0.03 and float(biased.value()) > 0.94


def test_batches_of_any_size_agree_where_all_is_one_batch_in_expectation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3000, 4, generator=generator)
    y = x + 0.5 * torch.randn(1, 3000, 4, generator=generator)
    found = []
    for size in (10, 60, 3000):
        cka = MinibatchCKA()
        for a, b in zip(x.split(size, 1), y.split(size, 1), strict=True):
            cka.add(a, b)
        found.append(float(cka.value()))
    assert max(found) - min(found) < 0.02
    few = MinibatchCKA("biased")
    for a, b in zip(x.split(10, 1), y.split(10, 1), strict=True):
        few.add(a, b)
    assert float(few.value()) - found[-1] > 0.02


def test_what_does_not_fit_is_refused():
    for shapes in ((5, 4), (6, 4)), ((2, 4, 3), (2, 5, 3)):
        with pytest.raises(ValueError, match="of the same images"):
            MinibatchCKA().add(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match="at least 4 images"):
        MinibatchCKA().add(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least one batch"):
        MinibatchCKA().value()


def images(B=48):
    torch.manual_seed(0)
    return torch.randint(0, 256, (B, 16, 16, 3), dtype=torch.uint8), torch.arange(B)


def encoder_of(mask_token=False):
    torch.manual_seed(0)
    return Encoder(MODEL, mask_token=mask_token).eval()


@pytest.mark.parametrize("pooled", ["mean", "cls", "tokens"])
@pytest.mark.parametrize("hide", ["drop", "mask_token", "zero_pixels"])
def test_under_occlusion_is_a_plain_loop(pooled, hide):
    encoder, (image, ids) = encoder_of(mask_token=True), images(8)
    from fastmim_kernels import split_patches
    from fastmim_kernels.philox import sample_seeds

    seeds = sample_seeds(5, 0, ids)
    if pooled == "tokens":
        seeds = seeds[:1].expand(8).contiguous()
    seen, _ = split_patches(seeds, 16, 4)
    found = dict(
        cka_under_occlusion(
            encoder, [(image, ids)], CPU, ratios=[0.5, 0.75], pooled=pooled, hide=hide, seed=5
        )
    )
    with torch.no_grad():
        outs = [
            encoder(tokens, outputs=[0, 1, 2])
            for tokens in (shown(encoder, image, None, hide), shown(encoder, image, seen, hide))
        ]
    for layer in range(4):
        whole, hidden = (o.blocks[layer] if layer < 3 else o.tokens_BTD for o in outs)
        if pooled == "cls":
            x, y = whole[:, 0], hidden[:, 0]
        elif pooled == "mean":
            x, y = whole[:, 1:].mean(1), hidden[:, 1:].mean(1)
        else:
            kept = 1 + seen[0]
            x, y = (
                whole[:, kept].flatten(1),
                (hidden[:, 1:] if hide == "drop" else hidden[:, kept]).flatten(1),
            )
        k, l = u_centered(x.double() @ x.double().T), u_centered(y.double() @ y.double().T)  # noqa: E741
        wanted = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
        assert torch.allclose(found[0.75][layer], wanted, atol=1e-5)


def test_zero_pixels_are_the_mean_of_the_pixels_and_nothing_else_changes():
    encoder, (image, _) = encoder_of(), images(2)
    seen = torch.tensor([[0, 5], [1, 15]])
    out = shown(encoder, image, seen, "zero_pixels").image_BHWC
    assert torch.equal(out[0, :4, :4], image[0, :4, :4]) and torch.equal(out[1, 12:, 12:], image[1, 12:, 12:])
    assert out[0, 0, 8].tolist() == [round(255 * m) for m in MODEL.pixel_mean]


def saved(path, encoder=None):
    save_file((encoder or encoder_of()).state_dict(), path, encoder_metadata(MODEL))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastmim", "cka", *map(str, arguments)])
    cli.main()


def test_the_command_writes_numbers_and_a_figure(tmp_path, monkeypatch, capsys):
    for i in range(21):
        (tmp_path / f"{i}.png").write_bytes(encode(i, size=(20, 16), fmt="PNG"))
    one, two = saved(tmp_path / "one.safetensors"), saved(tmp_path / "two.safetensors")
    run(
        monkeypatch, one, two, "--data", tmp_path, "--out", tmp_path / "new" / "f",
        "--ratios", "0.25", "0.75", "--batch", "10", "--workers", "1", "--names", "a", "b",
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "new" / "f.csv").open()))
    assert len(rows) == 2 * 2 * 4 and [r["layer"] for r in rows[:4]] == ["1", "2", "3", "norm"]
    value = {(r["checkpoint"], r["layer"], r["ratio"]): float(r["cka"]) for r in rows}
    assert all(value["a", layer, r] == value["b", layer, r] for layer in "123" for r in ("0.25", "0.75"))
    assert value["a", "1", "0.25"] > value["a", "1", "0.75"]
    said = capsys.readouterr().out
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "new" / f"f.{suffix}").read_bytes().startswith(magic) and f"f.{suffix}" in said


def test_bad_questions_are_a_line(tmp_path, monkeypatch, capsys):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encode(i, fmt="PNG"))
    weights = saved(tmp_path / "one.safetensors")
    for extra, message in [
        (("--ratios", "0.99"), "that leave one of 16 patches, got [0.99]"),
        (("--ratios", "0"), "ratios between 0 and 1"),
        (("--hide", "mask_token"), "wants an encoder with a mask token"),
        (("--images", "3"), "at least 4 images, got 3"),
        (("--batch", "0"), "--batch of at least 1, got 0"),
        (("--names", "a", "b"), "want a name for each of 1 checkpoints, got 2"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, weights, "--data", tmp_path, "--out", tmp_path / "f", "--workers", "1", *extra)
        assert stop.value.code == 2 and message in capsys.readouterr().err, message
    assert not list(tmp_path.glob("f.*"))
