"""Planted faults of info_nce: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_info_nce.py", "tests/ops/test_addresses.py"]
TRITON = "kernels/fastmim_kernels/info_nce_triton.py"
OP = "kernels/fastmim_kernels/info_nce.py"
FAULTS = [
    (TRITON, "start = (rows // N) * stride_b + (rows % N) * stride_n",
     "start = (rows // N) * stride_n + (rows % N) * stride_b", "the strides of a norm's row exchanged",
     "matches_definition and triton"),
    (TRITON, "negative = (g < G)[None, :] & (g.to(label.dtype)[None, :] != label[:, None])",
     "negative = (g < G)[None, :]", "the positive counts twice", "matches_definition and triton"),
    (TRITON, "total = total * fade + tl.sum(share, axis=1)", "total = total + tl.sum(share, axis=1)",
     "the sum is not scaled when the maximum moves", "matches_definition and triton"),
    (TRITON, 'weight = tl.where(negative, logit - tl.log2(norm)[None, :], float("-inf"))',
     'weight = tl.where(negative, logit, float("-inf"))',
     "weights of raw keys are not divided by their norms", "matches_definition and triton"),
    (TRITON, "_store(pull_ptr + n * D, pull, b, inside, N * D, c, WIDTH, D)",
     "_store(pull_ptr + n * D, pull, b, inside, q_stride_b, c, WIDTH, D)",
     "the pull is written with the stride of the queries", "strides and triton"),
    (TRITON, "tl.where(g[:, None] == label[None, :], own", "tl.where(g[:, None] == b[None, :], own",
     "another rank's keys are pulled as positives", "matches_definition and triton"),
    (TRITON, "        weight *= per_norm[None, :]\n", "",
     "queries enter the gradient of a key with their size", "matches_definition and triton"),
    (TRITON, "            dloss.contiguous(), q, k, None if", "            dloss, q, k, None if",
     "a gradient of other strides is read as contiguous", "strides and triton"),
    (OP, "p.mul_(dloss[b, n].T[..., None] / temperature)", "p.mul_(dloss[b, n].T[..., None])",
     "the gradient is not divided by the temperature", "matches_definition and cpu"),
    (OP, "step = max(1, CHUNK // max(1, G * max(min(B, MIN_ROWS), D)))", "step = max(1, N)",
     "the CPU takes all positions at once and holds all logits", "logits_are_never_there"),
    (OP, "pull = q.new_empty(B if cuda and need_pull else 0, N, D)",
     "pull = q.new_empty(B if need_pull else 0, N, D)",
     "the fake promises a pull that the CPU does not make", "registered"),
]  # fmt: skip
