"""Rivals do the same work: from the same weights and masks the same loss and gradients."""

import json
import subprocess
import sys
from dataclasses import replace

import fastmim_kernels
import pytest
import torch

from benchmarks import engines
from benchmarks.engines import AutocastEngine, WrongLoss
from benchmarks.provenance import ROOT
from benchmarks.rivals import race, timm_cmae, timm_mae, transformers_vitmae
from benchmarks.rivals.race import Rival, check_rival, noise_that_shows
from fastmim.methods import MAEConfig
from fastmim.models.block import Block
from fastmim.optim import OptimConfig
from tests.methods.conftest import DECODER, MODEL, make_batch
from tests.methods.test_cmae import make_cmae, make_pair


class OurBlock(Block):
    """In timm's place: a block of the same weights that adds its own branch."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, "sdpa")

    def forward(self, x):
        x, branch = super().forward(x)
        return branch.added_to(x)


def method(norm_pix: bool = True):
    torch.manual_seed(0)
    return MAEConfig(decoder=DECODER, norm_pix=norm_pix).build(MODEL)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_mae_of_timms_blocks_is_ours(norm_pix):
    ours, batch = method(norm_pix), make_batch()
    rival = Rival(timm_mae.build(ours, OurBlock), MODEL)
    expected = ours(batch).loss
    actual = rival(batch, noise_that_shows(ours, batch))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    actual.backward()
    grads = {name.partition(".")[2]: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    found = {name.partition(".")[2]: p.grad for name, p in rival.named_parameters() if p.grad is not None}
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.usefixtures("torchvision_loads")
def test_the_fine_tuning_of_timm_is_ours():
    from benchmarks.rivals import timm_finetune
    from fastmim.methods import SupervisedConfig

    model = replace(MODEL, **SupervisedConfig.encoder)
    torch.manual_seed(0)
    ours = SupervisedConfig(classes=5).build(model)
    torch.nn.init.normal_(ours.head.weight)
    rival, batch = timm_finetune.TimmFinetune(ours), engines.synthetic(ours, model.channels, 8, "cpu")
    assert timm_finetune.check_logits(rival, ours, batch) < 1e-4
    loss = rival(batch)
    loss.backward()
    assert loss.isfinite() and rival.net.patch_embed.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        rival.net.head.bias[0] += 1
    with pytest.raises(WrongLoss, match="logits of timm's model"):
        timm_finetune.check_logits(rival, ours, batch)


@pytest.mark.parametrize("name", ["decoder_pred.bias", "pos_embed", "blocks.1.mlp.fc2.weight", "mask_token"])
def test_a_peer_of_other_weights_is_not_timed(name):
    ours, batch = method(), make_batch()
    rival = timm_mae.build(ours, OurBlock)
    with torch.no_grad():
        values = rival.get_parameter(name)
        values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(WrongLoss, match="loss of the rival in fp32: want a relative error"):
        check_rival(Rival(rival, MODEL), ours, batch, "fp32")


def test_a_peer_that_hides_less_is_not_timed():
    ours, batch = method(), make_batch()
    rival = timm_mae.build(ours, OurBlock)
    rival.num_seen += 6
    with pytest.raises(WrongLoss):
        check_rival(Rival(rival, MODEL), ours, batch, "fp32")


def test_a_race_times_all_and_writes_a_row_for_each(tmp_path, monkeypatch, capsys):
    arguments = "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 16 --warmup 1"
    arguments += f" --steps 8 --engine plain --precision fp32 --no-compile --results {tmp_path}"
    assert (
        race.main("timm", "torch", lambda m: Rival(timm_mae.build(m, OurBlock), m.model), arguments.split())
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["timm eager", "plain"]
    assert all(row["steps"] == 8 and row["images_per_s"] > 0 and row["race"] == "timm" for row in rows)
    assert all(row["loss_error"] <= 1e-4 for row in rows)


def test_a_peer_of_another_loss_is_not_timed_on_the_whole_batch():
    """Ours has moved by a step when the rivals are looked at: its first loss counts, not its second."""
    ours, batch = method(), make_batch()
    engine = AutocastEngine(Rival(timm_mae.build(ours, OurBlock), MODEL), "fp32", OptimConfig())
    noise, expected = noise_that_shows(ours, batch), ours(batch).loss.item()
    race.check_whole_batch("timm eager", engine, batch, noise, expected, "fp32")
    with pytest.raises(WrongLoss, match="loss of timm eager on the whole batch: want a relative error"):
        race.check_whole_batch("timm eager", engine, batch, noise, expected * 1.001, "fp32")


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("timm_mae", "timm_cmae")]


@pytest.mark.parametrize("rival", ["transformers_vitmae", *LONG])
def test_a_race_runs_as_a_command_of_its_own(rival, tmp_path):
    """In a process where nobody has imported torchvision before."""
    pytest.importorskip(rival.partition("_")[0])
    command = f"-m benchmarks.rivals.{rival} --model vit_tiny --image-size 32 --patch 8 --batch 32 --warmup 1"
    command += f" --steps 4 --engine plain --precision fp32 --no-compile --results {tmp_path}"
    command += "" if rival == "timm_cmae" else " --decoder-size 32 1 2"
    run = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    assert {row["provider"] for row in rows} == {f"{rival.partition('_')[0]} eager", "plain"}


def test_a_peer_that_cannot_run_costs_no_other_its_row(tmp_path):
    class Hungry(Rival):
        """Wants more memory than there is for the whole batch."""

        def forward(self, batch, noise_BN=None):
            if len(batch.seeds_B) > engines.CHECK_IMAGES:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")
            return super().forward(batch, noise_BN)

    arguments = "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 8 --warmup 1"
    arguments += f" --steps 4 --engine plain --precision fp32 --no-compile --results {tmp_path}"
    race.main("timm", "torch", lambda m: Hungry(timm_mae.build(m, OurBlock), m.model), arguments.split())
    rows = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    assert {row["provider"] for row in rows} == {"plain", "timm eager"}
    (failed,) = (row for row in rows if "failed" in row)
    assert failed["provider"] == "timm eager"
    assert failed["failed"].startswith("OutOfMemoryError: CUDA out of memory")


def test_an_absent_peer_is_skipped_by_name(capsys):
    assert race.main("x", "no_such_package", lambda m: m, []) == 3
    assert "skipped: no_such_package is not installed" in capsys.readouterr().out


def test_every_weight_has_its_own_name_in_earlier_transformers():
    """Against the names of its 4.x releases, written out; those installed are checked by loading."""
    state, names_of = method().state_dict(), transformers_vitmae.EARLIER_LAYER
    pairs = [pair for name, x in state.items() for pair in transformers_vitmae.renamed(name, x, names_of)]
    names = [name for name, _ in pairs]
    block = [
        f"{part}.{kind}"
        for part in (
            "attention.attention.query", "attention.attention.key", "attention.attention.value",
            "attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before",
            "layernorm_after",
        )
        for kind in ("weight", "bias")
    ]  # fmt: skip
    layers = [f"vit.encoder.layer.{i}" for i in range(2)] + [f"decoder.decoder_layers.{i}" for i in range(2)]
    wanted = {f"{layer}.{part}" for layer in layers for part in block}
    wanted |= {f"vit.embeddings.{n}" for n in ("cls_token", "position_embeddings")}
    wanted |= {f"decoder.{n}" for n in ("mask_token", "decoder_pos_embed")}
    for n in (
        "vit.embeddings.patch_embeddings.projection", "vit.layernorm", "decoder.decoder_embed",
        "decoder.decoder_norm", "decoder.decoder_pred",
    ):  # fmt: skip
        wanted |= {f"{n}.weight", f"{n}.bias"}
    assert len(names) == len(set(names)) and set(names) == wanted
    attention, values = "vit.encoder.layer.1.attention.attention", dict(pairs)
    qkv = [values[f"{attention}.{name}.weight"] for name in ("query", "key", "value")]
    assert torch.equal(torch.cat(qkv), state["encoder.blocks.1.attn.qkv.weight"])
    assert sum(tensor.numel() for _, tensor in pairs) == sum(tensor.numel() for tensor in state.values())


def test_an_autocast_engine_learns():
    ours, batch = method(), make_batch()
    engine = AutocastEngine(Rival(timm_mae.build(ours, OurBlock), MODEL), "fp32", OptimConfig())
    losses = []
    for _ in range(5):
        torch.manual_seed(0)  # the same masks
        loss = engine.forward(batch)
        engine.backward(loss)
        engine.update()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def square():
    """Our method and a batch of square images: transformers' ViTMAE takes no others."""
    torch.manual_seed(0)
    ours = MAEConfig(decoder=DECODER).build(replace(MODEL, image_size=16))
    image = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    return ours, replace(make_batch(3), crops=(image,))


