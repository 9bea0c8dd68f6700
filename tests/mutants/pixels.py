"""Planted faults of what a pixel means and of who judges a file (`make mutants`)."""

TESTS = ["tests/data/test_pixels.py", "tests/data/test_data_commands.py", "tests/data/test_fuzz.py"]
PIXELS, TIFF, JPEG = (
    "fastmim/data/decode/pixels.py",
    "fastmim/data/decode/tiff.py",
    "fastmim/data/decode/jpeg.py",
)
NETPBM, PNG, BMP = "fastmim/data/decode/netpbm.py", "fastmim/data/decode/png.py", "fastmim/data/decode/bmp.py"
PACK, RESIZE, VERIFY = (
    "fastmim/data/sources/pack.py",
    "fastmim/data/decode/resize.py",
    "fastmim/data/feed/verify.py",
)
DALI = "fastmim/data/decode/dali.py"
DECODERS = "test_decoders and pillow"
FAULTS = [
    (PIXELS, "values + maxval) // (2 * maxval)", "values) // (2 * maxval)", "levels are cut off", DECODERS),
    (PIXELS, "        values = maxval - values\n", "        pass\n", "white is zero is not turned",
     DECODERS),
    (PIXELS, "'B' if big == upper else 'L'", "'L' if big == upper else 'B'", "bytes are swapped", DECODERS),
    (BMP, "height > 0, masks", "height < 0, masks", "BMPs stand on their head", DECODERS),
    (PNG, "        if name in KEPT:\n", "        if name:\n", "long text is read", "text_and_profiles"),
    (VERIFY, "make_decoder(decoder,", 'make_decoder("pillow",', "verify asks another decoder",
     "which_trains"),
]  # fmt: skip
