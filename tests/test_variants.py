"""Variants of a method: rows of its paper's tables by name, before scale and dotted names, kept on resume."""

import json

import pytest
import torch

from fastmim.arguments import parse
from fastmim.methods import METHODS, CMAEConfig


def run_of(*arguments: str):
    return parse(arguments)[0].run


def test_every_variant_is_a_run_that_can_be_built(torchvision_loads):
    assert {"plain", "mask", "cutmix", "color", "mask+cutmix+color"} <= METHODS["mae"].variants.keys()
    for method, config in METHODS.items():
        for name, variant in config.variants.items():
            assert variant.expected
            run = run_of("--method", method, "--variant", name)
            assert {k: getattr(run.method, k) for k in variant.changes} == dict(variant.changes)
            with torch.device("meta"):
                assert run.method.build(run.model).encoder.config == run.model


@pytest.mark.parametrize("name", METHODS["cmae"].variants)
def test_a_variant_without_mask_tokens_is_called_so_and_no_other(name):
    method = run_of("--method", "cmae", "--variant", name).method
    assert method.mask_token == (not name.startswith("no-mask-token"))
    assert (method.loss == "byol") == name.endswith("byol")
    if name in ("cls", "avg", "patch", "patch+cls"):
        assert method.compare == name


@pytest.mark.parametrize("method", ["mae", "cmae"])
def test_the_columns_of_table_5_are_what_they_say(method):
    columns = {n: v for n, v in METHODS[method].variants.items() if "ImageNet-100" in v.expected}
    assert len(columns) == 8
    for name in columns:
        m = run_of("--method", method, "--variant", name).method
        done = [
            part
            for part, is_done in {
                "mask": m.mask_ratio == 0.75, "cutmix": m.cutmix, "color": m.color not in (False, "none"),
            }.items()
            if is_done
        ]  # fmt: skip
        assert set(done) == set(name.split("+")) - {"plain"}


def test_a_variant_comes_before_dotted_names_and_is_kept_on_resume(tmp_path):
    run = run_of("--method", "cmae", "--variant", "byol", "--method.compare", "cls")
    assert (run.method.loss, run.method.compare) == ("byol", "cls")
    saved = ["--method", "cmae", "--variant", "no-mask-token", "--run-dir", str(tmp_path)]
    (tmp_path / "config.json").write_text(json.dumps({"arguments": saved}))
    assert run_of("--run-dir", str(tmp_path), "--resume").method.t2 == "full"


def test_heads_have_the_size_of_the_paper_or_of_a_small_encoder():
    assert run_of("--method", "cmae", "--data.path", "x").method == CMAEConfig()
    small = run_of("--method", "cmae")
    assert (small.method.hidden, small.method.out) == (4 * small.model.width, small.model.width)
    assert run_of("--method", "cmae", "--data.path", "x").optim.peak_lr(1024) == pytest.approx(6e-4)


@pytest.mark.parametrize("variant", ["patch", "byol", "mask"])
def test_on_cifar10_heads_have_batch_norm_and_elsewhere_none(variant):
    said = "--method", "cmae", "--variant", variant, "--data.path", "x"
    small, paper = run_of(*said, "--recipe", "cifar10").method, run_of(*said).method
    assert (small.head_norm, small.ema) == ("bn", 0.99) and (paper.head_norm, paper.ema) == ("none", 0.996)
    assert small.couples_batch
    asked = run_of(*said, "--recipe", "cifar10", "--method.head-norm", "none", "--method.ema", "0.9").method
    assert (asked.head_norm, asked.ema) == ("none", 0.9)