@pytest.mark.parametrize("patched", [False, True], ids=["as it is", "patched"])
@pytest.mark.parametrize("package", ["transformers", "timm"])
def test_where_it_is_installed(package, patched, torchvision_loads):
    pytest.importorskip(package)
    ours, batch = square() if package == "transformers" else (method(), make_batch())
    rival = Rival((transformers_vitmae if package == "transformers" else timm_mae).build(ours), ours.model)
    if patched:
        fastmim_kernels.apply(rival)
    check_rival(rival, ours, batch, "fp32")


def test_a_patched_peer_is_raced_against_itself(tmp_path, torchvision_loads):
    pytest.importorskip("transformers")
    arguments = (
        "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 16 --warmup 1 --apply"
    )
    arguments += f" --steps 8 --engine plain --precision fp32 --no-compile --results {tmp_path}"

    def build(m):
        return Rival(transformers_vitmae.build(m), m.model)

    assert race.main("transformers", "transformers", build, arguments.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["transformers eager", "transformers patched eager", "plain"]
    assert [row["kernels"] for row in rows[:2]] == ["the rival's own", "fastmim_kernels.apply"]
    assert all(row["loss_error"] <= 1e-4 for row in rows)


def test_the_cmae_of_timms_blocks_is_ours(monkeypatch):
    monkeypatch.setattr(timm_cmae, "timm_block", OurBlock)
    ours = make_cmae()
    batch = make_pair(6)
    rival = timm_cmae.RivalCMAE(ours)
    expected, actual = ours(batch).loss, rival(batch, noise_that_shows(ours, batch))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    actual.backward()
    compared = 0
    for name, p in ours.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(rival.get_parameter(name).grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)
            compared += 1
    assert compared > 20
    before = rival.target_projector[0].weight.clone()
    with torch.no_grad():
        rival.projector[0].weight.add_(1.0)
    rival.after_update()
    expected = before.lerp(rival.projector[0].weight, 1 - 0.996)
    torch.testing.assert_close(rival.target_projector[0].weight, expected)


def test_a_race_of_cmae_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_cmae, "timm_block", OurBlock)
    arguments = "--model vit_tiny --image-size 32 --patch 8 --batch 8 --warmup 1 --steps 4 --engine plain"
    arguments += f" --precision fp32 --no-compile --results {tmp_path}"
    assert race.main("timm", "torch", timm_cmae.RivalCMAE, arguments.split(), of="cmae") == 0
    rows = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["timm eager", "plain"]
    assert all(row["method"] == "cmae" and row["loss_error"] <= 1e-4 for row in rows)
