"""Planted faults of how runs start and go on: flags, paths, run directories. Each must turn a test red."""

TESTS = ["tests/test_arguments.py", "tests/engine/test_run_dir.py", "tests/engine/test_surroundings.py"]
ARGUMENTS = "fastmim/arguments.py"
FLAGS = "fastmim/flags.py"
PRETRAIN = "fastmim/engine/pretrain.py"
RUN_DIR = "fastmim/engine/run_dir.py"
PICTURES = "fastmim/engine/pictures.py"
FAULTS = [
    (
        ARGUMENTS,
        '        over |= {"steps", "epochs"}\n',
        "        pass\n",
        "--epochs given after a run of --steps is dropped",
        "replace_one_another or epochs_after_steps",
    ),
    (
        ARGUMENTS,
        "    return without(saved, over | ONE_START) + given\n",
        "    return without(saved, ONE_START) + given\n",
        "a saved command line grows by each resume",
        "takes_the_place",
    ),
    (
        ARGUMENTS,
        '        saved = ["--recipe", had.recipe, *saved]  # ',
        "        pass  # ",
        "data given anew makes another recipe of it",
        "no_other_recipe",
    ),
    (
        ARGUMENTS,
        '    check_start(value_of(saved, "init-from"), value_of(given, "init-from"))\n',
        "",
        "--init-from is ignored on --resume",
        "keeps_what",
    ),
    (
        ARGUMENTS,
        "        check_kept(had, field, ",
        "        (had, field, ",
        "another method or recipe",
        "keeps",
    ),
    (
        ARGUMENTS,
        "    given = with_absolute_paths(given)\n",
        "    given = list(given)\n",
        "relative paths are saved",
        "any_folder or another_folder",
    ),
    (
        FLAGS,
        "{name.removeprefix('no-')}",
        "{name}",
        "--no-x and --x are two flags",
        "takes_the_place or twice",
    ),
    (
        PRETRAIN,
        "fingerprint(p.facts),\n",
        "None,\n",
        "a longer run that was killed early is refused",
        "killed_before",
    ),
    (
        PRETRAIN,
        '    if (total := facts["total_steps"]) < found.step:\n',
        '    if (total := facts["total_steps"]) < 0:\n',
        "a run of fewer steps than there are ends at once",
        "epochs_after_steps",
    ),
    (
        PRETRAIN,
        "    run = with_absolute_paths(run)\n",
        "",
        "another folder in mid-run loses the images",
        "running_loop",
    ),
    (
        RUN_DIR,
        '    durable.replace_text(run_dir / CONFIG, text + "\\n")\n',
        "    (run_dir / CONFIG).write_text(text)\n",
        "config.json is written in place",
        "old_or_the_new",
    ),
    (
        RUN_DIR,
        "                run_dir.rmdir()\n",
        "                pass\n",
        "an empty directory is left",
        "fails_at",
    ),
    (
        RUN_DIR,
        "        file.write(PROBE)\n",
        "        pass\n",
        "a full disk is found at the first save",
        "full",
    ),
    (
        RUN_DIR,
        "            path.mkdir()\n",
        "            path.mkdir(exist_ok=True)\n",
        "two runs of one second share a directory",
        "one_second",
    ),
    (
        PICTURES,
        'os.environ.pop("MPLBACKEND", None)',
        'os.environ.get("MPLBACKEND")',
        "a notebook's backend",
        "notebook",
    ),
    (
        PICTURES,
        '            matplotlib.rcParams["backend"] = named\n',
        "            pass\n",
        "figures stay hidden",
        "stays",
    ),
]
