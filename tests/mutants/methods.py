"""Planted faults of MAE, R-MAE and CutMix: each must turn a test red (`make mutants`)."""

TESTS = ["tests/methods/test_mae.py", "tests/methods/test_rmae.py", "tests/models/test_cutmix.py"]
MAE, RMAE = "fastmim/methods/mae.py", "fastmim/methods/rmae.py"
CUTMIX = "fastmim/models/cutmix.py"
FAULTS = [
    (CUTMIX, ".neg().add(1).sqrt()", ".sqrt().neg().add(1)", "side and share are confused", "shares"),
    (CUTMIX, "u_B3[:, 1:].unbind(1)", "u_B3[:, :2].unbind(1)", "the place follows from the size", "shares"),
    (CUTMIX, ".flip(1)", ".roll(1, 0)", "partners of the next pair", "partners or pixels"),
    (MAE, "None if foreign_BN is None else foreign_BN.float()", "None", "all patches are scored", "clean"),
]  # fmt: skip
