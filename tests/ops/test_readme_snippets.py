"""The README's code for other codebases, run as it stands: on tiny sizes, on the CPU or the GPU."""

import re
from pathlib import Path

import fastmim_kernels
import pytest
import torch
from torch import nn

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = re.search(r"## In your own code\n(.*?)\n## ", README.read_text(), re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION[1], re.DOTALL) if SECTION else []


def test_the_section_has_two_of_them():
    assert len(SNIPPETS) == 2


def test_apply_in_five_lines(torchvision_loads, device, capsys):
    transformers = pytest.importorskip("transformers")
    lines = [line for line in SNIPPETS[0].splitlines() if line]
    assert len(lines) == 5
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config).to(device)
    classes = [type(m) for m in model.modules()]
    names = {"model": model, "pixels": torch.rand(2, 3, 32, 32, device=device)}
    exec(SNIPPETS[0], names)
    assert names["loss"].isfinite() and model.vit.layers[0].mlp.fc1.bias.grad.any()
    table = capsys.readouterr().out
    assert all(op in table for op in ("add_layer_norm", "bias_gelu", "norm_pix_loss_image", "why not"))
    assert [type(m) for m in model.modules()] == classes


def test_a_plain_training_loop_learns(device, monkeypatch):
    torch.manual_seed(0)
    width, patch, num_patches = 32, 4, 16

    def transformer(depth):
        layer = nn.TransformerEncoderLayer(width, 2, 64, 0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    modules = nn.ModuleDict(
        {
            "encoder": transformer(2),
            "decoder": transformer(1),
            "embed": nn.Linear(48, width),
            "head": nn.Linear(width, 48),
        }
    ).to(device)
    pos, mask_token = (
        torch.randn(*size, device=device).mul_(0.02).requires_grad_()
        for size in ((num_patches, width), (width,))
    )
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    images = torch.stack([(x * (i + 1) * 5 + y * 7) % 256 for i in range(8)])[..., None].expand(-1, -1, -1, 3)
    loader = [(images.to(torch.uint8).to(device), torch.arange(8))]
    losses = []
    real = fastmim_kernels.norm_pix_loss_image

    def recorded(*args):
        out = real(*args)
        losses.append(out.mean().item())
        return out

    monkeypatch.setattr(fastmim_kernels, "norm_pix_loss_image", recorded)
    parameters = [*modules.parameters(), pos, mask_token]
    names = dict(modules.items()) | {
        "epochs": 60, "loader": loader, "patch": patch, "num_patches": num_patches, "pos": pos,
        "mask_token": mask_token, "optimizer": torch.optim.AdamW(parameters, 3e-3),
    }  # fmt: skip
    before = [p.detach().clone() for p in parameters]
    exec(SNIPPETS[1], names)
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
