"""Planted faults of resized_crop: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_resized_crop.py"]
PAGE = "kernels/fastmim_kernels/resized_crop.py"
CSRC = "csrc/resized_crop.cpp"
EXACT = "every_back_end"
FAULTS = [
    (PAGE, "wide, i = max(scale, 1.0)", "wide, i = scale", "the reference narrows its filter to enlarge",
     EXACT),
    (PAGE, "for dim, m in ((1, width), (0, height)):", "for dim, m in ((0, height), (1, width)):",
     "columns before rows", EXACT),
    (PAGE, "        start += h\n", "        start += w\n", "rows between the passes overlap", EXACT),
    (PAGE, "scale = max(tallest / height, int(boxes[:, 3].max()) / width, 1.0)",
     "scale = max(tallest / height, 1.0)", "too few taps for a wide box", EXACT),
    (CSRC, "for (int64_t y = 0; y < box_h; y += ROWS) {",
     "for (int64_t y = 0; y + ROWS <= box_h; y += ROWS) {", "the last rows of a box are left out", EXACT),
    (PAGE, "torch.where(x == 0, 1, lanczos_reference(x))", "lanczos_reference(x)", "0 by 0", EXACT),
    (PAGE, "return s * (1 - s * 4 / 3) / (b * b)", "return s * (1 - s) / (b * b)", "another window", EXACT),
    (PAGE, "for k in range(10, 0, -1)))", "for k in range(5, 0, -1)))", "a short series", "mathematical"),
    (CSRC, "if (x == 0) return 1;", "if (x == 0) return 0;", "no weight at the center in C++", EXACT),
]  # fmt: skip
