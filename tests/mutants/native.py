"""Planted faults of csrc/ and native.py: each must turn a test red (`make mutants`); each is a build."""

TESTS = ["tests/ops/test_native.py"]  # what is run against each
FAULTS = [
    ("csrc/rows.h", "even = (x + 0x7fff + ((x >> 16) & 1)) >> 16;", "even = x >> 16;",
     "bf16 is cut off instead of rounded", "gather"),
    ("csrc/patches.h", "row / per_image_ * stride_b_ + y * patch_ * stride_h_ + x * patch_ * stride_w_",
     "row / per_image_ * stride_b_ + x * patch_ * stride_h_ + y * patch_ * stride_w_",
     "rows and columns of patches exchanged", "gather or image"),
    ("csrc/gather_patches.cpp", "++i, dx += line, to += step", "++i, to += step",
     "every line of a patch gets the gradient of the first", "gather"),
    ("csrc/pix_loss.h", "return choose(a < beta, r * r / (2 * beta), a - beta / 2);",
     "return choose(a < beta, r * r / (2 * beta), a - beta);", "smooth L1 with a step at beta",
     "norm_pix_loss"),
    ("csrc/norm_pix_loss_image.cpp", "row / L * pred.stride(0) + row % L * pred.stride(1)",
     "row * pred.stride(1)", "predictions with a gap between images are read through it", "image"),
    ("csrc/info_nce.cpp", "const float positive = row[labels.of(b + i, n)];",
     "const float positive = row[labels.of(i, n)];",
     "a later block of rows takes the first one's positives", "info_nce"),
    ("kernels/fastmim_kernels/native.py",
     "            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it with the process\n", "",
     "two processes build at once", "wait_for_one_another"),
]  # fmt: skip
