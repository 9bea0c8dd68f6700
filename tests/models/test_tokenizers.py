"""Tokenizers: what their codes are, what their losses are, what a file holds, and DALL-E's layout."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmim.models.tokenizers import RandomConfig, load_tokenizer
from fastmim.models.tokenizers.base import code_statistics, psnr
from fastmim.models.tokenizers.dalle import DALLEConfig, logit_laplace
from fastmim.models.tokenizers.dvae import DVAEConfig
from fastmim.models.tokenizers.files import save_tokenizer
from fastmim.models.tokenizers.patches import KMeansConfig, normalized_squares
from fastmim.models.tokenizers.vq import VQConfig

SMALL = {
    "dvae": DVAEConfig(codes=32, stride=4, hidden=16, code_width=8, blocks=1),
    "dvae_large": DALLEConfig(codes=32, hidden=4, blocks_per_group=2, first_width=8),
    "vq": VQConfig(codes=32, stride=4, hidden=16, code_width=8, blocks=1),
    "kmeans": KMeansConfig(codes=32, stride=4),
}


def images(count: int = 3, height: int = 16, width: int = 24):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, 3), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("kind", [*SMALL, "random"])
def test_a_code_for_each_square_the_same_each_time_and_in_any_batch(kind):
    torch.manual_seed(0)
    tokenizer = (SMALL.get(kind) or RandomConfig(codes=32, stride=4)).build().eval()
    x, stride = images(), tokenizer.config.stride
    with torch.no_grad():
        found = tokenizer.indices(x)
        assert found.shape == (3, (16 // stride) * (24 // stride)) and found.dtype == torch.int64
        assert found.min() >= 0 and found.max() < 32
        assert torch.equal(found, tokenizer.indices(x))
        assert torch.equal(found[1:2], tokenizer.indices(x[1:2]))
    with pytest.raises(ValueError, match="want images of 3 channels and of multiples of"):
        tokenizer.indices(x[:, :15])


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_gives_back_the_same_tokenizer(kind, tmp_path):
    torch.manual_seed(0)
    tokenizer = SMALL[kind].build().eval()
    save_tokenizer(tokenizer, tmp_path / "tokenizer.safetensors")
    again = load_tokenizer(tmp_path)
    assert again.config == tokenizer.config and not any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        index = tokenizer.indices(images())
        assert torch.equal(again.indices(images()), index)
        grid = tokenizer.grid(images())
        drawn = again.picture(index, grid)
        assert drawn.shape == images().shape and drawn.dtype == torch.uint8
        assert torch.equal(drawn, tokenizer.picture(index, grid))


def test_squares_are_normalized_by_themselves():
    x = normalized_squares(images(), 4)
    assert x.shape == (3, 24, 48)
    torch.testing.assert_close(x.mean(-1), torch.zeros(3, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.var(-1), torch.ones(3, 24), rtol=1e-3, atol=0)
    first = images()[1, 4:8, 8:12].float().flatten() / 255  # second row, third column
    torch.testing.assert_close(x[1, 6 + 2], (first - first.mean()) / (first.var() + 1e-6).sqrt())
    assert normalized_squares(torch.full((1, 4, 4, 3), 7, dtype=torch.uint8), 4).abs().max() == 0


def test_random_projections_are_the_same_in_every_run():
    one, other = RandomConfig(codes=16, stride=4).build(), RandomConfig(codes=16, stride=4).build()
    assert torch.equal(one.code_KE, other.code_KE) and torch.equal(one.projection_PE, other.projection_PE)
    torch.testing.assert_close(one.code_KE.norm(dim=1), torch.ones(16))
    assert not one.draws


def test_logit_laplace_is_a_density():
    """-log p integrates, as p, to 1 over (0, 1)."""
    x = torch.linspace(1e-6, 1 - 1e-6, 400_001, dtype=torch.float64)
    for mu, log_b in ((0.0, 0.0), (1.3, -0.7), (-0.5, 0.4)):
        p = (-logit_laplace(x, torch.tensor(mu), torch.tensor(log_b))).exp()
        assert torch.trapezoid(p, x).item() == pytest.approx(1, abs=2e-3)


def test_dalle_has_the_published_sizes_and_keys():
    with torch.device("meta"):
        tokenizer = DALLEConfig().build()
    state = tokenizer.state_dict()
    assert state["encoder.blocks.input.w"].shape == (256, 3, 7, 7)
    assert state["encoder.blocks.group_4.block_1.id_path.w"].shape == (2048, 1024, 1, 1)
    assert state["encoder.blocks.group_4.block_1.res_path.conv_1.w"].shape == (512, 1024, 3, 3)
    assert state["encoder.blocks.group_4.block_2.res_path.conv_4.w"].shape == (2048, 512, 1, 1)
    assert "encoder.blocks.group_4.block_2.id_path.w" not in state
    assert state["encoder.blocks.output.conv.w"].shape == (8192, 2048, 1, 1)
    assert state["decoder.blocks.input.w"].shape == (128, 8192, 1, 1)
    assert state["decoder.blocks.group_1.block_1.res_path.conv_1.w"].shape == (512, 128, 1, 1)
    assert state["decoder.blocks.group_1.block_1.res_path.conv_4.w"].shape == (2048, 512, 3, 3)
    assert state["decoder.blocks.output.conv.w"].shape == (6, 256, 1, 1)
    assert tokenizer.encoder.blocks.group_1.block_1.gain == 1 / 64


def by_hand(state, x):
    """DALL-E's encoder from its keys, layer by layer."""

    def conv(name, x):
        w = state[f"{name}.w"]
        return F.conv2d(x, w, state[f"{name}.b"], padding=(w.shape[-1] - 1) // 2)

    x = conv("blocks.input", x)
    for g in range(1, 5):
        for b in (1, 2):
            name = f"blocks.group_{g}.block_{b}"
            skip = conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
            for i in range(1, 5):
                x = conv(f"{name}.res_path.conv_{i}", F.relu(x))
            x = skip + x / 64
        x = F.max_pool2d(x, 2) if g < 4 else x
    return conv("blocks.output.conv", F.relu(x))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_encoder_of_dalle_is_read_by_its_keys(tmp_path, suffix):
    torch.manual_seed(0)
    encoder = SMALL["dvae_large"].build().encoder
    state = {name: p.detach().contiguous() for name, p in encoder.state_dict().items()}
    path = tmp_path / f"encoder{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.config.codes == 32 and tokenizer.config.hidden == 4 and tokenizer.config.stride == 8
    assert not tokenizer.draws  # its decoder is not in the file
    x = 0.8 * images().permute(0, 3, 1, 2).float() / 255 + 0.1
    assert torch.equal(tokenizer.indices(images()), by_hand(state, x).argmax(1).flatten(1))


def test_a_pickled_module_is_refused_and_told_what_to_do(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "encoder.pkl")
    with pytest.raises(ValueError, match="of pickled modules save the state_dict"):
        load_tokenizer(tmp_path / "encoder.pkl")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"blocks.0.weight": torch.zeros(1)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="or the keys of DALL-E's encoder, got neither"):
        load_tokenizer(tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="got nothing at"):
        load_tokenizer(tmp_path / "none")


def test_a_stride_that_no_stages_make_is_refused():
    with pytest.raises(ValueError, match="stride: want a power of 2 above 1, got 6"):
        DVAEConfig(stride=6)
    with pytest.raises(ValueError, match="stride: want 8"):
        DALLEConfig(stride=4)


def test_statistics_of_codes():
    index = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    found = code_statistics(index, 8)
    assert found["perplexity"].item() == pytest.approx(4) and found["used_codes"].item() == 0.5
    alone = code_statistics(torch.zeros(2, 5, dtype=torch.int64), 8)
    assert alone["perplexity"].item() == pytest.approx(1)
    black, gray = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.full((1, 2, 2, 3), 16, dtype=torch.uint8)
    assert psnr(black, gray).item() == pytest.approx(20 * math.log10(255 / 16))
    assert psnr(gray, gray).item() == pytest.approx(98.1, abs=0.1)
