"""Planted faults of the masks: each must turn a test red (`make mutants`)."""

TESTS = ["tests/ops/test_split_patches.py", "tests/ops/test_block_masks.py"]  # what is run against each
SPLIT, BLOCKS = "kernels/fastmim_kernels/split_patches.py", "kernels/fastmim_kernels/block_masks.py"
KERNEL, LAW = "kernel_is_the_definition", "definition_is_the_law"
FAULTS = [
    (SPLIT, "cell = n // WIDTH // UNIT * (WIDTH // UNIT) + n % WIDTH // UNIT",
     "cell = n // WIDTH // UNIT * WIDTH + n % WIDTH // UNIT", "cells counted by patches across",
     "grouped_kernel"),
    (SPLIT, "patches_of_cell = patch_hw.transpose(1, 2).reshape(-1, unit * unit)",
     "patches_of_cell = patch_hw.reshape(-1, unit * unit)", "a cell is a run of patches in a row",
     "patches_go_with_their_cells"),
    (SPLIT, "if unit < 1 or min(h, w) < 1 or h % unit or w % unit:",
     "if unit < 1 or min(h, w) < 1 or h % unit:", "a width that the unit does not divide",
     "cells_and_masks_reject"),
    (SPLIT, "_mask_kernel[(len(mask),)](mask, seen, hidden, mask.stride(0), N, N - num_hidden, **tile(N))",
     "_mask_kernel[(len(mask),)](mask, seen, hidden, N, N, N - num_hidden, **tile(N))",
     "the stride of a mask's samples is taken for N", "split_mask_takes_any_strides"),
    (BLOCKS, "        taken = (h < H) & (w < W) & (count > 0) & (count << STEP_BITS <= m)",
     "        taken = (h <= H) & (w < W) & (count > 0) & (count << STEP_BITS <= m)",
     "a block as tall as the grid", KERNEL),
    (BLOCKS, "top_B = word_B4[:, 2] * (H - h_B + 1) >> 32", "top_B = word_B4[:, 2] * (H - h_B) >> 32",
     "no block ever touches the lower edge", LAW),
    (BLOCKS, "failed_B = torch.where(taken_B, 0, failed_B + 1)", "failed_B = failed_B + ~taken_B",
     "ten failures in all end a mask, not ten in a row", LAW),
    (BLOCKS, "lowest, unit = math.sqrt(low) * math.sqrt(root), 2.0", "lowest, unit = math.sqrt(low), 2.0",
     "levels begin at their lower end, not at their middle", "log_uniform"),
    (BLOCKS, "factor = tl.full([], FACTORS[0], tl.float64)", "factor = tl.full([], FACTORS[0], tl.float32)",
     "a factor of the sides in fp32", "where_a_bit_decides"),
    (BLOCKS, "    steps_B = (num_patches << STEP_BITS) * ((1 << 32) + 4 * word_B) // (10 << 32)",
     "    steps_B = (num_patches << STEP_BITS) * ((1 << 32) + 5 * word_B) // (10 << 32)",
     "iBOT's ratio up to 0.6", "ibots_targets"),
    (BLOCKS, "seeds, None if targets is None else targets.contiguous(), mask", "seeds, targets, mask",
     "the stride of the targets is forgotten", "own_target"),
]  # fmt: skip
