"""Checkpoints that are complete or invisible, on all ranks together.

    folder/latest              which one to resume from: a name, and the name's SHA-256
    folder/step-00001234/      one checkpoint; `.1`, `.2` follow the name if that step is saved again
    folder/.tmp-*  .trash-*    half-written and half-removed: never looked at, cleared by the next save

Save    every rank writes into .tmp-step-N -> fsync -> every rank's success -> manifest.json -> rename to
        step-N -> fsync of the folder -> `latest` replaced -> only then prune. Whatever kills it at whatever
        point leaves the last one or the new one, whole.
Find    rank 0 decides, all ranks follow. What does not match its checksums is named and passed over.
        Steps without a pointer are not a fresh start, and steps of which none is whole are an error.
Limits  one folder that all ranks see, one run at a time in it. A rename must be atomic there.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastmim.engine import durable
from fastmim.engine.durable import Damaged, explain_full_disk, fsync
from fastmim.engine.ranks import Ranks

log = logging.getLogger("fastmim")
T = TypeVar("T")
Facts = dict[str, Any]  # of JSON types
Key = tuple[int, int]  # step, attempt at that step
Write = Callable[[Path], None]

FORMAT = 1
MANIFEST = "manifest.json"
POINTER = "latest"
THREADS = 8  # for fsync and SHA-256, both of which release the GIL


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found whole, or used by this run."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its files are under `path`, as `write` wrote them."""

    step: int
    path: Path
    world: int  # ranks of the run that wrote it
    facts: Facts

    def check_facts(self, expected: Facts, *, allow: Collection[str] = ()) -> list[str]:
        """Compare with this run's facts; the differences that `allow` lets pass are returned as text.

        `allow` holds dotted names; `data` covers `data.path`. Raises CheckpointError with all the others, and
        for a name that is none.
        """
        theirs, ours = _flat(self.facts), _flat(expected)
        changed = {
            name: f"{name}: checkpoint has {had}, this run has {has}".replace('"', "")
            for name in sorted(theirs.keys() | ours.keys())
            if (had := theirs.get(name, "nothing")) != (has := ours.get(name, "nothing"))
        }
        passed = [name for name in changed if any(f"{name}.".startswith(f"{a}.") for a in allow)]
        if refused := [line for name, line in changed.items() if name not in passed]:
            lines = "\n  ".join(refused)
            raise CheckpointError(f"{self.path} was saved by a run that differs from this one:\n  {lines}")
        for name in allow:
            _require_fact(name, theirs.keys() | ours.keys())
        return [changed[name] for name in passed]


