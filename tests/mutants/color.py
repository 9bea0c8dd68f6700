"""Planted faults of the colors: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_color_jitter.py", "tests/ops/test_color_blur.py", "tests/data/test_color.py"]
JITTER = "kernels/fastmim_kernels/color_jitter.py"
BLUR = "kernels/fastmim_kernels/color_blur.py"
JITTER_CPP, BLUR_CPP = "csrc/color_jitter.cpp", "csrc/color_blur.cpp"
DRAWS = "fastmim/data/augment/color.py"
FAULTS = [
    (JITTER, "sixths).float().double()", "sixths)", "hue's quotient stays in fp64", "hue_is_a_whole"),
    (JITTER, "+ (1 << 15)) >> 16\n\n\ndef _mean", ") >> 16\n\n\ndef _mean", "gray is cut", "stage"),
    (JITTER, "ended = ended | (stage == CONTRAST)", "ended = (stage == CONTRAST)", "stages behind contrast",
     "3-height"),
    (JITTER, "(h >= 153) & (h <= 209)", "(h >= 157) & (h <= 209)", "a hue is not cut", "whole_byte"),
    (JITTER, "at = out_ptr + (b * count + pixel) * C", "at = out_ptr + b * count * C + pixel * 3",
     "one channel is written as three", "pillow and 1-"),
    (JITTER, "at + 2 * stride_c, mask", "at + 2, mask", "channels are taken to be neighbors", "strides"),
    (JITTER_CPP, "(2 * total + count_) / (2 * count_)", "total / count_", "the mean is cut", "half_up"),
    (BLUR, "elif FIRST:", "elif LAST:", "an image that is left comes from between", "pillow"),
    (BLUR, "at.clamp(0, n - 1)", "at.remainder(n)", "the image goes round", "pillow"),
    (BLUR_CPP, "+ (1u << (BITS - 1))", "", "sums are cut", "pillow or photographs"),
    (DRAWS, "(middle - strengths).clamp(min=0)", "middle - strengths", "factors below 0", "ranges"),
    (DRAWS, "u[:, 6] < color.gray", "u[:, 0] < color.gray", "gray comes with jitter", "independent"),
]  # fmt: skip
