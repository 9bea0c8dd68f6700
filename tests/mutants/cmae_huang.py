"""Planted faults of CMAE of Huang et al.: each must turn a test red (`make mutants`)."""

TESTS = ["tests/methods/test_cmae_huang.py"]
HUANG, DECODER = "fastmim/methods/cmae_huang.py", "fastmim/models/mae_decoder.py"
VIT = "fastmim/models/vit.py"
FORMULAS = "formulas"
FAULTS = [
    (HUANG, "self.target(target_BHWC", "self.target(image_BHWC", "the target sees the online view",
     FORMULAS),
    (HUANG, "2 * c.temperature if", "c.temperature if", "tau for 2 tau", FORMULAS),
    (HUANG, "self.feature_decoder(z", "self.decoder(z", "the pixel decoder's feature", FORMULAS),
    (HUANG, "return cells * GROUP**2", "return cells * GROUP", "half as many are visible", "sizes"),
    (HUANG, "config.shift + 1 if", "config.shift if", "a master of 255", "two_windows"),
    (HUANG, '"mask_token", ', "", "tokens decay", "decays"),
    (HUANG, "rows % GROUP or columns % GROUP", "columns % GROUP", "an odd number of rows", "refused"),
]  # fmt: skip
