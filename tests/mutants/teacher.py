"""Planted faults of the teachers, in the engine and in files: each must turn a test red (`make mutants`)."""

TESTS = ["tests/engine/test_teacher.py", "tests/interop/test_mae.py"]
TEACHER = "fastmim/engine/teacher.py"
DOOR = "fastmim/engine/deepspeed.py"
SHARDS = "fastmim/engine/shards.py"
MAE = "fastmim/interop/mae.py"
ONE, TWO, RESUMED = "average and 1-Case", "(average or rounded) and 2-Case", "resumed_run and (1 or 2)"
FAULTS = [
    (TEACHER, "            self.master = torch.cat(self.weights).float()\n",
     "            self.master = torch.cat(self.weights)\n",
     "under bf16 the copy is bf16: the teacher stands still", ONE),
    (TEACHER, "        if self.kept_whole:\n            gather_again(self.kept_whole)\n", "",
     "what ZeRO 3 keeps whole stays behind its shards", "rounded and 1-Case"),
    (TEACHER, "            self.master.copy_(state[\"master\"])\n", "            pass\n",
     "a resumed teacher starts from rounded weights", "resumed_run and 1"),
    (TEACHER, "if not torch.equal(t, s)]", "if t.shape != s.shape]", "a teacher that is no copy passes",
     "none_are_refused"),
    (TEACHER, "        if any(names[p] in missing for p in teacher.parameters()):\n", "        if True:\n",
     "the teacher of a run's own file is thrown away", "own_file_whole"),
    (DOOR, "return mapping.lp_fragment_address.start, mapping.hp_fragment.detach()",
     "return 0, mapping.hp_fragment.detach()",
     "a share that begins within a parameter goes to its beginning", TWO),
    ("fastmim/engine/loop.py", "teacher.step(done / plan.total_steps)",
     "teacher.step(step / plan.total_steps)", "the momentum is that of the step before",
     "one_launch and 1-Case"),
    ("fastmim/engine/metrics.py", "            self.warned = True\n", "", "a warning with every interval",
     "diagnosis"),
    (MAE, "if n.startswith(ENCODER) and n != MASK_TOKEN}", "if n.startswith(ENCODER)}",
     "timm is handed a mask token", "own_file or within"),
]  # fmt: skip
