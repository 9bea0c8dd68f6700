"""Planted faults of norm_pix_loss and norm_pix_loss_image: each must turn a test red (`make mutants`)."""

TESTS = [
    "tests/ops/test_norm_pix_loss.py",
    "tests/ops/test_norm_pix_loss_image.py",
    "tests/ops/test_addresses.py",
    "tests/ops/test_native.py",
]
ROWS = "kernels/fastmim_kernels/norm_pix_loss.py"
IMAGE = "kernels/fastmim_kernels/norm_pix_loss_image.py"
FAULTS = [
    (ROWS, "D * rest * rest) / (D - 1)", "D * rest * rest) / D", "the variance is biased",
     "matches_definition"),
    (ROWS, "centered = tl.where(exist, centered - rest[:, None], 0.0)",
     "centered = tl.where(exist, centered, 0.0)", "the rounding of the mean stays in a flat patch",
     "matches_definition"),
    (ROWS, "tl.sum(far(r, beta, DISTANCE), axis=1) / D, mask=rows < M)",
     "tl.sum(far(r, beta, DISTANCE), axis=1), mask=rows < M)", "the loss is a sum and no mean",
     "test_norm_pix_loss and matches_definition"),
    (ROWS, "    at = rows[:, None] * D + cols[None, :]\n",
     "    at = rows[:, None] * pred_stride + cols[None, :]\n",
     "the gradient is written with the stride of the prediction", "test_norm_pix_loss and strided"),
    (ROWS, "NEED_PRED=needs[0], NEED_TARGET=needs[1]", "NEED_PRED=needs[1], NEED_TARGET=needs[0]",
     "the gradients that are asked for are exchanged",
     "test_norm_pix_loss and (teaches or matches_definition)"),
    (ROWS, "return dpred, dtarget, None, None", "return dtarget, dpred, None, None",
     "each input gets the other one's gradient",
     "(test_norm_pix_loss and (teaches or public)) or go_through"),
    (IMAGE, "pred_row = (rows // L).to(tl.int64) * pred_stride_b", "pred_row = (rows // L) * pred_stride_b",
     "addresses of 32 bits", "test_addresses"),
    (IMAGE, "tl.sum(far(r, beta, DISTANCE), axis=1) / (PATCH * PATCH * C)",
     "tl.sum(far(r, beta, DISTANCE), axis=1) / (PATCH * PATCH)", "the mean forgets the channels",
     "test_norm_pix_loss_image and matches_definition"),
    (IMAGE, 'grid = (triton.cdiv(dloss.numel(), arguments["ROWS"]),)',
     'grid = (dloss.numel() // arguments["ROWS"],)', "the last patches get no gradient",
     "test_norm_pix_loss_image and matches_definition"),
    (IMAGE, "return pred.new_empty(pred.shape[:2], dtype=torch.float32)",
     "return pred.new_empty(pred.shape[:2])", "the fake's loss is in the dtype of the prediction",
     "test_norm_pix_loss_image and registered"),
    (ROWS, "tl.abs(r) - beta * 0.5)", "tl.abs(r) - beta)", "smooth L1 has a step at beta",
     "test_norm_pix_loss and other_distances"),
    (ROWS, "(r / beta).clamp(-1, 1)", "r.clamp(-1, 1)", "the same in the reference's gradient",
     "go_through"),
]  # fmt: skip
