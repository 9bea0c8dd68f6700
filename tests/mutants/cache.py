"""Planted faults of the cache, of repeated images and of who counts the bad files (`make mutants`)."""

TESTS = ["tests/data/test_cache.py"]
CACHE, SIZES, LOADER = (
    "fastmim/data/feed/cache.py",
    "fastmim/data/feed/sizes.py",
    "fastmim/data/feed/loader.py",
)
WHOLE = "fastmim/data/feed/whole.py"
BAD, CONFIG, DALI = "fastmim/data/feed/bad.py", "fastmim/data/config.py", "fastmim/data/decode/dali.py"
SAME = "same_batches_with and pillow"
FAULTS = [
    (CACHE, "(w * C, C, 1), start)", "(h * C, C, 1), start)", "rows as long as the image is high", SAME),
    (CACHE, "self._cache.images(place.images_B), draws)",
     "self._cache.images(place.images_B[::-1]), draws)", "the pixels of another slot", "copied"),
    (CACHE, "        self._cache = None\n", "        pass\n", "a closed cache is kept", "closing"),
    (LOADER, "quiet=order.rank > 0", "quiet=False", "every rank says what it decodes", "terminal"),
    (BAD, "image_id = (image_id + 1) % len(self._images)", "image_id = (image_id - 1) % len(self._images)",
     "the image before shows in the place of a bad one", "replaced"),
    (SIZES, "* channels * copies", "* channels", "ranks of a node share one copy", "fit"),
    (SIZES, '- int(stat["inactive_file"])', "", "file pages count as taken", "control_group"),
]  # fmt: skip
