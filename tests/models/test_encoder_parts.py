"""The encoder's optional parts: three kinds of positions, several sizes in one pass, drop path, weights."""

from dataclasses import replace

import pytest
import torch
from fastmim_kernels import sample_seeds
from torch import nn

from fastmim.models import VITS, resized
from fastmim.models.block import Block, CrossBlock
from fastmim.models.embed import num_offsets, relative_index, resize_positions
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig

SMALL = ViTConfig(width=32, depth=3, heads=4, patch=4, image_size=(16, 24))
BEIT = replace(SMALL, positions="relative", layer_scale=0.1, drop_path=0.5, qkv_bias="qv", init="beit")
DINO = replace(SMALL, positions="learned", init="dino")


def image(height: int = 16, width: int = 24, batch: int = 3, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=rng)


def make(config: ViTConfig, mask_token: bool = False) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config, mask_token)
    for name, p in encoder.named_parameters():
        if "relative_position" in name:
            nn.init.normal_(p)
    return encoder


# --- inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, DINO, BEIT], ids=["sincos", "learned", "relative"])
def test_images_of_several_sizes_packed_together_equal_passes_of_their_own(config):
    encoder = make(config).eval()
    pictures = [image(), image(seed=1), image(8, 8, seed=2), image(8, 12, seed=3), image(seed=4)]
    packed = encoder(*map(Tokens, pictures))
    assert packed.lengths == (25, 25, 5, 7, 25)
    for part, picture in zip(packed.split(), pictures, strict=True):
        torch.testing.assert_close(part, encoder(Tokens(picture)).tokens_BTD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.class_tokens()[:, 2], packed.split()[2][:, 0])


def test_a_small_image_gets_positions_of_its_own_grid_and_not_the_first_rows():
    """96 px in an encoder of 224 px: once the first 36 of 196 rows."""
    encoder = Encoder(ViTConfig(width=32, depth=1, heads=2))
    table = encoder.positions((6, 6))
    expected = resize_positions(encoder.pos_embed, (14, 14), (6, 6))[0]
    torch.testing.assert_close(table, expected)
    assert table.shape == (37, 32) and not torch.equal(table, encoder.pos_embed[0, :37])
    assert encoder(Tokens(image(96, 96))).tokens_BTD.shape == (3, 37, 32)
    masked = make(ViTConfig(width=32, depth=1, heads=2), mask_token=True)
    hidden = torch.zeros(3, 36, dtype=torch.bool)
    assert masked(Tokens(image(96, 96), hidden_BN=hidden)).tokens_BTD.shape == (3, 37, 32)


def test_learned_positions_are_resampled_as_dino_does_and_get_a_gradient():
    encoder = make(replace(DINO, image_size=56, patch=4))
    table = encoder.positions((6, 6))
    grid = encoder.pos_embed[:, 1:].view(1, 14, 14, 32).permute(0, 3, 1, 2)
    factor = (6 + 0.1) / 14
    expected = nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    torch.testing.assert_close(table[1:], expected.permute(0, 2, 3, 1).reshape(36, 32))
    table.sum().backward()
    assert encoder.pos_embed.grad.any()


def test_masks_may_hide_another_number_in_each_image():
    encoder = make(SMALL, mask_token=True).eval()
    hidden = torch.zeros(3, 24, dtype=torch.bool)
    hidden[0, :5], hidden[1, 3] = True, True
    z = encoder(Tokens(image(), hidden_BN=hidden)).tokens_BTD
    for b in range(3):
        seen = (~hidden[b]).nonzero().T
        alone = encoder(Tokens(image()[b : b + 1], seen, mask_tokens=True)).tokens_BTD
        torch.testing.assert_close(z[b : b + 1], alone, rtol=1e-4, atol=1e-5)
    changed = image()
    changed[0, :4, :20] ^= 0x7F  # the first five patches
    assert torch.equal(encoder(Tokens(changed, hidden_BN=hidden)).tokens_BTD, z)


