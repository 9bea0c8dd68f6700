"""Planted faults of C-MAE, its heads, its health numbers and its variants: each must turn a test red."""

TESTS = [
    "tests/methods/test_cmae.py",
    "tests/methods/test_contrast.py",
    "tests/methods/test_health.py",
    "tests/methods/test_cmae_ranks.py",
    "tests/models/test_heads.py",
    "tests/models/test_vit.py",
    "tests/test_variants.py",
]
METHOD = "fastmim/methods/cmae.py"
LOSS = "fastmim/methods/contrast.py"
HEALTH = "fastmim/methods/health.py"
HEADS = "fastmim/models/heads.py"
VIT = "fastmim/models/vit.py"
RECIPES = "fastmim/recipes.py"
ARGUMENTS = "fastmim/arguments.py"
FAULTS = [
    (METHOD, "self.target_projector(x_BLD), target_BK)", "self.projector(x_BLD), target_BK)",
     "keys go through the online projector", "test_cmae and formulas and positions"),
    (METHOD, "one, two = batch.crops[0], batch.crops[-1]", "one = two = batch.crops[0]",
     "both branches see the first colors", "own_view"),
    (METHOD, "self.direction(batch.seeds_B, two, seen2_BK, one, seen1_BK)",
     "self.direction(batch.seeds_B, two, seen1_BK, one, seen2_BK)",
     "the second direction keeps the masks of the first", "formulas and symmetric"),
    (METHOD, 'hidden=positions == "masked"', 'hidden=positions == "visible"',
     "masked and visible are exchanged", "formulas and positions"),
    (METHOD, "weight_BT = self.weight(online_BK, keys.positive_present_BT())",
     "weight_BT = self.weight(online_BK, keys.present_BT)",
     "under CutMix it is not looked at whose key is there", "formulas and cutmix and mask_token"),
    (METHOD, "stream = SECOND_MASK.of() if", "stream = 0 if", "T2 draws the mask of T1",
     "draws_of_their_own"),
    (METHOD, "(self.target_encoder, self.encoder), (self.target_projector, self.projector)",
     "((self.target_encoder, self.encoder),)", "the target's projector never moves", "averages_are"),
    (METHOD, "2 * c.temperature if c.loss_scale", "c.temperature if c.loss_scale", "2 tau without its 2",
     "2tau"),
    (LOSS, "named = labeled(keys.images_BT(), ranks.rank * B)", "named = labeled(keys.images_BT(), 0)",
     "the positive is that of rank 0", "number_of_ranks"),
    (LOSS, "return loss_BT + share_BT.clamp(min=TINY).log()", "return loss_BT",
     "absent keys are candidates", "absent"),
    (LOSS, "total = ranks.gather(total[None]).sum() / ranks.world", "pass",
     "each rank divides by its own number of tokens", "number_of_ranks"),
    (LOSS, "torch.exp(-num / others.clamp(min=1) / temperature)", "torch.exp(-1 / temperature + 0 * num)",
     "the floor forgets that keys of a simplex point apart", "floor"),
    (HEALTH, "across_BT = (q * (k.sum(0) - k)).sum(-1)", "across_BT = (q * k.sum(0)).sum(-1)",
     "the positive counts among the negatives", "equal_loops"),
    (HEALTH, "or rank < COLLAPSED_RANK", "or False", "a single direction is healthy", "one_direction"),
    (HEADS, "self.running_var.lerp_(var_C * unbiased, self.momentum)",
     "self.running_var.lerp_(var_C, self.momentum)", "the running variance is biased", "batch_norm"),
]  # fmt: skip
