"""Planted faults of attention: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_attention.py", "tests/ops/test_attention_tile.py"]  # what is run against each
KERNELS = "kernels/fastmim_kernels/attention/tile_triton.py"
OP = "kernels/fastmim_kernels/attention/tile.py"
CHOICE = "kernels/fastmim_kernels/attention/api.py"
TIMING = "kernels/fastmim_kernels/attention/timing.py"
VARLEN = "kernels/fastmim_kernels/attention/varlen.py"
DOOR = "kernels/fastmim_kernels/attention/memory_efficient.py"
SMALL = "kernels_match and (50 or 65 or 17)"
FAULTS = [
    (KERNELS, "        if c == CHUNKS:\n", "        if c > CHUNKS:\n",
     "keys beyond the segment get their share of the softmax", SMALL),
    (KERNELS, "(start + run * length).to(tl.int64), tile", "(start + run).to(tl.int64), tile",
     "the segments of a run begin one token apart", "kernels_match and 37"),
    (KERNELS, "    lse = top * scale + tl.log(total)\n", "    lse = top + tl.log(total)\n",
     "the maximum in lse is not scaled", SMALL),
    (KERNELS, "    p = tl.where(inside[:, None] & inside[None, :], p, 0.0)\n", "",
     "keys that do not exist count in the backward of one tile", "far_below"),
    (KERNELS, "        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q.dtype)\n",
     "        ds = (p * dp).to(q.dtype)\n", "the softmax's own part of the gradient is forgotten", SMALL),
    (KERNELS,
     "    mask = exist[:, None] if D == BLOCK_D else exist[:, None] & (cols < D)[None, :]\n    return",
     "    mask = exist[:, None]\n    return",
     "columns of the next head are read where a width fills no power of two", SMALL),
    (OP, "            ds = p.mul_(dp.sub_((p * dp).sum(-1, keepdim=True))).mul_(scale)\n",
     "            ds = p.mul_(dp.sub_((p * dp).sum(-1, keepdim=True)))\n",
     "dq and dk of the CPU without 1 / sqrt(d)", "cpu_form"),
    (TIMING, "    return Choice(min(ms, key=ms.__getitem__)",
     "    return Choice(max(ms, key=ms.__getitem__)", "the slowest serves", "fastest"),
    (TIMING, "    randn = partial(torch.randn, generator=rng, ", "    randn = partial(torch.randn, ",
     "a measurement draws from the run's own random numbers", "random_state"),
    (TIMING, "    return Choice(min(ms, key=ms.__getitem__) if ms else able[0], ms, left_out)\n",
     '    return Choice(min(ms, key=ms.__getitem__) if ms else "sdpa", ms, left_out)\n',
     "sdpa serves although it has failed", "sdpa_that_fails"),
    (VARLEN, "initial=0)], dim=1)", "initial=0)], dim=0)",
     "the runs of all samples by segment, not in the order in which they lie", "varlen"),
]  # fmt: skip
