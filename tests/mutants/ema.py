"""Planted faults of ema_update: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_ema_update.py"]
EMA = "kernels/fastmim_kernels/ema_update.py"
FAULTS = [
    (EMA, "tl.where(rate < 0.5, t32 + rate * far, s.to(tl.float32) - (1.0 - rate) * far).to(t.dtype)",
     "((1.0 - rate) * t32 + rate * s.to(tl.float32)).to(t.dtype)",
     "the form whose factors, rounded, do not add up to one", "rests"),
    (EMA, "if start + CHUNK <= count:", "if start <= count:",
     "the last chunk writes past the end of its tensor", "neighbors"),
    (EMA, "_update_kernel[(len(owner),)](table, owner, 1 - momentum",
     "_update_kernel[(len(owner),)](table, owner, momentum", "momentum and rate exchanged",
     "matches_definition"),
    (EMA, "aligned = to % 16 == 0 and source % 16 == 0", "aligned = to % 16 == 0",
     "a student at an odd address is read as vectors", "promised"),
    (EMA, 'mutates_args=("teacher",)', "mutates_args=()",
     "autograd and compile are not told that the teacher moves", "registered or compiles or learn"),
    (EMA, "if not 0 <= momentum <= 1:", "if momentum < 0 or momentum > 1:", "a momentum of NaN passes",
     "rejects"),
]  # fmt: skip
