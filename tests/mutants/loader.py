"""Planted faults of the loader: ranks, resume, bad files, leaks, the benchmark of it (`make mutants`)."""

TESTS = [
    "tests/data/test_bad_samples.py",
    "tests/data/test_everywhere.py",
    "tests/data/test_leaks.py",
    "tests/data/test_loader.py",
    "tests/data/test_decoders.py",
    "tests/data/test_pixels.py",
    "tests/engine/test_refusals.py",
    "tests/benchmarks/test_loader.py",
    "tests/benchmarks/test_table.py",
]
LOADER, FILES, BAD = "fastmim/data/feed/loader.py", "fastmim/data/feed/files.py", "fastmim/data/feed/bad.py"
DALI, HEADER, JPEG = (
    "fastmim/data/decode/dali.py",
    "fastmim/data/decode/header.py",
    "fastmim/data/decode/jpeg.py",
)
DRAWS, ORDER, PILLOW = (
    "fastmim/data/augment/draws.py",
    "fastmim/data/feed/order.py",
    "fastmim/data/decode/pillow.py",
)
RACE, PROVIDERS = "benchmarks/pipeline/loader.py", "benchmarks/pipeline/providers.py"
TABLE, SOAK = "benchmarks/pipeline/table.py", "benchmarks/pipeline/soak.py"
FAULTS = [
    (DALI, "        if plain is None or (self._refused",
     "        plain = plain or (data, (CodeStream(data).height, 20))\n        if (self._refused",
     "DALI gets what it is not to decode", "end_the_process or test_decoders"),
    (FILES, "hw_decoder_load=config.hw_decoder_load,", "", "the load is not heard", "load_of_the_conf"),
    (JPEG, "{0xC0, 0xC1, 0xC2}", "{0xC0, 0xC1}", "progressive JPEG is refused", "forms_that"),
    (BAD, "        self._bad.add(image_id)\n", "", "a bad file is named each time", "hundred"),
    (BAD, "if len(self._bad) > limit", "if len(self._bad) > 9 * limit", "no threshold", "threshold"),
    (LOADER, "serve(self._places(start_step))", "serve(self._places(0))", "a start is 0", "any_step"),
    (SOAK, "<= GROWTH and not left", "<= 9 and not left", "no leak is one", "leak_of_memory"),
    (SOAK, "frozenset(child for pids in children for child in pids)", "frozenset()", "processes",
     "process_left"),
    (PROVIDERS, "            transforms.Normalize(MEAN, STD),\n", "", "the baseline does not normalize",
     "maes or delivers"),
]  # fmt: skip