def test_streams_after_chosen_blocks():
    encoder = make(BEIT).eval()
    z = encoder(Tokens(image()), outputs=(0, 2), final_norm=False)
    assert set(z.blocks) == {0, 2} and torch.equal(z.blocks[2], z.tokens_BTD)
    first = replace(BEIT, depth=1)
    one = make(first).eval()
    one.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in one.state_dict()})
    torch.testing.assert_close(one(Tokens(image()), final_norm=False).tokens_BTD, z.blocks[0])


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (SMALL, [Tokens(image(15, 24))], "multiples of the patch, 4 px, got 3 channels of 15 x 24"),
        (SMALL, [Tokens(image()[..., :1])], "want images of 3 channels .* got 1 channels"),
        (SMALL, [Tokens(image(), hidden_BN=torch.zeros(3, 24, dtype=torch.bool))], "one without"),
        (
            BEIT,
            [Tokens(image(32, 24))],
            "at most 4 x 6 patches, of which there are relative positions",
        ),
        (BEIT, [Tokens(image(), torch.zeros(3, 1, dtype=torch.int64))], "with relative positions, got some"),
        (SMALL, [], "at least one image to encode, got none"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(config, inputs, message):
    with pytest.raises(ValueError, match=message):
        Encoder(config).eval()(*inputs)


def test_other_bad_inputs_are_refused():
    seen, hidden = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="seen or those that are hidden, got both"):
        Tokens(image(), seen, hidden)
    with pytest.raises(ValueError, match="beside mask tokens, got none"):
        Tokens(image(), mask_tokens=True)
    with pytest.raises(ValueError, match="want a mask of 3 images of 4 x 6 patches"):
        make(SMALL, mask_token=True)(Tokens(image(), hidden_BN=hidden))
    with pytest.raises(ValueError, match="outputs of blocks 0 to 2, got"):
        Encoder(SMALL)(Tokens(image()), outputs=(3,))
    with pytest.raises(ValueError, match="no relative positions, for an encoding without a class token"):
        Encoder(BEIT).eval()(Tokens(image()), class_token=False)
    with pytest.raises(ValueError, match="want the seeds of the samples in training"):
        Encoder(BEIT).train()(Tokens(image()))
    with pytest.raises(ValueError, match="layer-scale, model.drop-path"):
        replace(SMALL, drop_path=1.0)


# --- relative positions ------------------------------------------------------------------------------


def test_the_index_of_relative_positions_is_beits():
    index = relative_index((14, 14), (14, 14), torch.device("cpu"))
    assert num_offsets((14, 14)) == 732 and index.shape == (197, 197)
    assert index[0, 0] == 731 and (index[0, 1:] == 729).all() and (index[1:, 0] == 730).all()
    for i, j in ((0, 0), (5, 190), (77, 3)):
        down, right = i // 14 - j // 14, i % 14 - j % 14
        assert index[1 + i, 1 + j] == (down + 13) * 27 + right + 13
    small = relative_index((14, 14), (6, 6), torch.device("cpu"))
    assert small[1, 2] == index[1, 2] and small[1, 7] == index[1, 15]  # the same offsets of another grid


@pytest.mark.parametrize("kind", ["relative", "relative_per_block"])
def test_relative_positions_are_added_to_the_logits(kind):
    """Against blocks written out: keys timm's Beit has, a bias of queries and values, LayerScale."""
    encoder = make(replace(BEIT, positions=kind)).eval()
    state = {k: v.double() for k, v in encoder.state_dict().items()}
    index = relative_index((4, 6), (4, 6), torch.device("cpu"))

    def norm(x, name):
        return nn.functional.layer_norm(x, (32,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    everything = torch.arange(24).expand(3, 24)
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), encoder.patch_embed(image(), everything)], 1).double()
    for i in range(3):
        b = f"blocks.{i}"
        key = "rel_pos_bias" if kind == "relative" else f"{b}.attn"
        bias = state[f"{key}.relative_position_bias_table"][index].permute(2, 0, 1)
        qkv = norm(x, f"{b}.norm1") @ state[f"{b}.attn.qkv.weight"].T
        zero = torch.zeros(32)
        qkv = qkv + torch.cat([state[f"{b}.attn.q_bias"], zero, state[f"{b}.attn.v_bias"]])
        q, k, v = qkv.view(3, 25, 3, 4, 8).permute(2, 0, 3, 1, 4)
        out = (q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2) @ state[f"{b}.attn.proj.weight"].T + state[f"{b}.attn.proj.bias"]
        x = x + state[f"{b}.gamma_1"] * out
        h = norm(x, f"{b}.norm2") @ state[f"{b}.mlp.fc1.weight"].T + state[f"{b}.mlp.fc1.bias"]
        h = nn.functional.gelu(h) @ state[f"{b}.mlp.fc2.weight"].T + state[f"{b}.mlp.fc2.bias"]
        x = x + state[f"{b}.gamma_2"] * h
    torch.testing.assert_close(
        encoder(Tokens(image())).tokens_BTD.double(), norm(x, "norm"), rtol=1e-4, atol=1e-5
    )


# --- drop path -----------------------------------------------------------------------------------------


def test_drop_path_is_a_function_of_the_samples_seeds():
    encoder = make(replace(BEIT, depth=4)).train()
    seeds, pictures = sample_seeds(0, 0, torch.arange(6)), image(batch=6)
    whole = encoder(Tokens(pictures), seeds_B=seeds).tokens_BTD
    again = torch.cat([encoder(Tokens(pictures[i : i + 2]), seeds_B=seeds[i : i + 2])[0] for i in (0, 2, 4)])
    torch.testing.assert_close(whole, again, rtol=1e-4, atol=1e-5)
    other = encoder(Tokens(pictures), seeds_B=sample_seeds(0, 1, torch.arange(6))).tokens_BTD
    assert not torch.allclose(whole, other, atol=1e-3)
    assert not torch.allclose(whole, encoder.eval()(Tokens(pictures)).tokens_BTD, atol=1e-3)


