"""The encoder: sizes, initialization, keys, and that packing and dropping patches change nothing."""

import pytest
import torch
from fastmim_kernels import sample_seeds, split_patches

from fastmim.models import VITS
from fastmim.models.embed import resize_positions, sincos_2d
from fastmim.models.mae_decoder import Decoder, DecoderConfig
from fastmim.models.tokens import Tokens, token_sources
from fastmim.models.vit import Encoder, ViTConfig

SMALL = ViTConfig(width=32, depth=2, heads=4, patch=4, image_size=(16, 24))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_vit_base():  # specification, 1.3
    with torch.device("meta"):
        encoder = Encoder(VITS["vit_base"])
        decoder = Decoder(DecoderConfig(), VITS["vit_base"])
    assert count(encoder) == 85_798_656
    assert count(decoder) == 26_109_184
    trained = [p for m in (encoder, decoder) for p in m.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 111_655_680


@pytest.mark.parametrize(
    ("name", "parameters"),  # of timm's models of this size without a head, which have the same tensors
    [
        ("vit_tiny", 5_524_416),
        ("vit_small", 21_665_664),
        ("vit_large", 303_301_632),
        ("vit_huge", 630_764_800),
    ],
)
def test_parameter_counts_of_the_other_sizes(name, parameters):
    with torch.device("meta"):
        assert count(Encoder(VITS[name])) == parameters


def test_initialization():  # specification, 1.3, I-MAE
    torch.manual_seed(0)
    encoder = Encoder(ViTConfig(width=192, depth=2, heads=3))
    qkv = encoder.blocks[0].attn.qkv.weight
    bound = (6 / (192 + 3 * 192)) ** 0.5  # the fused matrix as one
    assert 0.99 * bound < qkv.abs().max() <= bound
    patch = encoder.patch_embed.proj
    bound = (6 / (192 + 768)) ** 0.5
    assert 0.99 * bound < patch.weight.abs().max() <= bound
    assert 0.9 * 768**-0.5 < patch.bias.abs().max() <= 768**-0.5  # the convolution's default stays
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    for name, p in encoder.named_parameters():
        if name.endswith(".bias") and "patch_embed" not in name:
            assert not p.any(), name
    assert torch.equal(encoder.norm.weight, torch.ones(192))


def test_position_table():  # specification, 1.2 and 7
    table = sincos_2d(64, (3, 5))
    assert table.shape == (16, 64)
    assert not table[0].any()
    torch.testing.assert_close(table[1:].norm(dim=1), torch.full((15,), (64 / 2) ** 0.5))
    assert len(torch.unique(table, dim=0)) == 16
    omega = 10000.0 ** (-torch.arange(16) / 16)
    row, column = 2, 3  # column first, as in MAE
    expected = torch.cat(
        [(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()]
    )
    torch.testing.assert_close(table[1 + row * 5 + column], expected)


def test_resized_positions():
    table = torch.randn(1, 1 + 12, 8)
    assert torch.equal(resize_positions(table, (3, 4), (3, 4)), table)
    bigger = resize_positions(table, (3, 4), (6, 8))
    assert bigger.shape == (1, 49, 8)
    assert torch.equal(bigger[:, 0], table[:, 0])
    flat = torch.ones(1, 13, 8)
    torch.testing.assert_close(resize_positions(flat, (3, 4), (5, 7)), torch.ones(1, 36, 8))
    with pytest.raises(ValueError, match="want a table of 1 \\+ 4 x 4 rows, got 13"):
        resize_positions(table, (4, 4), (2, 2))


def images_and_keys(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 16, 24, 3), dtype=torch.uint8, generator=rng)
    return image, sample_seeds(0, 0, torch.arange(batch))


def shown(encoder: Encoder, image: torch.Tensor, seen: torch.Tensor, **how) -> torch.Tensor:
    """The tokens of an image of which these patches are visible, with mask tokens elsewhere if it has one."""
    return encoder(Tokens(image, seen, mask_tokens=encoder.mask_token is not None), **how).tokens_BTD


def test_segments_packed_together_equal_passes_of_their_own():
    torch.manual_seed(0)
    encoder = Encoder(SMALL)
    image, keys = images_and_keys()
    seen, hidden = split_patches(keys, 24, 6)
    packed = encoder(Tokens(image, seen), Tokens(image, hidden)).split()
    for part, index in zip(packed, (seen, hidden), strict=True):
        torch.testing.assert_close(part, shown(encoder, image, index), rtol=1e-5, atol=1e-5)


def test_the_encoder_sees_the_visible_patches_only():
    encoder = Encoder(SMALL)
    image, keys = images_and_keys()
    seen, hidden = split_patches(keys, 24, 6)
    before = shown(encoder, image, seen)
    blacked = image.clone()
    for b in range(3):
        for n in hidden[b].tolist():
            blacked[b, n // 6 * 4 : n // 6 * 4 + 4, n % 6 * 4 : n % 6 * 4 + 4] = 0
    assert torch.equal(shown(encoder, blacked, seen), before)
    assert not torch.equal(shown(encoder, 255 - image, seen), before)


def test_patch_order_does_not_matter_to_the_class_token():
    encoder = Encoder(SMALL)
    image, keys = images_and_keys()
    seen, _ = split_patches(keys, 24, 6)
    torch.testing.assert_close(
        shown(encoder, image, seen)[:, 0], shown(encoder, image, seen.flip(1))[:, 0], rtol=1e-5, atol=1e-6
    )


def test_token_sources_put_every_row_where_it_was_seen():
    _, keys = images_and_keys(2)
    seen, hidden = split_patches(keys, 8, 3)
    source = token_sources((seen, hidden), 8)
    T = (1 + 3) + (1 + 5)
    assert source.shape == (4, 9)
    for v, (index, start) in enumerate([(seen, 0), (hidden, 4)]):
        for b in range(2):
            expected = [-1] * 9
            expected[0] = b * T + start
            for k, n in enumerate(index[b].tolist()):
                expected[1 + n] = b * T + start + 1 + k
            assert source[v * 2 + b].tolist() == expected
    used = source[source >= 0]
    assert sorted(used.tolist()) == list(range(2 * T))  # every row of the encoding once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 230}, "model.image-size: want multiples of the patch, 16, got 230 x 230"),
        ({"image_size": (224, 100)}, "got 224 x 100"),
        ({"heads": 5}, "model.width: want a multiple of heads = 5"),
        ({"depth": 0}, "model.depth: want 1 to 1024, got 0"),
        ({"channels": 4}, "there is no default for 4 channels"),
        ({"mean": (0.5,)}, "want 3 values each"),
        ({"std": (0.2, 0.0, 0.2)}, "want values above 0"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**({"width": 192, "depth": 2, "heads": 3} | changes))


def test_an_encoder_wants_an_image():
    with pytest.raises(ValueError, match="at least one image"):
        Encoder(SMALL)()


# --- mask tokens in the encoder -------------------------------------------------------------------------


def with_mask_token() -> Encoder:
    torch.manual_seed(0)
    return Encoder(SMALL, mask_token=True)


def test_a_mask_token_is_one_more_key_and_changes_no_other():
    plain, masked = Encoder(SMALL).state_dict(), with_mask_token().state_dict()
    assert masked.keys() - plain.keys() == {"mask_token"} and plain.keys() <= masked.keys()
    assert masked["mask_token"].shape == (1, 1, 32)
    wide = Encoder(ViTConfig(width=768, depth=1, heads=12), mask_token=True)
    assert wide.mask_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_every_patch_has_its_place_and_hidden_ones_the_mask_token():
    """Against a patch embedding of the whole image, in which the hidden rows are replaced."""
    encoder = with_mask_token()
    image, keys = images_and_keys()
    seen, hidden = split_patches(keys, 24, 6)
    everything = torch.arange(24).expand(3, 24)
    x = encoder.patch_embed(image, everything).clone()
    for b in range(3):
        x[b, hidden[b]] = encoder.mask_token[0, 0]
    x = torch.cat([encoder.cls_token.expand(3, 1, -1), x], dim=1) + encoder.pos_embed
    branch = None
    for block in encoder.blocks:
        x, branch = block(x, branch)
    z = shown(encoder, image, seen)
    assert z.shape == (3, 25, 32)
    torch.testing.assert_close(z, encoder.norm(x, branch)[0])
    torch.testing.assert_close(shown(encoder, image, seen, final_norm=False), branch.added_to(x))


def test_with_all_patches_seen_the_mask_token_does_not_matter():
    encoder, plain = with_mask_token(), Encoder(SMALL)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "mask_token"})
    image, _ = images_and_keys()
    everything = torch.arange(24).expand(3, 24)
    torch.testing.assert_close(shown(encoder, image, everything), shown(plain, image, everything))


def test_hidden_pixels_do_not_reach_an_encoder_with_mask_tokens():
    encoder = with_mask_token()
    image, keys = images_and_keys()
    seen, hidden = split_patches(keys, 24, 6)
    before = shown(encoder, image, seen)
    for b, n in [(row, n) for row in range(3) for n in hidden[row].tolist()]:
        image[b, n // 6 * 4 : n // 6 * 4 + 4, n % 6 * 4 : n % 6 * 4 + 4] ^= 0x7F
    assert torch.equal(shown(encoder, image, seen), before)
    before.sum().backward()
    assert encoder.mask_token.grad.any()


def test_the_last_norm_can_be_left_out():
    encoder = Encoder(SMALL)
    image, keys = images_and_keys()
    seen, hidden = split_patches(keys, 24, 6)
    z = encoder(Tokens(image, seen), Tokens(image, hidden), final_norm=False).tokens_BTD
    torch.testing.assert_close(
        encoder.norm(z)[0], encoder(Tokens(image, seen), Tokens(image, hidden)).tokens_BTD
    )
