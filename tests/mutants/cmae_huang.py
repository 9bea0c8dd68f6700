"""Planted faults of CMAE of Huang et al.: each must turn a test red (`make mutants`)."""

TESTS = ["tests/methods/test_cmae_huang.py"]
HUANG, DECODER = "fastmim/methods/cmae_huang.py", "fastmim/models/mae_decoder.py"
VIT = "fastmim/models/vit.py"
FORMULAS = "formulas"
FAULTS = [
    (HUANG, "self.target(target_BHWC", "self.target(image_BHWC", "the target sees the online view", FORMULAS),
    (HUANG, "final_norm=False", "final_norm=True", "the target has a final norm", FORMULAS),
    (HUANG, "z_BTD[:, 1:] if self", "z_BTD if self", "the class token is averaged too", FORMULAS),
    (HUANG, "class_token=self.config.target_cls", "class_token=True", "always a class token", FORMULAS),
    (HUANG, "2 * c.temperature if", "c.temperature if", "tau for 2 tau", FORMULAS),
    (HUANG, "pixels + c.contrast_weight * contrast", "pixels + contrast", "no weight", FORMULAS),
    (HUANG, "self.predictor(self.projector(y_BD))", "self.projector(y_BD)", "no predictor", FORMULAS),
    (HUANG, "self.feature_decoder(z", "self.decoder(z", "the pixel decoder's feature", FORMULAS),
    (
        HUANG,
        "pred_BLP, image_BHWC, hidden_BL",
        "pred_BLP, target_BHWC, hidden_BL",
        "the other's pixels",
        "sees",
    ),
    (
        HUANG,
        "GROUP, (N - self.num_seen) // GROUP**2)",
        "GROUP, self.num_seen // GROUP**2)",
        "the mask turned",
        "sizes",
    ),
    (HUANG, "return cells * GROUP**2", "return cells * GROUP", "half as many are visible", "sizes"),
    (
        HUANG,
        "(self.target_projector, self.projector)",
        "(self.target_projector, self.predictor)",
        "averages",
        "target_branch",
    ),
    (HUANG, "config.shift + 1 if", "config.shift if", "a master of 255", "two_windows"),
    (HUANG, "SIMSIAM if config.color else None,\n", "None,\n", "no colors", "two_windows"),
    (HUANG, '"mask_token", ', "", "tokens decay", "decays"),
    (HUANG, 'or name.startswith(("projector.", "predictor."))', "", "scales of heads do not decay", "decays"),
    (
        HUANG,
        'Head(widths, activation="relu"',
        'Head(widths, activation="gelu"',
        "GELU in the heads",
        FORMULAS,
    ),
    (HUANG, "rows % GROUP or columns % GROUP", "columns % GROUP", "an odd number of rows", "refused"),
    (
        DECODER,
        "self.decoder_norm(x).mean(1, dtype",
        "self.decoder_norm(x.mean(1, keepdim=True)).mean(1, dtype",
        "the mean before the norm",
        FORMULAS,
    ),
    (
        VIT,
        "x_BTD[:, 1:], (x_BTD.shape[1] - 1,)",
        "x_BTD[:, :-1], (x_BTD.shape[1] - 1,)",
        "a patch is left out",
        FORMULAS,
    ),
]
