"""BEiT and CAE: their losses written out, what they see, and the tokenizer that stays as it is."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import sample_seeds

from fastmim.methods import BEiTConfig, CAEConfig
from fastmim.models.block import Branch
from fastmim.models.tokenizers.files import save_tokenizer
from fastmim.models.tokenizers.patches import KMeansConfig, normalized_squares
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.recipes import METHOD_RECIPES
from fastmim.views import BEIT
from tests.methods.crops import Second, assert_same_gradients, make_batch

BEIT_VIT = ViTConfig(
    width=32, depth=2, heads=2, patch=4, image_size=24, positions="relative", layer_scale=0.1, qkv_bias="qv",
    init="beit",
)  # fmt: skip
CAE_VIT = ViTConfig(
    width=32, depth=2, heads=2, patch=4, image_size=24, layer_scale=0.1, qkv_bias="qv", init="cae"
)


@pytest.fixture
def kmeans(tmp_path):
    """A tokenizer of 16 codes of 2 px, so that the crops are of 24 and 12 px."""
    torch.manual_seed(3)
    tokenizer = KMeansConfig(codes=16, stride=2).build()
    save_tokenizer(tokenizer, tmp_path / "tokenizer.safetensors")
    return tmp_path


def beit(**changes):
    torch.manual_seed(0)
    method = BEiTConfig(**({"codes": 24} | changes)).build(BEIT_VIT)
    with torch.no_grad():
        method.head.weight.normal_(std=0.5)
    return method


def cae(vit: ViTConfig = CAE_VIT, **changes):
    torch.manual_seed(0)
    return CAEConfig(**({"codes": 24, "regressor_depth": 2, "decoder_depth": 2} | changes)).build(vit)


# --- the second crop and its codes --------------------------------------------------------------------


def test_the_tokenizer_sees_the_same_box_at_its_own_size(kmeans):
    for method, color in ((beit(tokenizer=kmeans), BEIT), (cae(tokenizer=kmeans), None)):
        image, small = method.crops
        assert image.size == (24, 24) and small.size == (12, 12)
        assert (image.interpolation, small.interpolation) == ("bicubic", "lanczos")
        assert (image.box, image.draw, image.color) == (small.box, small.draw, small.color)
        assert image.color == color and image.scale == (0.08, 1.0)


def test_tokens_are_those_of_the_nearest_centroids(kmeans):
    method = beit(tokenizer=kmeans)
    small = make_batch(method).crops[1]
    x = normalized_squares(small, 2)
    expected = torch.cdist(x, method.tokenizer.centroid_KP).argmin(-1)
    assert torch.equal(method.tokens(small), expected) and method.num_codes == 16


def test_the_tokenizer_is_no_part_of_the_method(kmeans):
    """Neither trained nor saved; it is there again whenever the method is built."""
    for method in (beit(tokenizer=kmeans), cae(tokenizer=kmeans)):
        names = [name for name, _ in (*method.named_parameters(), *method.named_buffers())]
        assert not any("tokenizer" in name or "centroid" in name for name in names)
        assert not method.tokenizer.training and "tokenizer" in method.config.files()


def test_what_is_no_tokenizer_is_refused_in_a_line(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"nothing")
    for path, words in ((tmp_path, "got nothing at"), (tmp_path / "x.pth", "cannot be read as weights")):
        with pytest.raises(ValueError, match=f"method.tokenizer: .*{words}"):
            beit(tokenizer=path)
    with pytest.raises(ValueError, match="want 3, as the tokenizer has"):
        BEiTConfig().build(replace(BEIT_VIT, channels=1))


# --- BEiT ------------------------------------------------------------------------------------------------


def test_beits_loss_is_the_mean_over_the_hidden_tokens_of_the_batch():
    method = beit()
    batch = make_batch(method, 6)
    hidden, token = method.mask(batch.seeds_B), method.tokens(batch.crops[1])
    assert len(set(hidden.sum(1).tolist())) > 1
    z = method.encoder(Tokens(batch.crops[0], hidden_BN=hidden)).tokens_BTD[:, 1:]
    logits = method.head(z[hidden])
    expected = F.cross_entropy(logits.double(), token[hidden])
    out = method(batch)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
    right = (logits.argmax(-1) == token[hidden]).float().mean()
    torch.testing.assert_close(out.metrics["token_accuracy"], right)
    assert_same_gradients(method, expected, lambda: method(batch).loss)


def test_a_fresh_head_costs_the_logarithm_of_the_codes():
    torch.manual_seed(0)
    method = BEiTConfig(codes=500).build(BEIT_VIT)
    assert method(make_batch(method, 8)).loss.item() == pytest.approx(math.log(500), rel=0.01)


def test_beit_weighs_hidden_tokens_of_two_ranks_as_of_one():
    method = beit()
    whole = method(make_batch(method)).loss.item()
    parts = [make_batch(method, 2, first=first) for first in (0, 2)]
    counts = [method.mask(part.seeds_B).sum().float()[None] for part in parts]
    losses = []
    for part, other in zip(parts, reversed(counts), strict=True):
        method.ranks = Second([other])
        losses.append(method(part).loss.item())
    assert sum(losses) / 2 == pytest.approx(whole, rel=1e-6)


def test_beit_hides_75_of_196():
    method = BEiTConfig(codes=8).build(replace(BEIT_VIT, patch=16, image_size=224, depth=1))
    counts = method.mask(sample_seeds(1, 0, torch.arange(500))).sum(1)
    assert counts.max() == 75 and counts.float().mean().item() == pytest.approx(74.5, abs=0.3)
    assert (counts == 75).float().mean().item() == pytest.approx(0.67, abs=0.08)


def test_hidden_pixels_change_no_logit():
    method = beit()
    batch = make_batch(method)
    hidden = method.mask(batch.seeds_B)
    image = batch.crops[0].clone()
    noise = torch.randint(0, 256, image.shape, dtype=torch.uint8)
    of_pixel = hidden.view(-1, 6, 1, 6, 1).expand(-1, 6, 4, 6, 4).reshape(-1, 24, 24, 1)
    other = torch.where(of_pixel, noise, image)
    a, b = (method.encoder(Tokens(x, hidden_BN=hidden)).tokens_BTD for x in (image, other))
    assert torch.equal(a, b) and not torch.equal(image, other)


def test_a_picture_shows_codes_behind_the_mask(kmeans):
    method = beit(tokenizer=kmeans).eval()
    batch = make_batch(method)
    found = method.reconstruct(batch)
    assert found.pred_BNP.shape == (4, 36, 48) and found.seen_BK.shape == (4, 36 - method.num_hidden)
    plain = beit().eval()
    assert plain.reconstruct(make_batch(plain)) is None  # random projections draw nothing


# --- CAE -------------------------------------------------------------------------------------------------


def written_out(method, batch):
    """The regressor and the decoder without fused ops, from the paper's Section 3 and the released layers."""
    c, (seen, hidden) = method.config, method.split(batch.seeds_B)
    pos = method.encoder.pos_embed[0, 1:]

    def norm(layer, x):
        return F.layer_norm(x, (32,), layer.weight, layer.bias, 1e-6)

    def heads(x):
        return x.unflatten(-1, (2, 16)).transpose(1, 2)

    visible = method.encoder(Tokens(batch.crops[0], seen)).tokens_BTD[:, 1:]
    with torch.no_grad():
        target = method.encoder(Tokens(batch.crops[0], hidden)).tokens_BTD[:, 1:]
    q = method.regressor.query_token.expand(len(seen), hidden.shape[1], -1)
    for block in method.regressor.blocks:
        kv, at = torch.cat([visible, q], 1), torch.cat([pos[seen], pos[hidden]], 1)
        a = block.attn
        queries = heads(a.q(norm(block.norm_q, q + pos[hidden])))
        keys, values = heads(a.k(norm(block.norm_k, kv + at))), heads(a.v(norm(block.norm_v, kv)))
        weights = (queries @ keys.mT / 4).softmax(-1)
        x = q + block.gamma_1 * a.proj((weights @ values).transpose(1, 2).flatten(2))
        x = norm(block.norm, x)
        q = x + block.gamma_2 * block.mlp.fc2(F.gelu(F.linear(x, block.mlp.fc1.weight, block.mlp.fc1.bias)))
    z = norm(method.regressor.norm, q)
    x, branch = z + pos[hidden], None
    for block in method.token_decoder.blocks:
        x, branch = block(x, branch)
    assert isinstance(branch, Branch)
    x = norm(method.token_decoder.norm, branch.added_to(x))
    logits = method.token_decoder.head(x)
    token = method.tokens(batch.crops[1]).gather(1, hidden)
    ce = F.cross_entropy(logits.flatten(0, 1).double(), token.flatten())
    return ce + c.align_weight * (z.double() - target.double()).square().mean()