class Checkpoints:
    """The checkpoints of one run in `folder`, of which the newest `keep` stay. All calls are collective."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"want keep >= 1, got {keep}")
        self.folder, self.ranks, self.keep = Path(folder), ranks, keep

    def _collectives(self, what: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Run a function on every rank, or on rank 0 for all, failing together with CheckpointError."""
        both = self.ranks.all_succeed, self.ranks.from_main
        every, main = (partial(collective, what=what, raises=CheckpointError) for collective in both)
        return every, main

    # --- save ------------------------------------------------------------------------------------

    def save(self, step: int, write: Write, *, facts: Facts, need_bytes: int | None = None) -> Path:
        """Save what every rank's `write(folder)` writes; the path of the new checkpoint.

        `facts` are rank 0's. `need_bytes` is the size of the whole checkpoint over all ranks, if known:
        without that much room nothing is begun. Raises CheckpointError on all ranks if anything failed on
        any; the last good checkpoint is then what it was. `write` must not leave other ranks waiting in a
        collective when it raises, and calls no file manifest.json.
        """
        if step < 0:
            raise ValueError(f"want step >= 0, got {step}")
        tmp = self.folder / f".tmp-{_name((step, 0))}"
        every, main = self._collectives(f"saving step {step} to {self.folder}")
        try:
            need_bytes = main(lambda: self._make(tmp, facts, need_bytes))
            explained = partial(explain_full_disk, tmp, need_bytes)
            every(lambda: _require_shared(tmp))
            every(lambda: explained(lambda: write(tmp)))
            names = main(lambda: _written(tmp))
            share = every(lambda: explained(lambda: self._settle(tmp, names)))
            files = {
                name: entry for share in self.ranks.gather_objects(share) for name, entry in share.items()
            }
            body = {"format": FORMAT, "step": step, "world": self.ranks.world, "facts": facts, "files": files}
            return main(lambda: explained(lambda: self._publish(tmp, body)))
        except CheckpointError:
            if self.ranks.is_main:
                _give_room_back(tmp)
            raise

    def _make(self, tmp: Path, facts: Facts, need_bytes: int | None) -> int | None:
        """An empty `tmp`. Returns the bytes that will be needed, by the last checkpoint if not given."""
        durable.seal({"facts": facts})  # facts that JSON cannot hold are refused before anything is written
        self.folder.mkdir(parents=True, exist_ok=True)
        fsync(self.folder.parent)
        _remove([*self.folder.glob(".tmp-*"), *self.folder.glob(".trash-*")])
        free = shutil.disk_usage(self.folder).free
        if need_bytes is not None and free < need_bytes:
            raise CheckpointError(durable.full_disk(tmp, need_bytes, free))
        need_bytes = self._last_size() if need_bytes is None else need_bytes
        explain_full_disk(tmp, need_bytes, tmp.mkdir)
        return need_bytes

    def _last_size(self) -> int | None:
        for key in reversed(self._keys()):
            with suppress(CheckpointError):  # damaged: the one before it tells as well
                return sum(entry["size"] for entry in _open(self.folder / _name(key))[1].values())
        return None

    def _settle(self, tmp: Path, names: list[str]) -> dict[str, Facts]:
        """Make the files durable and describe this rank's share of them: size and SHA-256 by name."""
        share = names[self.ranks.rank :: self.ranks.world]
        with ThreadPoolExecutor(THREADS) as pool:
            synced = []
            if self.ranks.local_rank == 0:  # written pages are kept by the node, whichever rank wrote them
                paths = {tmp / name for name in names}
                folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(tmp)}
                synced = [pool.submit(fsync, path) for path in paths | folders]
            entries = pool.map(durable.describe, (tmp / name for name in share))
            for future in synced:
                future.result()
            return dict(zip(share, entries, strict=True))

    def _publish(self, tmp: Path, body: Facts) -> Path:
        durable.replace_text(tmp / MANIFEST, durable.seal(body))
        taken = [attempt for step, attempt in self._keys() if step == body["step"]]
        key = (body["step"], max(taken, default=-1) + 1)
        os.rename(tmp, self.folder / _name(key))
        fsync(self.folder)
        durable.replace_text(self.folder / POINTER, _pointer(_name(key)))
        self._prune(key)
        return self.folder / _name(key)

    def _prune(self, saved: Key) -> None:
        """Remove all but `saved` and the newest before it, down to `keep`.

        Steps from `saved` on are of a run that went back to before them: they go first, and other attempts
        at the same step in any case.
        """
        others = sorted((k for k in self._keys() if k != saved), key=lambda k: (k[0] < saved[0], k))
        same_step = sum(step == saved[0] for step, _ in others)
        trash = []
        for key in others[: max(len(others) + 1 - self.keep, same_step)]:
            trash.append(self.folder / f".trash-{_name(key)}")
            os.rename(self.folder / _name(key), trash[-1])
        fsync(self.folder)  # out of sight for good before the first file goes
        _remove(trash)

    # --- find ------------------------------------------------------------------------------------

    def find(self) -> Checkpoint | None:
        """The checkpoint to resume from; None if there never was one.

        That is the one `latest` names, or if it is damaged the newest whole one before it. Every damaged
        file is logged as a warning. Raises CheckpointError on all ranks if there are checkpoints but none
        is whole.
        """
        return self._agree(self._newest_whole)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`. Raises CheckpointError on all ranks if there is none that is whole."""
        return self._agree(lambda: self._whole_at(step))

    def _agree(self, look: Callable[[], T]) -> T:
        """What rank 0 finds, on all ranks, once each has seen the same in its own view of the folder."""
        every, main = self._collectives(f"looking for a checkpoint in {self.folder}")
        found = main(look)
        every(lambda: self._see(found))
        return found

    def _see(self, found: Any) -> None:
        if self._keys() if found is None else _open(self.folder / found.path.name)[0] != found:
            raise CheckpointError(f"rank 0 sees other checkpoints than this rank in {self.folder}")

    def _newest_whole(self) -> Checkpoint | None:
        keys, pointed = self._keys()[::-1], self._pointed()
        if pointed is not None:
            keys = [pointed, *(k for k in keys if k < pointed), *(k for k in keys if k > pointed)]
        if not keys and (self.folder / POINTER).exists():
            raise CheckpointError(f"{self.folder / POINTER} exists, but no checkpoint does")
        return self._first_whole(keys) if keys else None

    def _whole_at(self, step: int) -> Checkpoint:
        keys = self._keys()
        if step not in (steps := [s for s, _ in keys]):
            raise CheckpointError(f"no checkpoint of step {step}, only of {sorted(set(steps))}")
        return self._first_whole([k for k in reversed(keys) if k[0] == step])

    def _first_whole(self, keys: list[Key]) -> Checkpoint:
        damages = []
        for key in keys:
            try:
                return _verify(self.folder / _name(key))
            except CheckpointError as error:
                log.warning("damaged checkpoint passed over: %s", error)
                damages.append(str(error))
        raise CheckpointError("no checkpoint is whole: " + "; ".join(damages))

    def _keys(self) -> list[Key]:
        """(step, attempt) of every checkpoint in sight, damaged or not, oldest first."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        return sorted(key for key in map(_key, names) if key is not None)

    def _pointed(self) -> Key | None:
        path = self.folder / POINTER
        if not path.exists():
            return None
        text = path.read_bytes().decode("ascii", "replace")
        key = _key(text.partition(" ")[0])
        if key is None or text != _pointer(_name(key)):
            log.warning("damaged pointer passed over: %s holds %r", path, text[:80])
            return None
        return key


# --- one checkpoint's folder -------------------------------------------------------------------------


def _require_shared(tmp: Path) -> None:
    if not tmp.is_dir():
        raise CheckpointError(f"rank 0 made {tmp}, this rank does not see it: the folder must be shared")


def _written(tmp: Path) -> list[str]:
    names = durable.file_names(tmp)
    if not names or MANIFEST in names:
        raise CheckpointError(f"want files in {tmp}, none called {MANIFEST}, got {names}")
    return names


def _give_room_back(tmp: Path) -> None:
    for path in tmp.rglob("*"):
        with suppress(OSError):  # torch's writer, when it fails, may keep its file open, and so on the disk
            os.truncate(path, 0)
    shutil.rmtree(tmp, ignore_errors=True)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # nothing hangs on it, and the next save tries again
            log.warning("%s could not be removed: %s", folder, error)


def _name(key: Key) -> str:
    step, attempt = key
    return f"step-{step:08d}" + (f".{attempt}" if attempt else "")


def _key(name: str) -> Key | None:
    """(step, attempt) of a checkpoint's folder by its name; None for any other name."""
    match = re.fullmatch(r"step-(\d{8,})(?:\.([1-9]\d*))?", name)
    key = (0, 0) if match is None else (int(match[1]), int(match[2] or 0))
    return key if _name(key) == name else None


def _pointer(name: str) -> str:
    return f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n"


def _open(path: Path) -> tuple[Checkpoint, dict[str, Facts]]:
    """A checkpoint by its manifest, and the files that it lists; they are not looked at."""
    try:
        body = durable.unseal(path / MANIFEST)
    except (Damaged, OSError) as error:
        raise CheckpointError(str(error)) from error
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {body['format']}, this version reads {FORMAT}")
    if (key := _key(path.name)) is None or key[0] != body["step"]:
        raise CheckpointError(f"{path} holds step {body['step']}")
    return Checkpoint(body["step"], path, body["world"], body["facts"]), body["files"]


def _verify(path: Path) -> Checkpoint:
    """The checkpoint, every byte of it compared with its manifest."""
    found, files = _open(path)
    damages = []
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(durable.check, path / name, entry) for name, entry in files.items()]:
            try:
                done.result()
            except (Damaged, OSError) as error:
                damages.append(str(error))
    if damages:
        raise CheckpointError("; ".join(damages))
    return found


def _require_fact(name: str, facts: Collection[str]) -> None:
    if any(f"{fact}.".startswith(f"{name}.") for fact in facts):
        return
    near = difflib.get_close_matches(name, facts, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise CheckpointError(f"allow-changes: want names of {', '.join(sorted(facts))}, got {name!r}{hint}")


def _flat(facts: Facts, prefix: str = "") -> dict[str, str]:
    """The JSON of each nested fact by its dotted name."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        is_leaf = not isinstance(value, dict) or not value
        flat |= {f"{prefix}{name}": json.dumps(value)} if is_leaf else _flat(value, f"{prefix}{name}.")
    return flat
