"""Planted faults of the cache, of repeated images and of who counts the bad files (`make mutants`)."""

TESTS = ["tests/data/test_cache.py"]
CACHE, SIZES, LOADER = "fastmim/data/cache.py", "fastmim/data/sizes.py", "fastmim/data/loader.py"
WHOLE = "fastmim/data/whole.py"
BAD, CONFIG, DALI = "fastmim/data/bad.py", "fastmim/data/config.py", "fastmim/data/dali.py"
SAME = "same_batches_with and pillow"
FAULTS = [
    (CACHE, "(w * C, C, 1), start)", "(h * C, C, 1), start)", "rows as long as the image is high", SAME),
    (
        CACHE,
        "sizes.bytes_N.cumsum() - sizes.bytes_N",
        "sizes.bytes_N.cumsum() - sizes.bytes_N[0]",
        "images overlap where sizes differ",
        SAME,
    ),
    (
        CACHE,
        "self._cache.images(place.images_B), draws)",
        "self._cache.images(place.images_B[::-1]), draws)",
        "the pixels of another slot",
        "copied",
    ),
    (
        CACHE,
        "return Cache(buffer, starts_N[shown_N], sizes.sizes_N2[shown_N], channels)",
        "return Cache(buffer, starts_N, sizes.sizes_N2[shown_N], channels)",
        "a bad image shows what lies in its own place",
        "replaced",
    ),
    (
        WHOLE,
        "waiting = {image_id: data for image_id, data in waiting.items() if image_id not in bad}",
        "waiting = {}",
        "one bad image takes the others of its chunk with it",
        "replaced",
    ),
    (
        WHOLE,
        "        for image_id, read in reading.items():\n",
        "        for image_id, read in ((i, x) for i, x in reading.items() if not isinstance(x, str)):\n",
        "files that cannot be read are not named",
        "replaced or named",
    ),
    (CACHE, "        self._cache = None\n", "        pass\n", "a closed cache is kept", "closing"),
    (
        CACHE,
        "isinstance(image, Tensor) and image.shape != place.shape",
        "isinstance(image, Tensor) and image.numel() > place.numel()",
        "a smaller image is spread over a larger one's place",
        "changes",
    ),
    (
        LOADER,
        "seeds_B, ids % self._num_images)",
        "seeds_B, ids // self._num_images)",
        "repeats of one image come together",
        "copied",
    ),
    (
        LOADER,
        "epoch=start_step // order.steps_per_epoch",
        "epoch=0",
        "bad files of a later start are named by epoch 0",
        "repeated_bad or named_by",
    ),
    (LOADER, "quiet=order.rank > 0", "quiet=False", "every rank says what it decodes", "terminal"),
    (
        BAD,
        "image_id = (image_id + 1) % len(self._images)",
        "image_id = (image_id - 1) % len(self._images)",
        "the image before shows in the place of a bad one",
        "replaced",
    ),
    (
        BAD,
        "len(self._bad) > limit or",
        "len(self._bad) >= limit or",
        "the last bad file that is allowed ends the run",
        "repeated_bad",
    ),
    (
        CONFIG,
        "if self.epoch_images < num_images:",
        "if self.epoch_images < 1:",
        "images that are never seen",
        "lengths",
    ),
    (
        DALI,
        "if len({crop.box for crop in crops}) != 1:",
        "if len({crop.box for crop in crops}) > 1:",
        "the decoder of the cache waits for boxes",
        "one_image and dali",
    ),
    (SIZES, "* channels * copies", "* channels", "ranks of a node share one copy", "fit"),
    (SIZES, "if taken > room:", "if taken >= room:", "what just fits is refused", "fit"),
    (
        SIZES,
        "(own, *own.parents)",
        "(own,)",
        "the limit of an outer group is missed",
        "control_group",
    ),
    (SIZES, '- int(stat["inactive_file"])', "", "file pages count as taken", "control_group"),
    (
        SIZES,
        'return device if config.cache == "device" else torch.device("cpu")',
        'return torch.device("meta")',
        "the images are kept nowhere",
        SAME,
    ),
]
