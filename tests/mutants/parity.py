"""Planted faults of the parity page: each must turn a test red (`make mutants`)."""

TESTS = ["tests/benchmarks/test_parity.py"]
PAGE = "benchmarks/pipeline/parity.py"
REFERENCE = "benchmarks/pipeline/parity_reference.py"
BOXES = "benchmarks/pipeline/parity_boxes.py"
FILES = "benchmarks/pipeline/parity_files.py"
TEXT = "benchmarks/pipeline/parity_page.py"
FAULTS = [
    (REFERENCE, "self.equal += not error.any()", "self.equal += 1", "all images are equal", "planted"),
    (REFERENCE, "10 * math.log10(255**2", "20 * math.log10(255**2", "twice the PSNR", "planted or off"),
    (PAGE, "reference.cropped_rows_first(*crop))", "ours.cpu().numpy())", "ours against itself", "planted"),
    (PAGE, 'row["p"] < LEAST_P', 'row["p"] < 0', "any law passes", "law"),
    (PAGE, "image = reference.flipped(image) if draws", "image = image if draws", "no flip", "tiny"),
    (BOXES, "share = float(flips.mean())", "share = crop.flip", "flips are always even", "even"),
    (FILES, "turned[ORIENTATION] = 6", "pass", "a file that is not turned", "called"),
    (FILES, "except Rejected as rejected:", "except ZeroDivisionError as rejected:", "refusals", "refused"),
]  # fmt: skip
