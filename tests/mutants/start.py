"""Planted faults of how runs start and go on: flags, paths, run directories. Each must turn a test red."""

TESTS = ["tests/test_arguments.py", "tests/engine/test_run_dir.py", "tests/engine/test_surroundings.py"]
ARGUMENTS = "fastmim/arguments.py"
FLAGS = "fastmim/flags.py"
PRETRAIN = "fastmim/engine/pretrain.py"
RUN_DIR = "fastmim/engine/run_dir.py"
PICTURES = "fastmim/engine/pictures.py"
FAULTS = [
    (ARGUMENTS, '        over |= {"steps", "epochs"}\n', "        pass\n",
     "--epochs given after a run of --steps is dropped", "replace_one_another or epochs_after_steps"),
    (ARGUMENTS, '        saved = ["--recipe", had.recipe, *saved]  # ', "        pass  # ",
     "data given anew makes another recipe of it", "no_other_recipe"),
    (ARGUMENTS, "    given = with_absolute_paths(given)\n", "    given = list(given)\n",
     "relative paths are saved", "any_folder or another_folder"),
    (PRETRAIN, '    if (total := facts["total_steps"]) < found.step:\n',
     '    if (total := facts["total_steps"]) < 0:\n', "a run of fewer steps than there are ends at once",
     "epochs_after_steps"),
    (RUN_DIR, '    durable.replace_text(run_dir / CONFIG, text + "\\n")\n',
     "    (run_dir / CONFIG).write_text(text)\n", "config.json is written in place", "old_or_the_new"),
    (RUN_DIR, "            path.mkdir()\n", "            path.mkdir(exist_ok=True)\n",
     "two runs of one second share a directory", "one_second"),
]  # fmt: skip
