"""Planted faults of the sources, their index, packing and the data commands (`make mutants`).

Those of Parquet show only where pyarrow is installed.
"""

TESTS = [  # what is run against each
    "tests/data/test_source.py",
    "tests/data/test_source_kinds.py",
    "tests/data/test_source_index.py",
    "tests/data/test_source_world.py",
    "tests/data/test_pack.py",
    "tests/data/test_data_commands.py",
]
INDEX, FOLDER, IMAGES = (
    "fastmim/data/sources/index.py",
    "fastmim/data/sources/folder.py",
    "fastmim/data/sources/images.py",
)
TAR, PARQUET, MEMORY = (
    "fastmim/data/sources/tar.py",
    "fastmim/data/sources/parquet.py",
    "fastmim/data/sources/memory.py",
)
PACK, RESIZE, STATS = (
    "fastmim/data/sources/pack.py",
    "fastmim/data/decode/resize.py",
    "fastmim/data/sources/stats.py",
)
SOURCE, SCAN, COMMANDS = (
    "fastmim/data/sources/source.py",
    "fastmim/data/sources/scan.py",
    "fastmim/commands/data_reports.py",
)
FAULTS = [
    (INDEX, "ctimes.max() < now_ns - SETTLED_NS", "ctimes.max() < now_ns", "a fresh set is kept",
     "just_now"),
    (INDEX, 'header.get("path") != _key(path) or ', "", "the index of another set is believed", "broken"),
    (INDEX, "i = range(len(self))[i]", "i = i % len(self)", "names without an end", "sequence"),
    (FOLDER, "if here in above:", "if here in above[-1:]:", "links in a circle", "links"),
    (FOLDER, "error.errno == errno.ELOOP", "error.errno == errno.ENOSYS", "one looping link", "circles"),
    (FOLDER, ".removeprefix(codecs.BOM_UTF8)", "", "a byte order mark is a part of the name", "lists_as"),
    (IMAGES, "if low < 0 or high >= limit:", "if high >= limit:", "negative labels", "bad_lists"),
    (TAR, "elif member.issparse():", "elif member.ischr():", "holes of sparse members", "sparse"),
    (TAR, "if len(texts) != len(images):", "if not texts:", "one label for two images", "members"),
    (PARQUET, 'side="right")) - 1', 'side="left")) - 1', "the first row of a group", "every_source"),
    (PARQUET, "if i and said != classes:", "if i and len(said) != len(classes):", "other classes",
     "number"),
    (PARQUET, "start + sum(rows[:g])", "sum(rows[:g])", "groups of the second file", "every_source"),
    (SOURCE, "    if len(first) < 2:", "    if first:", "train and test are mixed", "splits"),
    (MEMORY, "{shape[2]} {shape[1]}", "{shape[1]} {shape[2]}", "height for width", "pixel_by_pixel"),
    (PACK, "following = sample_id, packed", "following = None", "the image that did not fit is lost",
     "full or every_step"),
    (PACK, "    os.replace(new, folder / name)\n", "", "no shard", "reads_as"),
    (RESIZE, "    small.info.clear()", "    image.info.clear()", "comments are kept", "orientation"),
    (STATS, "second - first**2", "second - first", "variance about zero", "numpys"),
]  # fmt: skip
