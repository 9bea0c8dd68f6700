"""Planted faults of add_layer_norm and bias_gelu: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_add_layer_norm.py", "tests/ops/test_bias_gelu.py", "tests/ops/test_addresses.py"]
NORM = "kernels/fastmim_kernels/add_layer_norm.py"
GELU = "kernels/fastmim_kernels/bias_gelu.py"
FAULTS = [
    (NORM, "tl.load(keep_ptr + rows // T, mask", "tl.load(keep_ptr + rows % T, mask",
     "keep is that of a token, not of its sample",
     "test_add_layer_norm and (dropped or matches_definition)"),
    (NORM, "rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / D + eps)",
     "rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / (D - 1) + eps)",
     "the variance is divided by D - 1", "test_add_layer_norm and matches_definition"),
    (NORM, "            dsum = tl.load(dsum_ptr + at, mask=exist, other=0.0).to(tl.float32)\n",
     "            dsum = tl.zeros([ROWS, BLOCK_D], tl.float32)\n",
     "the gradient of the sum itself is forgotten", "test_add_layer_norm and matches_definition"),
    (NORM, "b, t = (rows // T).to(tl.int64), (rows % T).to(tl.int64)", "b, t = rows // T, rows % T",
     "addresses of 32 bits", "test_addresses"),
    (NORM, "    at = share.to(tl.int64) * D + cols\n", "    at = cols\n",
     "all shares write the first one's sums", "test_add_layer_norm and (many_rows or matches_definition)"),
    (NORM, "dnormed.contiguous(), dsum.contiguous(), total", "dnormed, dsum.contiguous(), total",
     "a gradient of other strides is read as contiguous", "test_add_layer_norm and strides"),
    (NORM, "dtotal = dbranch + dsum.float()", "dtotal = dbranch",
     "the CPU forgets the gradient of the sum itself", "test_add_layer_norm and (public or needed)"),
    (NORM, "        keep = keep.contiguous()\n", "", "keep with gaps is read as if it had none",
     "test_add_layer_norm and strides"),
    (GELU, "rows = (tl.program_id(0) // CHUNKS).to(tl.int64) * ROWS",
     "rows = tl.program_id(0) // CHUNKS * ROWS", "addresses of 32 bits", "test_addresses"),
    (GELU, "rows = share * SHARE + start + tl.arange(0, ROWS)", "rows = share * SHARE + tl.arange(0, ROWS)",
     "the first rows of a share are summed again and again", "test_bias_gelu and matches_definition"),
    (GELU, 'share = max(tile["ROWS"], min(SHARE,', "share = max(1, min(SHARE,",
     "a share smaller than its tile: rows counted more than once", "test_bias_gelu and matches_definition"),
    (GELU, "return dx if need_x else None, dbias.to(bias.dtype) if need_bias else None",
     "return dx if need_x else None, dbias.to(bias.dtype) if need_x else None",
     "the bias learns when x does", "test_bias_gelu and needed"),
]  # fmt: skip
