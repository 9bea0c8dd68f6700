"""Planted faults of ema_update: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_ema_update.py"]
EMA = "kernels/fastmim_kernels/ema_update.py"
FAULTS = [
    # Triton
    (
        EMA,
        "tl.where(rate < 0.5, t32 + rate * far, s.to(tl.float32) - (1.0 - rate) * far).to(t.dtype)",
        "((1.0 - rate) * t32 + rate * s.to(tl.float32)).to(t.dtype)",
        "the form whose factors, rounded, do not add up to one",
        "rests",
    ),
    (
        EMA,
        "tl.where(rate < 0.5, t32 + rate * far, s.to(tl.float32) - (1.0 - rate) * far).to(t.dtype)",
        "(t32 + rate * far).to(t.dtype)",
        "at momentum 0 the teacher is not quite the student",
        "ends_are_exact",
    ),
    (
        EMA,
        "start = (tl.program_id(0) - tl.load(row + 3)) * CHUNK",
        "start = tl.program_id(0) * CHUNK",
        "a tensor's first chunk is taken to be the first of all",
        "matches_definition",
    ),
    (
        EMA,
        "if start + CHUNK <= count:",
        "if start <= count:",
        "the last chunk writes past the end of its tensor",
        "neighbors",
    ),
    (
        EMA,
        "s_ptr = _pointer(student, KINDS[i] // 2 % 3, KINDS[i] % 2) + at",
        "s_ptr = _pointer(student, KINDS[i] // 2 // 3, KINDS[i] % 2) + at",
        "the student is read in the dtype of the teacher",
        "matches_definition",
    ),
    (
        EMA,
        "teacher, student, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)",
        "teacher, student, count = tl.load(row + 1), tl.load(row), tl.load(row + 2)",
        "the student moves towards the teacher",
        "matches_definition",
    ),
    # launcher
    (
        EMA,
        "_update_kernel[(len(owner),)](table, owner, 1 - momentum",
        "_update_kernel[(len(owner),)](table, owner, momentum",
        "momentum and rate exchanged",
        "matches_definition",
    ),
    (
        EMA,
        "owner += [i] * triton.cdiv(count, CHUNK)",
        "owner += [i] * (count // CHUNK)",
        "the chunk that is not full is left out",
        "matches_definition",
    ),
    (
        EMA,
        "return tuple((x.data_ptr(), x.numel(), FLOATS.index(x.dtype)) for x in tensors)",
        "return tuple((x.data_ptr(), tensors[0].numel(), FLOATS.index(x.dtype)) for x in tensors)",
        "every tensor has the size of the first",
        "matches_definition",
    ),
    (
        EMA,
        "aligned = to % 16 == 0 and source % 16 == 0",
        "aligned = to % 16 == 0",
        "a student at an odd address is read as vectors",
        "promised",
    ),
    # CPU form
    (
        EMA,
        "            t.lerp_(s, 1 - momentum)\n",
        "            t.lerp_(s, momentum)\n",
        "on the CPU momentum and rate exchanged",
        "matches_definition or plain",
    ),
    (
        EMA,
        "arithmetic = torch.float64 if t.dtype == torch.float64 else torch.float32\n"
        "        if t.dtype == s.dtype == arithmetic:",
        "arithmetic = t.dtype\n        if t.dtype == s.dtype == arithmetic:",
        "on the CPU the arithmetic is in 16 bits",
        "rounded_once",
    ),
    # registration and checks
    (
        EMA,
        'mutates_args=("teacher",)',
        "mutates_args=()",
        "autograd and compile are not told that the teacher moves",
        "registered or compiles or learn",
    ),
    (
        EMA,
        "    _check_apart(_places(teacher))\n    ema_update_reference(",
        "    ema_update_reference(",
        "the CPU takes tensors that share memory",
        "rejects",
    ),
    (
        EMA,
        "end, before = address + count * FLOATS[dtype].itemsize, i",
        "end, before = address + count, i",
        "an overlap of the last values is not seen",
        "rejects",
    ),
    (
        EMA,
        "if not 0 <= momentum <= 1:",
        "if momentum < 0 or momentum > 1:",
        "a momentum of NaN passes",
        "rejects",
    ),
    (
        EMA,
        "if t.shape != s.shape:",
        "if t.numel() != s.numel():",
        "a student of another shape passes",
        "rejects",
    ),
    (
        EMA,
        "if not t.is_contiguous() or not s.is_contiguous():",
        "if not t.is_contiguous():",
        "a student with other strides passes",
        "rejects",
    ),
]
