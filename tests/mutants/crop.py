"""Planted faults of resized_crop: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_resized_crop.py"]
PAGE = "kernels/fastmim_kernels/resized_crop.py"
CSRC = "csrc/resized_crop.cpp"
EXACT = "every_back_end"
FAULTS = [
    (
        PAGE,
        "wide, i = max(scale, 1.0)",
        "wide, i = scale",
        "the reference narrows its filter to enlarge",
        EXACT,
    ),
    (
        PAGE,
        "torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).long()",
        "scaled.long()",
        "the reference cuts weights off",
        EXACT,
    ),
    (
        PAGE,
        "for dim, m in ((1, width), (0, height)):",
        "for dim, m in ((0, height), (1, width)):",
        "columns before rows",
        EXACT,
    ),
    (
        PAGE,
        "at = (b * 2 + axis) * tl.maximum(height, width) + i",
        "at = (b * 2 + axis) * m + i",
        "weights of a wide size overlap those of its height",
        EXACT,
    ),
    (
        PAGE,
        "last = tl.minimum((center + support + 0.5).to(tl.int64), n)",
        "last = (center + support + 0.5).to(tl.int64)",
        "taps beyond the box have weight",
        EXACT,
    ),
    (
        PAGE,
        "to = tl.where(flip != 0, width - 1 - x, x) * C + c",
        "to = tl.where(flip != 0, width - x, x) * C + c",
        "a flipped row starts one pixel early",
        EXACT,
    ),
    (
        PAGE,
        "corner = image.data_ptr() + top * image.stride(0) + left * C",
        "corner = image.data_ptr() + top * image.stride(0) + left",
        "the box starts within a pixel",
        EXACT,
    ),
    (PAGE, "        start += h\n", "        start += w\n", "rows between the passes overlap", EXACT),
    (
        PAGE,
        "scale = max(tallest / height, int(boxes[:, 3].max()) / width, 1.0)",
        "scale = max(tallest / height, 1.0)",
        "too few taps for a wide box",
        EXACT,
    ),
    (
        PAGE,
        "if image.stride(2) != 1 or image.stride(1) != C:",
        "if image.stride(2) != 1:",
        "pixels that are not contiguous pass",
        "rejects",
    ),
    (
        PAGE,
        "top + h > image.shape[0] or left + w > image.shape[1]",
        "top + h > image.shape[1] or left + w > image.shape[0]",
        "boxes are held against the sides exchanged",
        "rejects or longer or every_back_end",
    ),
    (
        CSRC,
        "for (int64_t y = 0; y < box_h; y += ROWS) {",
        "for (int64_t y = 0; y + ROWS <= box_h; y += ROWS) {",
        "the last rows of a box are left out",
        EXACT,
    ),
    (
        CSRC,
        "const Ints v = sum >> BITS, zero{}, top = zero + 255;",
        "const Ints v = sum >> BITS, zero{}, top = zero + 256;",
        "overshoot wraps around",
        EXACT,
    ),
    (
        CSRC,
        "uint8_t* at = to + (flip ? width_ - 1 - x : x) * C;",
        "uint8_t* at = to + x * C;",
        "C++ does not flip",
        EXACT,
    ),
    (
        CSRC,
        "const double scale = static_cast<double>(in) / out, wide",
        "const double scale = static_cast<float>(in) / out, wide",
        "the scale is a float's",
        "every_back_end or large",
    ),
]
