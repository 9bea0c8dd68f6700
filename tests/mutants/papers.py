"""Planted faults of methods with crops, codes, tokens and labels: each turns a test red (`make mutants`)."""

TESTS = [
    *(f"tests/methods/test_{n}.py" for n in ("mocov3", "dino", "ibot", "data2vec", "beit", "simmim")),
    "tests/methods/test_supervised.py",
    "tests/data/test_rand_augment.py",
]
MOCO, CODES, IBOT, D2V, BEIT, CAE, SIMMIM, TOKENS, MIXING, SUPERVISED = (
    f"fastmim/methods/{n}.py"
    for n in (
        *("mocov3", "codes", "ibot", "data2vec", "beit", "cae", "simmim", "tokens", "mixing", "supervised"),
    )
)
RAND_AUGMENT, LOADER = "fastmim/data/augment/rand_augment.py", "fastmim/data/feed/loader.py"
FAULTS = [
    (MOCO, "second_B2D).flip(1)", "second_B2D)", "a query meets the key of its own crop", "mocov3"),
    (MOCO, "scale=2 * c.temperature", "scale=1.0", "2 tau is forgotten", "mocov3"),
    (MOCO, "return Output(CROPS * loss", "return Output(loss", "the mean of both directions", "mocov3"),
    (MOCO, "return Group(decay=True)", "return Group()", "norms and biases do not decay", "mocov3"),
    (CODES, "crop_S1 == teacher_12, -1", "crop_S1 == -1, -1", "a crop is compared with itself", "dino"),
    (CODES, "max(self.warmup_epochs - 1, 1)", "self.warmup_epochs", "the warm-up ends too early", "dino"),
    (CODES, 'startswith("head.codes.")', 'startswith("codes.")', "the last layer is never frozen", "dino"),
    (IBOT, "count_BT.clamp(min=1)).mean()", "count_BT.sum()).sum()", "no mean over images", "ibot"),
    (IBOT, "self.patch_center.add(mean_1K)", "self.patch_center.add(teacher_UK)", "one center", "ibot"),
    (IBOT, "torch.nn.init.zeros_(token)", "pass", "the mask token starts as noise", "ibot"),
    (D2V, "encoded.blocks if self.config.of ==", "encoded.mlps if self.config.of ==", "MLPs", "data2vec"),
    (D2V, "return F.layer_norm(mean_BND, mean_BND.shape[-1:], eps=EPS)", "return mean_BND", "one norm",
     "data2vec"),
    (D2V, "beta=c.beta, reduction", "beta=1.0, reduction", "another beta", "data2vec"),
    (BEIT, "self.tokens(small_BHWC).gather(1, index_BL)", "self.tokens(small_BHWC)[:, : index_BL.shape[1]]",
     "tokens of the first patches", "beit"),
    (TOKENS, "mean_over_ranks(loss_BL, weight_BL, ranks)", "loss_BL.mean()", "what fills up counts", "beit"),
    (CAE, "torch.cat([visible_BVD, q_BLD], dim=1), pos", "torch.cat([q_BLD, visible_BVD], dim=1), pos",
     "keys at the positions of others", "test_beit"),
    (CAE, "z_BLD + self.positions(hidden_BL)", "z_BLD", "the decoder does not know where", "test_beit"),
    (SIMMIM, "TINY = 1e-5", "TINY = 1.0", "one hidden pixel more", "simmim"),
    (MIXING, "target.flip(1) * (1 - share_S11)", "target.flip(1) * share_S11", "labels of 2 l", "supervised"),
    (MIXING, "seeds_B[::block]", "seeds_B[:: len(seeds_B)].expand(len(seeds_B) // block)", "one lambda",
     "supervised"),
    (MIXING, "torch.where(is_cut_S, 1 - inside_SHW.double().mean((1, 2)), share_S)", "share_S",
     "the label forgets what the border cuts off", "supervised"),
    (MIXING, "fits.float().argmax(1)", "0 * fits.float().argmax(1)", "only the first try", "supervised"),
    (SUPERVISED, "x_BTD[:, 1:].mean(1) if", "x_BTD.mean(1) if", "the class token is in the mean",
     "supervised"),
    (RAND_AUGMENT, "share * i.size[1]", "share * i.size[0]", "down by a share of the width", "translate_y"),
    (RAND_AUGMENT, "* (2 * math.pi * u[..., 4]).cos()", "", "levels from 9 up", "law"),
    (LOADER, "self._labels[torch.from_numpy(shown_B)]", "self._labels[place.ids_B % self._num_images]",
     "a bad file keeps its label", "bad_file"),
]  # fmt: skip
