"""Planted faults of MAE, R-MAE and CutMix: each must turn a test red (`make mutants`)."""

TESTS = ["tests/methods/test_mae.py", "tests/methods/test_rmae.py", "tests/models/test_cutmix.py"]
MAE, RMAE = "fastmim/methods/mae.py", "fastmim/methods/rmae.py"
CUTMIX = "fastmim/models/cutmix.py"
FAULTS = [
    (CUTMIX, ".neg().add(1).sqrt()", ".sqrt().neg().add(1)", "side and share are confused", "shares"),
    (CUTMIX, "- length_B // 2", "", "the center is a corner", "shares"),
    (
        CUTMIX,
        "cell >= first_B",
        "cell > first_B",
        "a box loses its first row",
        "shares or pixels or rectangle",
    ),
    (CUTMIX, "u_B3[:, 1:].unbind(1)", "u_B3[:, :2].unbind(1)", "the place follows from the size", "shares"),
    (CUTMIX, ".flip(1)", ".roll(1, 0)", "partners of the next pair", "partners or pixels"),
    (
        CUTMIX,
        "expand(-1, -1, patch, -1, patch)",
        "expand(-1, -1, patch, -1, patch).flip(3)",
        "mirrored",
        "pixels",
    ),
    (MAE, "batch.crops[0], batch.crops[-1]", "batch.crops[-1], batch.crops[0]", "target and input", "clean"),
    (
        MAE,
        "mix_patches(shown_BHWC, foreign_BN, self.model.patch), target_BHWC",
        "(x := mix_patches(shown_BHWC, foreign_BN, self.model.patch)), x",
        "the mixed image is predicted",
        "clean",
    ),
    (MAE, "None if foreign_BN is None else foreign_BN.float()", "None", "all patches are scored", "clean"),
    (MAE, '"visible": (jittered, clean)', '"visible": (clean, jittered)', "colors on the target", "clean"),
    (
        MAE,
        "weight_BL.sum().clamp(min=1)",
        "weight_BL.numel()",
        "the mean of all patches",
        "clean or independent",
    ),
    (
        RMAE,
        'check_ratio("method.mask-ratio", self.mask_ratio)',
        "pass",
        "R-MAE that hides nothing",
        "refused",
    ),
]
