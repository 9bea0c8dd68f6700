"""The reference FLOPs: the published totals, and torch's counter on the methods as their papers have them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import step_flops, work
from fastmim.interop.mae import to_mae
from fastmim.methods import CMAEConfig, MAEConfig, RMAEConfig
from fastmim.methods.base import MethodConfig
from fastmim.models import VITS
from fastmim.models.vit import ViTConfig
from tests.methods import cmae_plain, plain, test_cmae_huang
from tests.methods.conftest import DECODER, MODEL, make_batch
from tests.methods.test_cmae import make_cmae, make_pair


@pytest.mark.parametrize(
    ("method", "size", "gflop"),
    [
        (MAEConfig(), "vit_base", 58.5),
        (MAEConfig(), "vit_large", 124.2),
        (RMAEConfig(), "vit_base", 168.8),
        (RMAEConfig(), "vit_large", 431.4),
    ],
)
def test_published_totals(method, size, gflop):
    assert step_flops(method, VITS[size]) / 1e9 == pytest.approx(gflop, rel=1e-3)


def test_published_parts():
    encoder, decoder = work(MAEConfig(), VITS["vit_base"]).stacks
    parts = [sum(x.flops for x in s.linears()) + s.attention_flops for s in (encoder, decoder)]
    assert [part / 1e9 for part in parts] == pytest.approx([25.8, 31.7], rel=2e-3)


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, width=48, depth=3, patch=8)], ids=["small", "wide"])
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_mae_against_torchs_counter(model, ratio):
    """The plain form embeds every patch by a convolution and writes attention as products of matrices."""
    config = MAEConfig(mask_ratio=ratio, decoder=DECODER)
    assert counted(config, model) == step_flops(config, model)


@pytest.mark.parametrize("t2", ["complement", "full", "independent"])
def test_rmae_against_torchs_counter(t2):
    config = RMAEConfig(t2=t2, decoder=DECODER)
    patch_embedding = work(config, MODEL).others[0].flops  # the plain form embeds anew for each view
    assert counted(config, MODEL) == step_flops(config, MODEL) + patch_embedding


@pytest.mark.parametrize("size", ["vit_base", "vit_large"])
def test_published_total_of_cmae(size):
    """About 144 and 496 GFLOP are published, which leaves out the backward of the heads."""
    published = {"vit_base": 144, "vit_large": 496}[size]
    backward = 2 / 3 * sum(linear.flops for linear in work(CMAEConfig(), VITS[size]).others[1:5])
    assert (step_flops(CMAEConfig(), VITS[size]) - backward) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compare": "cls"},
        {"compare": "patch+cls", "symmetric": True},
        {"mask_token": False, "t2": "full"},
        {"mask_token": False, "t2": "independent", "symmetric": True},
    ],
    ids=str,
)
def test_cmae_against_torchs_counter(changes):
    cmae = make_cmae(**changes)
    with FlopCounterMode(display=False) as counter:
        cmae_plain.loss_and_gradients(cmae, make_pair(4), None, torch.float32)
    assert counter.get_total_flops() == 4 * step_flops(cmae.config, MODEL)


@pytest.mark.parametrize("changes", [{}, {"target_cls": False, "mask": "uniform"}], ids=str)
def test_cmae_of_huang_against_torchs_counter(changes):
    method = test_cmae_huang.make(loss="byol", **changes)  # whose similarity is no product of matrices
    with FlopCounterMode(display=False) as counter:
        test_cmae_huang.plain(method, test_cmae_huang.two_views(4), torch.float32)
    assert counter.get_total_flops() == 4 * step_flops(method.config, MODEL)


def test_a_method_without_a_formula_is_refused():
    with pytest.raises(NotImplementedError, match="unknown does not say what it computes: Unknown.work"):
        step_flops(type("Unknown", (MethodConfig,), {"name": "unknown"})(), MODEL)


def counted(config: MAEConfig, model: ViTConfig) -> int:
    """FLOPs per image that torch counts in the method's plain form, forward and backward."""
    batch = make_batch(3)
    method = config.build(model)
    weights = {name: tensor.requires_grad_() for name, tensor in to_mae(method.state_dict()).items()}
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name].requires_grad_(False)
    views = method.transform(batch.seeds_B)[:2] if isinstance(config, RMAEConfig) else None
    if views is None:
        views = (torch.arange(method.num_seen).expand(3, -1),)
    loss = torch.zeros(())
    with FlopCounterMode(display=False) as counter:
        for seen in views:
            visible = plain.visible_mask(seen, model.num_patches)
            z = plain.encode(batch.crops[0], visible, weights, model.patch, model.heads)
            pred = plain.decode(z, visible, weights, DECODER.heads)
            loss = loss + pred.square().mean()
        loss.backward()
    total = counter.get_total_flops()
    assert total % 3 == 0
    return total // 3
