"""Files of a run with something changed in them, as disks, editors and strangers change it."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

from fastmim.train import main
from tests.engine.conftest import TINY

FILES = ("checkpoints/latest", "checkpoints/step-00000002/manifest.json", "config.json", "metrics.jsonl")
ODD = (None, True, -1, 10**30, 1e308, "", "x" * 1000, [], {}, [[]], "../..", "step-99999999", "((((", "\0")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one change of one of eight kinds."""
    kind, at = rng.randrange(8), rng.randrange(max(1, len(data)))
    match kind:
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"\xff"
        case 2:
            return data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:]
        case 3:
            return data[:at] + data[at + rng.randint(1, 40) :]
        case 4:
            return rng.randbytes(rng.randint(0, 200))
        case 5:
            return data + data
        case 6:
            return data[:at] + bytes(rng.randint(1, 5000)) + data[at + 1 :]
        case _:
            return with_odd_value(data, rng)


def with_odd_value(data: bytes, rng: random.Random) -> bytes:
    """JSON with another value somewhere."""
    try:
        content = json.loads(data)
    except ValueError:
        return b"[]"
    places = list(places_in(content))
    if not places:
        return json.dumps(rng.choice(ODD)).encode()
    holder, key = rng.choice(places)
    holder[key] = rng.choice(ODD)
    return json.dumps(content).encode()


def places_in(value):
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places_in(inner)


def resume_mutated(whole: Path, folder: Path, seed: int, capsys) -> str:
    """What a resume of a run with one file mutated comes to: "resumed", "refused", or what it should not."""
    rng = random.Random(seed)
    shutil.copytree(whole, folder)
    path = folder / rng.choice(FILES)
    path.write_bytes(mutated(path.read_bytes(), rng))
    arguments = ["--run-dir", str(folder), "--resume"]
    try:
        main(arguments)
        outcome = "resumed"
    except SystemExit as stopped:
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastmim: error")]
        outcome = "refused" if stopped.code in (1, 2) and said else f"{path.name}: code {stopped.code}"
    except Exception as error:
        outcome = f"{path.name}: {type(error).__name__}: {error}"
    capsys.readouterr()
    shutil.rmtree(folder)
    return outcome


def make_whole(images: Path, run_dir: Path) -> Path:
    """A run of two steps, as the command makes it, with what an editor would find in it."""
    flags = ["--data.path", str(images), "--run-dir", str(run_dir), "--steps", "2", "--save-every", "2"]
    main([*TINY, *flags])
    return run_dir


def outcomes(images: Path, folder: Path, count: int, capsys, first: int = 0) -> Counter:
    whole = make_whole(images, folder / "whole")
    seeds = range(first, first + count)
    return Counter(resume_mutated(whole, folder / "mutated", seed, capsys) for seed in seeds)