def test_each_branch_of_each_segment_is_kept_with_its_blocks_probability():
    encoder = Encoder(replace(SMALL, depth=5, drop_path=0.4)).train()
    keeps = encoder.drop_path(sample_seeds(3, 0, torch.arange(4000)), (3, 2))
    assert keeps[0] is None
    for i, keep in enumerate(keeps[1:], start=1):
        p = 0.1 * i
        assert keep.shape == (2, 4000, 5)
        assert keep.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
        assert (keep == 0).float().mean().item() == pytest.approx(p, abs=0.02)
        assert torch.equal(keep[:, :, 0], keep[:, :, 2]) and not torch.equal(keep[:, :, 0], keep[:, :, 3])
        assert not torch.equal(keep[0], keep[1])


# --- first weights --------------------------------------------------------------------------------------


def test_first_weights_of_beit():
    encoder = Encoder(replace(VITS["vit_base"], depth=12, layer_scale=0.1, qkv_bias="qv", init="beit"))
    qkv = encoder.blocks[3].attn.qkv.weight
    assert qkv.std().item() == pytest.approx(0.0108, rel=0.02) and qkv.abs().max() <= 0.02
    for layer in (1, 12):
        block = encoder.blocks[layer - 1]
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.0108 / (2 * layer) ** 0.5, rel=0.02)
    assert encoder.patch_embed.proj.weight.abs().max() <= 0.02 and not encoder.patch_embed.proj.bias.any()
    assert (encoder.blocks[0].gamma_1 == 0.1).all() and not encoder.blocks[0].attn.q_bias.any()
    assert "blocks.0.attn.qkv.bias" not in encoder.state_dict()


@pytest.mark.parametrize(
    ("init", "qkv", "patch", "patch_bias", "token"),
    [
        ("mae", (6 / (4 * 768)) ** 0.5, (6 / (768 + 768)) ** 0.5, True, 0.02),
        ("moco", (6 / (2 * 768)) ** 0.5, (6 / (768 + 768)) ** 0.5, False, 1e-6),
        ("cae", (6 / (4 * 768)) ** 0.5, None, False, 0.02),
        ("dino", None, 768**-0.5, True, 0.02),
    ],
)
def test_first_weights_of_the_others(init, qkv, patch, patch_bias, token):
    """Bounds of uniform draws; None: normal with a deviation of 0.02."""
    torch.manual_seed(0)
    encoder = Encoder(
        ViTConfig(width=768, depth=1, heads=12, positions="learned", init=init), mask_token=True
    )
    for weight, bound in (
        (encoder.blocks[0].attn.qkv.weight, qkv),
        (encoder.patch_embed.proj.weight, patch),
    ):
        if bound is None:
            assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        else:
            assert 0.99 * bound < weight.abs().max() <= bound
    assert encoder.patch_embed.proj.bias.any() == patch_bias
    assert encoder.cls_token.std().item() == pytest.approx(token, rel=0.1)
    if init == "dino":
        assert encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)


# --- cross attention, sizes -------------------------------------------------------------------------------


def test_the_cross_block_is_caes_formula():
    torch.manual_seed(0)
    block = CrossBlock(16, 2, layer_scale=0.3)
    q, s, pos_q, pos_s = (torch.randn(2, n, 16) for n in (5, 9, 5, 9))
    a = block.attn
    heads = [
        x.unflatten(2, (2, 8)).transpose(1, 2)
        for x in (a.q(block.norm_q(q + pos_q)), a.k(block.norm_k(s + pos_s)), a.v(block.norm_v(s)))
    ]
    out = (heads[0] @ heads[1].mT * 8**-0.5).softmax(-1) @ heads[2]
    x = q + 0.3 * a.proj(out.transpose(1, 2).flatten(2))
    x = nn.functional.layer_norm(x, (16,), block.norm.weight, block.norm.bias, 1e-6)
    torch.testing.assert_close(block(q, s, pos_q, pos_s), x + 0.3 * block.mlp(x), rtol=1e-4, atol=1e-5)
    assert a.k.bias is None


def test_another_size_keeps_everything_else():
    large = resized(replace(BEIT, patch=16, image_size=224), "vit_large")
    assert (large.width, large.depth, large.heads, large.patch) == (1024, 24, 16, 16)
    assert (large.positions, large.layer_scale, large.qkv_bias, large.init) == ("relative", 0.1, "qv", "beit")
    assert resized(VITS["vit_base"], "vit_huge").patch == 14


def test_a_block_without_extras_has_the_keys_it_had():
    keys = set(Block(8, 2).state_dict())
    assert keys == {
        f"{part}.{what}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for what in ("weight", "bias")
    }