def test_caes_loss_and_gradients_are_those_of_the_paper():
    method = cae()
    batch = make_batch(method)
    expected = written_out(method, batch)
    torch.testing.assert_close(method(batch).loss.double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(method, expected, lambda: method(batch).loss)


def test_half_of_the_patches_is_hidden_from_cae_exactly():
    method = CAEConfig(codes=8).build(replace(CAE_VIT, patch=16, image_size=224, depth=1))
    seen, hidden = method.split(sample_seeds(0, 0, torch.arange(50)))
    assert seen.shape == hidden.shape == (50, 98)
    both = torch.cat([seen, hidden], 1).sort(1).values
    assert torch.equal(both, torch.arange(196).expand(50, -1))


def test_queries_are_as_many_as_hidden_patches_and_no_class_token_is_looked_at(monkeypatch):
    method, seen = cae(), []
    for block in method.regressor.blocks:
        block.register_forward_pre_hook(
            lambda module, inputs: seen.append([tuple(x.shape) for x in inputs[:4]])
        )
    method(make_batch(method))
    assert seen == [[(4, 18, 32), (4, 36, 32), (4, 18, 32), (4, 36, 32)]] * 2


def test_the_aligned_side_has_no_gradient():
    """With the decoder's part switched off, the encoder learns from visible patches alone."""
    method = cae(align_weight=1.0)
    batch = make_batch(method)
    _, hidden = method.split(batch.seeds_B)
    found = []
    method.encoder.register_forward_hook(
        lambda m, i, out: found.append((i[0].seen_BK, out.tokens_BTD.requires_grad))
    )
    method(batch)
    assert [grad for _, grad in found] == [False, True] and torch.equal(found[0][0], hidden)


def test_networks_drop_paths_of_their_own():
    method = cae(replace(CAE_VIT, drop_path=0.9)).train()
    batch = make_batch(method, 8)
    with_drops = [method(batch).loss.item() for _ in range(2)]
    assert with_drops[0] == with_drops[1]  # drawn from the seeds
    assert method.eval()(batch).loss.item() != with_drops[0]


@pytest.mark.parametrize("name", ["beit", "cae"])
def test_the_recipes_are_the_releases_and_want_a_tokenizer(name):
    run = METHOD_RECIPES[name]()
    assert run.optim.peak_lr(2048) == pytest.approx(1.5e-3) and run.optim.clip == 3.0
    assert (run.optim.min_lr, run.optim.betas, run.model.layer_scale) == (1e-5, (0.9, 0.999), 0.1)
    (path,) = run.method.files().values()
    assert not path.exists()
