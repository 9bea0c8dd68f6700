"""Planted faults of the parity page: each must turn a test red (`make mutants`)."""

TESTS = ["tests/benchmarks/test_parity.py"]
PAGE = "benchmarks/pipeline/parity.py"
REFERENCE = "benchmarks/pipeline/parity_reference.py"
BOXES = "benchmarks/pipeline/parity_boxes.py"
FILES = "benchmarks/pipeline/parity_files.py"
TEXT = "benchmarks/pipeline/parity_page.py"
FAULTS = [
    (REFERENCE, "self.equal += not error.any()", "self.equal += 1", "all images are equal", "planted"),
    (
        REFERENCE,
        "if error.mean() > self.worst_mae:",
        "if error.mean() >= 0:",
        "the last image is the worst",
        "planted",
    ),
    (REFERENCE, "10 * math.log10(255**2", "20 * math.log10(255**2", "twice the PSNR", "planted or off"),
    (
        REFERENCE,
        "error = np.abs(ours.astype(np.int16) - theirs)",
        "error = np.abs(ours - theirs)",
        "bytes wrap around",
        "hand or off or planted",
    ),
    (
        REFERENCE,
        "return image.resize((size[1], height), kind).resize",
        "return image.resize",
        "one call",
        "hand or tiny",
    ),
    (
        REFERENCE,
        '    F = torchvision("transforms.functional")\n    for stage in',
        '    F = torchvision("transforms.functional")\n    return image\n    for stage in',
        "nothing is colored",
        "tiny",
    ),
    (PAGE, "reference.cropped_rows_first(*crop))", "ours.cpu().numpy())", "ours against itself", "planted"),
    (
        PAGE,
        'row["expect_equal"] and row["equal_share"] < 1',
        'row["expect_equal"] and row["equal_share"] < 0',
        "what differs passes",
        "planted",
    ),
    (PAGE, 'row["p"] < LEAST_P', 'row["p"] < 0', "any law passes", "law"),
    (PAGE, "return 1 if wrong else 0", "return 0", "the status is always good", "planted"),
    (
        PAGE,
        "except (BadImage, OSError) as error:",
        "except ZeroDivisionError as error:",
        "bad files",
        "named",
    ),
    (PAGE, "image = reference.flipped(image) if draws", "image = image if draws", "no flip", "tiny"),
    (BOXES, "/ (len(a) + len(b))", "/ len(a)", "p of one sample", "tables"),
    (BOXES, "math.exp(-2 * k * k * reach)", "math.exp(-k * k * reach)", "p too large", "tables"),
    (BOXES, "share = float(flips.mean())", "share = crop.flip", "flips are always even", "even"),
    (BOXES, '"area": height * width / (H * W)', '"area": height / height', "no area", "law"),
    (
        FILES,
        "levels = np.rint(np.asarray(image) / 257)",
        "levels = np.asarray(image) // 256",
        "256",
        "becomes",
    ),
    (FILES, "turned[ORIENTATION] = 6", "pass", "a file that is not turned", "called"),
    (FILES, "boxes = boxes_B4[some]", "boxes = boxes_B4[some][:, [0, 1, 3, 2]]", "width for height", "dali"),
    (FILES, "some = slice(start, start + BATCH)", "some = slice(0, BATCH)", "the first again", "dali"),
    (FILES, "except Rejected as rejected:", "except ZeroDivisionError as rejected:", "refusals", "refused"),
    (
        TEXT,
        'all(r["equal_share"] == 1 for r in of["stage"] if r["expect_equal"])',
        "True",
        "always said to be exact",
        "off",
    ),
    (TEXT, 'said = r["refused"] if', 'said = "" if', "a refusal without its reason", "refused"),
]
