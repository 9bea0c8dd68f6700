"""Planted faults of gather_patches and of the two ops on tokens: each turns a test red (`make mutants`)."""

TESTS = [
    "tests/ops/test_gather_patches.py",
    "tests/ops/test_gather_tokens.py",
    "tests/ops/test_restore_tokens.py",
    "tests/ops/test_debug.py",
    "tests/ops/test_addresses.py",
    "tests/ops/test_native.py",
]
PATCHES = "kernels/fastmim_kernels/gather_patches.py"
TOKENS = "kernels/fastmim_kernels/gather_tokens.py"
RESTORE = "kernels/fastmim_kernels/restore_tokens.py"
DEBUG = "kernels/fastmim_kernels/debug.py"
FAULTS = [
    (PATCHES, "for c in tl.static_range(1, C):", "for c in tl.static_range(1, C - 1):",
     "the last channel takes the first one's statistics", "test_gather_patches and matches_definition"),
    (PATCHES, 'SHIFT": tuple(-m / s for m, s in zip(mean, std, strict=True))',
     'SHIFT": tuple(-m for m in mean)', "the mean is not divided by std",
     "test_gather_patches and matches_definition"),
    (PATCHES, "return image.new_empty(*index.shape, patch * patch * image.shape[3], dtype=dtype)",
     "return image.new_empty(*index.shape, patch * patch * image.shape[3])",
     "the fake gives rows of the image's dtype", "test_gather_patches and registered"),
    (PATCHES, "not 0 <= index_BK.min() <= index_BK.max() < count",
     "not 0 <= index_BK.min() <= index_BK.max() <= count", "an index one past the last patch passes",
     "test_gather_patches and wrong_index"),
    (TOKENS, "(rows % T).to(tl.int64) - HEAD", "(rows % T).to(tl.int64)",
     "the class token's row is not taken off", "test_gather_tokens and matches_definition"),
    (TOKENS, "tl.store(home, g, mask=(b < B)[:, None] & inside[None, :])",
     "tl.store(home, g, mask=(place >= 0)[:, None] & inside[None, :])",
     "the gradient of a hidden token is not written", "test_gather_tokens and matches_definition"),
    (TOKENS, "ctx.N, ctx.head = tokens.shape[1], cls is not None",
     "ctx.N, ctx.head = tokens.shape[1], False", "the backward forgets the class token",
     "test_gather_tokens and (needed or public)"),
    (TOKENS, "    if twice.any():", "    if twice.all():", "an index that is there twice passes",
     "test_gather_tokens and wrong_index"),
    (RESTORE, "at = source[:, None] * token_stride + cols[None, :]",
     "at = source[:, None] * D + cols[None, :]", "tokens with gaps are read as if they had none",
     "test_restore_tokens and strides"),
    (RESTORE, "mask_sum += tl.where((source < 0)[:, None], g.to(tl.float32), 0.0)",
     "mask_sum += g.to(tl.float32)", "the mask token gets the gradient of every row",
     "test_restore_tokens and matches_definition"),
    (RESTORE, "dtokens[source[~hidden]] = dout[~hidden]",
     "dtokens[source[~hidden]] += dout[hidden][: (~hidden).sum()]",
     "the CPU gives tokens the gradients of mask tokens",
     "(test_restore_tokens and (needed or public)) or go_through"),
    (RESTORE, "mask_token_D.shape != (D,) or pos_ND.shape != (N, D)", "mask_token_D.shape != (D,)",
     "positions of another length pass", "test_restore_tokens and rejects"),
]  # fmt: skip
