"""Planted faults of what a pixel means and of who judges a file (`make mutants`)."""

TESTS = ["tests/data/test_pixels.py", "tests/data/test_data_commands.py", "tests/data/test_fuzz.py"]
PIXELS, TIFF, JPEG = "fastmim/data/pixels.py", "fastmim/data/tiff.py", "fastmim/data/jpeg.py"
NETPBM, PNG, BMP = "fastmim/data/netpbm.py", "fastmim/data/png.py", "fastmim/data/bmp.py"
PACK, RESIZE, VERIFY = "fastmim/data/pack.py", "fastmim/data/resize.py", "fastmim/data/verify.py"
DALI = "fastmim/data/dali.py"
DECODERS = "test_decoders and pillow"
FAULTS = [
    (PIXELS, "values + maxval) // (2 * maxval)", "values) // (2 * maxval)", "levels are cut off", DECODERS),
    (TIFF, "plain = {ORIENTATION: 1, FORMAT: 1}", "plain = {FORMAT: 1}", "TIFFs are turned", DECODERS),
    (PIXELS, "        values = maxval - values\n", "        pass\n", "white is zero is not turned", DECODERS),
    (PIXELS, "values ^ (maxval + 1) // 2", "values", "signed samples are not shifted", DECODERS),
    (PIXELS, "    if facts.premultiplied:\n", "    if not facts:\n", "alpha stays in colors", DECODERS),
    (PIXELS, "'B' if big == upper else 'L'", "'L' if big == upper else 'B'", "bytes are swapped", DECODERS),
    (NETPBM, 'np.frombuffer(data, ">u2"', 'np.frombuffer(data, "<u2"', "PGM in little end", DECODERS),
    (NETPBM, "return 1 - numbers if", "return numbers if", "bitmaps are negatives", DECODERS),
    (BMP, "height > 0, masks", "height < 0, masks", "BMPs stand on their head", DECODERS),
    (PIXELS, ">> 16 - bits, 2**bits - 1, deep", ">> 16 - bits, DEEP, deep", "12 bits are dark", DECODERS),
    (PNG, "        if name in KEPT:\n", "        if name:\n", "long text is read", "text_and_profiles"),
    (PACK, "sample_id, deep=True)", "sample_id)", "packing leaves 8 bits", "16_bits"),
    (RESIZE, "png.only_pixels(data) if", "data if", "orientation behind long text", "orientation_of"),
    (
        VERIFY,
        "make_decoder(decoder,",
        'make_decoder("pillow",',
        "verify asks another decoder",
        "which_trains",
    ),
    (
        JPEG,
        "        if marker in wrong:",
        "        if marker < 0:",
        "damage in a scan is DALI's",
        "in_a_scan",
    ),
    (
        DALI,
        "images[slot] = to_device(_cut(task.result(), slot, request.draws), self._device)",
        "images[slot] = to_device(task.result(), self._device)",
        "whole pictures where boxes are wanted",
        "test_decoders and dali",
    ),
]
