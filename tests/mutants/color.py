"""Planted faults of the colors: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_color_jitter.py", "tests/ops/test_color_blur.py", "tests/data/test_color.py"]
JITTER = "kernels/fastmim_kernels/color_jitter.py"
BLUR = "kernels/fastmim_kernels/color_blur.py"
JITTER_CPP, BLUR_CPP = "csrc/color_jitter.cpp", "csrc/color_blur.cpp"
DRAWS = "fastmim/data/color.py"
FAULTS = [
    # the reference
    (
        JITTER,
        "+ shift & 255\n    s = 255 * c // v.clamp",
        "+ shift\n    s = 255 * c // v.clamp",
        "hue does not wrap around",
        "stage",
    ),
    (JITTER, "sixths).float().double()", "sixths)", "hue's quotient stays in fp64", "hue_is_a_whole"),
    (JITTER, "+ (1 << 15)) >> 16\n\n\ndef _mean", ") >> 16\n\n\ndef _mean", "gray is cut", "stage"),
    (JITTER, " if x.shape[2] == 3 else x\n", "\n", "one channel gets a hue", "pillow and 1-"),
    (
        JITTER,
        "(2 * _gray(x).sum() + count) // max(2 * count, 1)",
        "_gray(x).sum() // max(count, 1)",
        "the mean is cut",
        "half_up",
    ),
    # Triton
    (
        JITTER,
        "ended = ended | (stage == CONTRAST)",
        "ended = (stage == CONTRAST)",
        "stages behind contrast",
        "3-height",
    ),
    (
        JITTER,
        "mask=(at < tiles) & contrast, other=0)",
        "mask=(at < 64) & (at < tiles) & contrast, other=0)",
        "the mean is that of 64 tiles",
        "many_tiles",
    ),
    (
        JITTER,
        "r = tl.load(at, mask=pixel < count, other=0)",
        "r = tl.load(at, mask=pixel < count, other=9)",
        "pixels beyond the image are counted",
        "pillow or half_up",
    ),
    (JITTER, "(h >= 153) & (h <= 209)", "(h >= 157) & (h <= 209)", "a hue is not cut", "whole_byte"),
    (
        JITTER,
        "h -= ((h * sixths == n) & _falls_short(h))",
        "h -= _falls_short(h)",
        "a hue is cut that is not exact",
        "hue or pillow",
    ),
    (JITTER, "((i == 0) | (i == 6), t,", "(i == 0, t,", "a full circle is no red", "pillow or hue"),
    (
        JITTER,
        "at = out_ptr + (b * count + pixel) * C",
        "at = out_ptr + b * count * C + pixel * 3",
        "one channel is written as three",
        "pillow and 1-",
    ),
    (
        JITTER,
        "tl.where(solarize & (blue >= 128), 255 - blue, blue)",
        "tl.where(solarize & (blue > 128), 255 - blue, blue)",
        "128 is not inverted",
        "3-height",
    ),
    (JITTER, "at + 2 * stride_c, mask", "at + 2, mask", "channels are taken to be neighbors", "strides"),
    # C++
    (
        JITTER_CPP,
        "((h >= 129) & (h <= 149) & ((h & 1) == 1))",
        "((h >= 129) & (h <= 147) & ((h & 1) == 1))",
        "a hue is not cut",
        "16_million",
    ),
    (
        JITTER_CPP,
        "floats(base) + factor * floats(x - base)",
        "factor * floats(x) + (1 - factor) * floats(base)",
        "another blend",
        "blends",
    ),
    (JITTER_CPP, "(2 * total + count_) / (2 * count_)", "total / count_", "the mean is cut", "half_up"),
    (
        JITTER_CPP,
        "std::fill(plane + c * size_ + count_, plane + (c + 1) * size_, 0);",
        "",
        "what was there before is counted",
        "pillow",
    ),
    (JITTER_CPP, "images.contiguous(), stages", "images, stages", "strides are ignored", "strides"),
    # the blur
    (
        BLUR,
        "((12 * v + 1).sqrt() - 1).div(2).floor()",
        "((12 * v.double() + 1).sqrt() - 1).div(2).floor()",
        "the box in fp64",
        "every_size",
    ),
    (BLUR, "elif FIRST:", "elif LAST:", "an image that is left comes from between", "pillow"),
    (
        BLUR,
        "xs = tl.minimum(tl.maximum(x + step, 0), width - 1)",
        "xs = tl.minimum(x + step, width - 1)",
        "taps ahead of the row",
        "pillow",
    ),
    (
        BLUR,
        "ends = (step == -r - 1) | (step == r + 1)",
        "ends = step == r + 1",
        "one end has the inner weight",
        "pillow",
    ),
    (BLUR, "at.clamp(0, n - 1)", "at.remainder(n)", "the image goes round", "pillow"),
    (BLUR_CPP, "+ (1u << (BITS - 1))", "", "sums are cut", "pillow or photographs"),
    (
        BLUR_CPP,
        "repeat_ends(one, row, channels_, box.r + 1);",
        "repeat_ends(one, row, channels_, box.r);",
        "the outer tap of an end is what was there",
        "pillow or every_size",
    ),
    (
        BLUR_CPP,
        "pass < PASSES; ++pass, std::swap(image, next)",
        "pass < 2; ++pass, std::swap(image, next)",
        "two passes down",
        "pillow",
    ),
    # the draws
    (DRAWS, "(middle - strengths).clamp(min=0)", "middle - strengths", "factors below 0", "ranges"),
    (DRAWS, "& (strengths > 0)[order]", "& (strengths > 0)", "a strength for its place", "no_strength"),
    (DRAWS, "STREAM + draw)", "STREAM)", "every crop has the same colors", "independent"),
    (DRAWS, "u[:, 6] < color.gray", "u[:, 0] < color.gray", "gray comes with jitter", "independent"),
    (DRAWS, "u[:, 5] * len(ORDERS)", "u[:, 5] * 23", "an order is never drawn", "permutations"),
    (
        DRAWS,
        "d.order_B4, d.factors_B4, gray_B=d.gray_B)\n    return",
        "d.order_B4, d.factors_B4, gray_B=d.gray_B, solarize_B=d.solarize_B)\n    return",
        "solarized twice",
        "applied",
    ),
]
