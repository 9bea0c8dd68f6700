"""Training of tokenizers: relaxed codes, their schedules, moving codes on any number of ranks, whole runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import sample_seeds
from safetensors.torch import load_file

from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.pretrain import prepare, train
from fastmim.methods.tokenizers import (
    TRAININGS,
    DVAETraining,
    KMeansTraining,
    Moved,
    VQTraining,
    divergence,
    gumbel,
)
from fastmim.models.tokenizers import load_tokenizer
from fastmim.ranks import ALONE
from fastmim.recipes import RECIPES, SCALES, geometry
from tests.engine.conftest import images, tiny_run  # noqa: F401
from tests.engine.test_resume import assert_same, train_and_resume
from tests.methods.crops import make_batch

GEOMETRY = geometry(16, 4)
SMALL = {"codes": 16, "hidden": 8, "code_width": 8, "blocks": 1}


def dvae(**changes):
    torch.manual_seed(0)
    return DVAETraining(**(SMALL | changes)).build(GEOMETRY)


# --- relaxed codes ----------------------------------------------------------------------------------------


def test_the_loss_is_reconstruction_and_weighted_divergence():
    method = dvae(kl_weight=0.5)
    method.progress.done.fill_(0.25)
    batch = make_batch(method)
    x = batch.crops[0].permute(0, 3, 1, 2).float() / 127.5 - 1
    logits = method.tokenizer.encoder(x).permute(0, 2, 3, 1)
    tau = 1 / 16 + (1 - 1 / 16) * 0.5 * (1 + math.cos(math.pi * 0.5))
    y = ((logits + gumbel(batch.seeds_B, logits.shape)) / tau).softmax(-1)
    decoded = method.tokenizer.decoder((y @ method.tokenizer.codebook.weight).permute(0, 3, 1, 2))
    q = logits.softmax(-1)
    kl = (q * (q.log() + math.log(16))).sum(-1).mean()
    expected = F.mse_loss(decoded, x) + 0.5 * kl
    out = method(batch)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert out.metrics["temperature"].item() == pytest.approx(tau)
    assert out.metrics["kl_weight"].item() == pytest.approx(0.5)


def test_divergence_is_0_of_uniform_logits_and_log_k_of_certain_ones():
    kl, entropy = divergence(torch.zeros(2, 3, 3, 16))
    assert kl.item() == pytest.approx(0, abs=1e-6) and entropy.item() == pytest.approx(math.log(16))
    certain = torch.zeros(2, 3, 3, 16)
    certain[..., 5] = 1e4
    kl, entropy = divergence(certain)
    assert kl.item() == pytest.approx(math.log(16)) and entropy.item() == pytest.approx(0, abs=1e-6)
    assert divergence(torch.randn(4, 3, 3, 16) * 3)[0] > 0


def test_schedules_begin_and_end_where_they_should():
    method = dvae(kl_weight=2.0)
    batch, rows = make_batch(method), {}
    for done in (0.0, 0.025, 0.05, 0.25, 0.5, 1.0):
        method.after_step(done)
        metrics = method(batch).metrics
        rows[done] = metrics["temperature"].item(), metrics["kl_weight"].item()
    assert rows[0.0] == pytest.approx((1.0, 0.0)) and rows[1.0] == pytest.approx((1 / 16, 2.0))
    assert rows[0.5][0] == pytest.approx(1 / 16) and rows[0.05][1] == pytest.approx(2.0)
    assert rows[0.025][1] == pytest.approx(1.0) and rows[0.25][0] == pytest.approx((1 + 1 / 16) / 2)


def test_noise_is_gumbels_and_a_samples_own():
    seeds = sample_seeds(0, 0, torch.arange(40))
    g = gumbel(seeds, torch.Size((40, 5, 5, 64)))
    assert g.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05) and g.isfinite().all()
    assert torch.equal(gumbel(seeds[3:5], torch.Size((2, 5, 5, 64))), g[3:5])


def test_hard_codes_pass_the_gradient_of_the_relaxed_ones():
    method = dvae(straight_through=True, temperature_end=1.0, kl_weight=0.0)
    batch = make_batch(method)
    method(batch).loss.backward()
    assert method.tokenizer.encoder[-1].weight.grad.abs().sum() > 0


# --- codes that move --------------------------------------------------------------------------------------


class Rank:
    """One of two ranks that were asked for the same means in the same order."""

    world = 2

    def __init__(self, rank, shared):
        self.rank, self.shared, self.count = rank, shared, 0

    def mean(self, x):
        self.shared.setdefault(self.count, []).append(x.clone())
        self.count += 1
        return x

    def means(self):
        return [sum(xs) / 2 for xs in self.shared.values()]


@pytest.mark.parametrize("decay", [None, 0.9])
def test_two_ranks_move_codes_as_one_process(decay):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(3, 8, 4), dim=-1)  # three steps of eight vectors
    whole, codes = Moved(5, 4, decay), F.normalize(torch.randn(5, 4), dim=1)
    alone, both = codes.clone(), codes.clone()
    parts = [Moved(5, 4, decay) for _ in range(2)]
    for vectors in x:
        index = torch.cdist(vectors, alone).argmin(1)
        whole.add(vectors, index, ALONE)
        whole.move(alone, ALONE)
        shared = {}
        ranks = [Rank(r, shared) for r in range(2)]
        at_once = torch.cdist(vectors, both).argmin(1)
        for part, rank, v, i in zip(parts, ranks, vectors.chunk(2), at_once.chunk(2), strict=True):
            part.add(v, i, rank)
            for buffer in (part.count_K, part.sum_KE, part.fresh_KE):
                rank.mean(buffer)

        class Answers:
            world = 2

            def __init__(self, means):
                self.means = iter(means)

            def mean(self, x):
                return next(self.means)

        moved = [both.clone() for _ in range(2)]
        for part, code in zip(parts, moved, strict=True):
            part.move(code, Answers(ranks[0].means()))
        assert torch.equal(moved[0], moved[1])
        both = moved[0]
        torch.testing.assert_close(both, alone)


def test_running_means_are_the_means_of_all_that_took_a_code():
    torch.manual_seed(0)
    moved, code, seen = Moved(2, 3, None), torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), [[], []]
    moved.steps.add_(1)  # not the first step, which puts codes on vectors
    for _ in range(4):
        x = torch.randn(6, 3)
        index = torch.cdist(x, code).argmin(1)
        for k in range(2):
            seen[k] += list(x[index == k])
        moved.add(x, index, ALONE)
        moved.move(code, ALONE)
    for k in range(2):
        torch.testing.assert_close(code[k], torch.stack(seen[k]).mean(0))


def test_a_code_that_nobody_takes_is_put_where_a_vector_is():
    moved, code = Moved(2, 3, 0.99), torch.tensor([[1.0, 0, 0], [0, 0, -1.0]])
    moved.steps.add_(1)
    x = F.normalize(torch.tensor([[1.0, 0.1, 0], [1.0, -0.1, 0]]), dim=1)
    for step in range(Moved.PATIENCE + 1):
        assert torch.equal(code[1], torch.tensor([0, 0, -1.0])), step
        moved.add(x, torch.zeros(2, dtype=torch.int64), ALONE)
        moved.move(code, ALONE)
    assert torch.equal(code[1], x[1])


def test_k_means_finds_clusters():
    """Squares of four patterns, and twice as many codes: the error falls to nothing."""
    torch.manual_seed(0)
    method = KMeansTraining(codes=8).build(geometry(16, 4))
    patterns = torch.randint(0, 256, (4, 4, 4, 3), dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        which = torch.randint(0, 4, (8, 4, 4), generator=rng)
        image = patterns[which].permute(0, 1, 3, 2, 4, 5).reshape(8, 16, 16, 3)
        batch = replace(make_batch(method, 8), crops=(image,))
        losses.append(method(batch).loss.item())
        method.after_step(0.5)
    assert losses[-1] < 1e-3 < losses[0]


def test_vectors_pass_straight_through_to_the_decoder():
    torch.manual_seed(0)
    method = VQTraining(**SMALL, commitment=0.0).build(GEOMETRY)
    method(make_batch(method)).loss.backward()
    assert method.tokenizer.encoder[0].weight.grad.abs().sum() > 0
    method.after_step(0.1)
    assert torch.equal(method.average.code_KE, method.tokenizer.code_KE)


# --- whole runs -------------------------------------------------------------------------------------------


def run_of(kind, images, run_dir, **changes):  # noqa: F811
    run = tiny_run(images, run_dir, method="mae", **changes)
    config = TRAININGS[kind]()
    small = {name: size for name, size in SMALL.items() if hasattr(config, name)}
    if kind == "dvae_large":
        small = {"codes": 16, "hidden": 4}
    return replace(run, method=replace(config, **small), model=geometry(16, 8 if kind == "dvae_large" else 4))


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("kind", TRAININGS)
def test_resumed_to_the_last_bit(images, tmp_path, kind, zero):  # noqa: F811
    def make(images, run_dir, **changes):
        return run_of(kind, images, run_dir, **changes)

    train_and_resume(images, tmp_path, zero=zero, total=8, stop=3, make=make)
    assert_same(tmp_path, 8, 3)
    ours, theirs = (load_file(tmp_path / run / "tokenizer.safetensors") for run in ("whole", "resumed"))
    assert ours and all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_what_is_kept_is_the_average_and_serves_beit(images, tmp_path):  # noqa: F811
    train(prepare(run_of("dvae", images, tmp_path / "dvae", steps=6)))
    files = {path.name for path in (tmp_path / "dvae").iterdir()}
    assert {"tokenizer.safetensors", "model.safetensors", "reconstruction.png"} <= files
    assert "encoder.safetensors" not in files
    whole = load_file(tmp_path / "dvae" / "model.safetensors")
    kept = load_tokenizer(tmp_path / "dvae").state_dict()
    assert torch.equal(kept["codebook.weight"], whole["average.codebook.weight"])
    assert not torch.equal(kept["codebook.weight"], whole["tokenizer.codebook.weight"])
    rows = [json.loads(line) for line in (tmp_path / "dvae" / "metrics.jsonl").read_text().splitlines()]
    assert {"perplexity", "used_codes", "psnr", "entropy", "kl", "temperature"} <= rows[-1].keys()
    run = SCALES["sample"](RECIPES["beit"]())
    beit = replace(run.method, tokenizer=tmp_path / "dvae")
    method = beit.build(replace(run.model, width=32, depth=1, heads=2, image_size=32))
    assert method.num_codes == 16 and method.crops[1].size == (16, 16)


def test_few_codes_are_called_a_collapse():
    method = dvae(codes=512)
    assert "few codes say all" in method.diagnose({"perplexity": 1.4})
    assert "--method.kl-weight" in method.diagnose({"perplexity": 1.4})
    assert method.diagnose({"perplexity": 300.0}) is None


def test_a_resumed_run_wants_the_codes_that_it_began_with(images, tmp_path):  # noqa: F811
    """The file may lie elsewhere; another in its place is refused by name."""
    for name, steps in (("one", 4), ("other", 5)):
        train(prepare(run_of("kmeans", images, tmp_path / name, steps=steps)))

    def beit(tokenizer, **changes):
        run = SCALES["sample"](RECIPES["beit"]())
        model = replace(run.model, width=16, depth=1, heads=2, image_size=16, patch=4)
        whole = tiny_run(images, tmp_path / "beit", method="mae", steps=4, save_every=2, **changes)
        return replace(whole, method=replace(run.method, tokenizer=tokenizer), model=model)

    train(prepare(beit(tmp_path / "one")))
    (tmp_path / "one").rename(tmp_path / "moved")
    assert prepare(beit(tmp_path / "moved", resume=True)).changed == []
    with pytest.raises(CheckpointError, match=r"frozen\.tokenizer"):
        prepare(beit(tmp_path / "other", resume=True))
