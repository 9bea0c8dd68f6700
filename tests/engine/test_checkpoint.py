"""Checkpoints against what kills and damages them: real files, real SIGKILL, a real full disk."""

import logging
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from fastmim.engine.checkpoint import Checkpoint, CheckpointError, Checkpoints
from fastmim.engine.ranks import Ranks
from tests.engine.checkpoint_scenarios import (
    FACTS,
    find,
    hidden,
    holds,
    mount_tmpfs,
    outcome,
    save,
    shards,
    watch,
)
from tests.engine.forked import Child, scenarios

ONE = Ranks.single()


@pytest.fixture(scope="module")
def answers() -> dict:
    return scenarios(Path(__file__).with_name("checkpoint_scenarios.py"))


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("fastmim"), "warning", lambda text, *args: texts.append(text % args)
    )
    return texts


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


# --- kept and found ----------------------------------------------------------------------------------


def test_what_is_saved_is_found_with_its_facts(tmp_path):
    path = save(tmp_path / "new" / "folder", 12, ONE, kilobytes=3000)
    found = Checkpoints(tmp_path / "new" / "folder", ONE).find()
    assert found == Checkpoint(12, path, 1, FACTS)
    assert path.name == "step-00000012"
    assert holds(found)
    assert sorted(os.listdir(path)) == ["manifest.json", "shard-0.pt", "state"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 123_456_789, 123_456_790):
        save(tmp_path, step, ONE, keep=2)
        assert find(tmp_path, ONE) == (step, True)
    assert steps(tmp_path) == ["step-123456789", "step-123456790"]
    save(tmp_path, 123_456_791, ONE, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-123456791"]


def test_a_run_that_went_back_replaces_what_came_after(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, ONE, keep=3)
    assert Checkpoints(tmp_path, ONE).at(200).step == 200
    save(tmp_path, 200, ONE, keep=3)  # as if resumed at 100
    assert steps(tmp_path) == ["step-00000100", "step-00000200.1", "step-00000300"]
    assert find(tmp_path, ONE) == (200, True)
    save(tmp_path, 250, ONE, keep=3)
    assert steps(tmp_path) == ["step-00000100", "step-00000200.1", "step-00000250"]
    assert holds(Checkpoints(tmp_path, ONE).at(200))


def test_one_step_can_be_asked_for(tmp_path, warnings):
    for step in (1, 2, 3):
        save(tmp_path, step, ONE, keep=3)
    checkpoints = Checkpoints(tmp_path, ONE)
    assert holds(checkpoints.at(2))
    with pytest.raises(CheckpointError, match=re.escape("no checkpoint of step 7, only of [1, 2, 3]")):
        checkpoints.at(7)
    (tmp_path / "step-00000002" / "shard-0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002/shard-0.pt is missing"):
        checkpoints.at(2)


def test_nothing_at_all_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "none", ONE).find() is None
    (tmp_path / ".tmp-step-00000001").mkdir()  # killed in its first save
    (tmp_path / "step-by-step.txt").write_text("notes")
    assert Checkpoints(tmp_path, ONE).find() is None


def test_what_a_save_refuses(tmp_path):
    checkpoints = Checkpoints(tmp_path, ONE)
    with pytest.raises(ValueError, match="want keep >= 1, got 0"):
        Checkpoints(tmp_path, ONE, keep=0)
    with pytest.raises(ValueError, match="want step >= 0, got -1"):
        checkpoints.save(-1, shards(1), facts={})
    with pytest.raises(CheckpointError, match="want files in"):
        checkpoints.save(1, lambda folder: None, facts={})
    with pytest.raises(CheckpointError, match="none called manifest.json"):
        checkpoints.save(1, lambda folder: (folder / "manifest.json").touch(), facts={})
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_is_named_and_does_not_stop_a_save(tmp_path, monkeypatch, warnings):
    for step in (1, 2):
        save(tmp_path, step, ONE)
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError("busy")))
        save(tmp_path, 3, ONE)
    assert warnings == [f"{tmp_path}/.trash-step-00000001 could not be removed: busy"]
    assert hidden(tmp_path) == [".trash-step-00000001"]
    save(tmp_path, 4, ONE)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003", "step-00000004"]


# --- facts ---------------------------------------------------------------------------------------------


def test_changed_facts_are_refused_with_each_difference(tmp_path):
    facts = {"seed": 0, "data": {"images": 100, "path": "a"}, "betas": (0.9, 0.95), "clip": None, "old": 1}
    Checkpoints(tmp_path, ONE).save(1, shards(1), facts=facts)
    found = Checkpoints(tmp_path, ONE).find()
    assert found.check_facts(facts) == []
    now = {"seed": 0, "data": {"images": 99, "path": "b"}, "betas": (0.9, 0.95), "new": None}
    with pytest.raises(CheckpointError) as caught:
        found.check_facts(now)
    assert str(caught.value).splitlines() == [
        f"{found.path} was saved by a run that differs from this one:",
        "  clip: checkpoint has null, this run has nothing",
        "  data.images: checkpoint has 100, this run has 99",
        "  data.path: checkpoint has a, this run has b",
        "  new: checkpoint has nothing, this run has null",
        "  old: checkpoint has 1, this run has nothing",
    ]
    with pytest.raises(CheckpointError) as caught:
        found.check_facts(now, allow=["data", "clip", "new", "ol"])
    assert str(caught.value).splitlines()[1:] == ["  old: checkpoint has 1, this run has nothing"]
    allowed = found.check_facts(facts | {"data": {"images": 99, "path": "a"}}, allow=["data.images"])
    assert allowed == ["data.images: checkpoint has 100, this run has 99"]


# --- kill -9 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "step"), [((), 1), ((1, 2), 3), ((1, 2), 2)])
def test_killed_at_every_fsync_rename_removal_and_open(tmp_path, before, step):
    """A first save, one that prunes, and one of a step that is there."""
    start = tmp_path / "start"
    start.mkdir()
    for s in before:
        save(start, s, ONE)

    def saving(folder: Path, kill_at: int | None = None) -> list:
        shutil.copytree(start, folder)

        def work():
            events = watch(folder, kill_at)
            save(folder, step, ONE)
            return events

        return Child(work).result()

    events = saving(tmp_path / "all")
    assert {event[0] for event in events} >= {"open", "fsync", "rename", "os.mkdir"}
    assert len(events) >= 12
    found_steps = []
    for kill_at in range(1, len(events) + 1):
        folder = tmp_path / f"{kill_at}"
        assert saving(folder, kill_at) is None, "it was not killed"
        found = Checkpoints(folder, ONE).find()
        assert found is None or holds(found)
        found_steps.append(found.step if found else 0)
        save(folder, 4, ONE)
        assert find(folder, ONE) == (4, True)
        assert hidden(folder) == []
        shutil.rmtree(folder)
    newest = max(before, default=0)
    assert set(found_steps) == {newest, step}  # the last one or the new one
    assert found_steps == sorted(found_steps)  # and never the last one again


def test_twenty_kills_at_random_moments_of_a_loop_of_saves(tmp_path):
    folder, log, moments, in_a_save = tmp_path / "checkpoints", tmp_path / "log", random.Random(0), 0
    log.write_text("saved 0\n")

    def work():
        found = Checkpoints(folder, ONE).find()
        step = found.step if found else 0
        while True:
            step += 1
            with log.open("a") as file:
                file.write(f"saving {step}\n")
            save(folder, step, ONE, kilobytes=3000)
            with log.open("a") as file:
                file.write(f"saved {step}\n")

    def saved() -> int:
        return int(re.findall(r"saved (\d+)\n", log.read_text())[-1])

    for _ in range(20):
        last, child = saved(), Child(work)
        while saved() == last:  # it has come to life
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        child.kill()
        assert child.result() is None
        in_a_save += "saving" in log.read_text().splitlines()[-1]
        found = Checkpoints(folder, ONE).find()
        assert holds(found)
        assert found.step in (saved(), saved() + 1)
    assert in_a_save >= 5


def test_everything_is_on_the_disk_before_it_is_made_visible(tmp_path):
    """What no kill can show: the order of fsync and rename that a power cut asks for."""
    for step in (1, 2):
        save(tmp_path, step, ONE)

    def work():
        events = watch(tmp_path)
        save(tmp_path, 3, ONE)
        return events

    events = Child(work).result()
    tmp, final = tmp_path / ".tmp-step-00000003", tmp_path / "step-00000003"
    shown = events.index(("rename", str(tmp), str(final)))
    synced = [event[1] for event in events[:shown] if event[0] == "fsync"]
    for name in ("shard-0.pt", "state/random-0.pt", "state", ""):
        assert str(tmp / name) in synced
    moves = [i for i, event in enumerate(events) if event[0] == "rename"]
    manifest, pointer = (
        next(i for i in moves if events[i][2] == str(path))
        for path in (tmp / "manifest.json", tmp_path / "latest")
    )
    pruned = next(i for i in moves if events[i][1] == str(tmp_path / "step-00000001"))
    assert manifest < shown < pointer < pruned
    for i in (manifest, pointer):  # temporary file to disk, renamed, its folder to disk
        assert events[i - 1] == ("fsync", events[i][1])
        assert events[i + 1] == ("fsync", str(Path(events[i][2]).parent))
    assert events[shown + 1] == events[pruned + 1] == ("fsync", str(tmp_path))
    removals = [i for i, event in enumerate(events) if event[0] in ("os.remove", "os.rmdir")]
    assert min(removals) > pruned + 1
    assert all("/.trash-step-00000001" in events[i][1] for i in removals)


# --- damage ------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "a middle bit": lambda path: flip(path, path.stat().st_size * 4 + 3),
    "last bit": lambda path: flip(path, path.stat().st_size * 8 - 1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@pytest.mark.parametrize("name", ["shard-0.pt", "state/random-0.pt", "manifest.json"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, warnings, name, damage):
    for step in (1, 2):
        save(tmp_path, step, ONE, kilobytes=1024)
    path = tmp_path / "step-00000002" / name
    damage(path)
    assert find(tmp_path, ONE) == (1, True)
    assert len(warnings) == 1
    assert str(path) in warnings[0]


def test_any_bit_of_the_manifest_counts(tmp_path, warnings):
    save(tmp_path, 1, ONE, keep=1)
    path = tmp_path / "step-00000001" / "manifest.json"
    content = path.read_bytes()
    unseen = []
    for byte in range(len(content)):
        flip(path, byte * 8 + byte % 8)
        if isinstance(outcome(Checkpoints(tmp_path, ONE).find), Checkpoint):
            unseen.append(byte)
        path.write_bytes(content)
    assert unseen == []
    assert Checkpoints(tmp_path, ONE).find().step == 1


def test_any_bit_of_the_pointer_counts(tmp_path, warnings):
    for step in (1, 2, 3):  # one flipped bit makes 3 a 2 or a 1
        save(tmp_path, step, ONE, keep=3)
    pointer = tmp_path / "latest"
    content = pointer.read_bytes()
    name = content.index(b" ") * 8
    bits = [*range(name), *range(name, len(content) * 8, 7)]
    for bit in bits:
        flip(pointer, bit)
        assert Checkpoints(tmp_path, ONE).find().step == 3
        assert str(pointer) in warnings[-1]
        pointer.write_bytes(content)
    assert Checkpoints(tmp_path, ONE).find().step == 3
    assert len(warnings) == len(bits)


@pytest.mark.parametrize("content", [None, b"", b"garbage\n", b"\xff\xfe", b"step-00000002\n", b"../x y\n"])
def test_without_a_pointer_the_newest_whole_one_is_taken(tmp_path, warnings, content):
    for step in (1, 2):
        save(tmp_path, step, ONE)
    if content is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(content)
    assert find(tmp_path, ONE) == (2, True)
    assert len(warnings) == (content is not None)
    (tmp_path / "step-00000002" / "shard-0.pt").unlink()
    assert find(tmp_path, ONE) == (1, True)


def test_the_pointer_decides_and_what_it_lacks_is_sought_before_it(tmp_path, warnings):
    for step in (1, 2, 3):
        save(tmp_path, step, ONE, keep=4)
    pointer = (tmp_path / "latest").read_bytes()
    save(tmp_path, 4, ONE, keep=4)
    (tmp_path / "latest").write_bytes(pointer)  # killed between the rename and the pointer
    assert find(tmp_path, ONE) == (3, True)
    shutil.rmtree(tmp_path / "step-00000003")
    assert find(tmp_path, ONE) == (2, True)
    assert "step-00000003/manifest.json is missing" in warnings[-1]
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-0000000{step}")
    assert find(tmp_path, ONE) == (4, True)


def test_never_a_fresh_start_where_there_was_a_checkpoint(tmp_path, warnings):
    for step in (1, 2):
        save(tmp_path, step, ONE)
    checkpoints = Checkpoints(tmp_path, ONE)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}" / "shard-0.pt", 4000)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*2/shard-0.pt.*SHA.*1/shard-0.pt"):
        checkpoints.find()
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-0000000{step}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole: .*2/manifest.json is missing"):
        checkpoints.find()
    (tmp_path / "latest").write_text("")
    with pytest.raises(CheckpointError, match="latest exists, but no checkpoint does"):
        checkpoints.find()
    shutil.rmtree(tmp_path)
    tmp_path.touch()
    with pytest.raises(CheckpointError, match="NotADirectoryError"):
        checkpoints.find()


def test_what_is_not_a_checkpoint_of_its_name_is_passed_over(tmp_path, warnings):
    save(tmp_path, 1, ONE)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000005")
    (tmp_path / "step-00000006").write_text("a file")
    (tmp_path / "step-0000000007").mkdir()
    (tmp_path / "latest").unlink()
    assert find(tmp_path, ONE) == (1, True)
    assert [re.search(r"step-\d+", text)[0] for text in warnings] == ["step-00000006", "step-00000005"]


# --- full disk ----------------------------------------------------------------------------------------------


def zipped(path: Path) -> None:
    torch.save(torch.zeros(3 << 20, dtype=torch.uint8), path / "big")


def legacy(path: Path) -> None:
    torch.save(torch.zeros(3 << 20, dtype=torch.uint8), path / "big", _use_new_zipfile_serialization=False)


def plain(path: Path) -> None:
    (path / "big").write_bytes(bytes(3 << 20))


def one_gap(path: Path) -> None:
    """Full to the last byte, and the manifest is what has no room."""
    free = shutil.disk_usage(path).free
    (path / "big").write_bytes(bytes(free))


@pytest.mark.parametrize("write", [zipped, legacy, plain, one_gap])
def test_a_full_disk_names_path_and_bytes_and_the_last_one_stays(tmp_path, write):
    def work():
        if not mount_tmpfs(tmp_path, "5m"):
            return None
        checkpoints, calls = Checkpoints(tmp_path, ONE), []
        save(tmp_path, 1, ONE, kilobytes=2048)
        free = shutil.disk_usage(tmp_path).free
        early = outcome(lambda: checkpoints.save(2, calls.append, facts={}, need_bytes=free + 1))
        late = outcome(lambda: checkpoints.save(2, write, facts={}, need_bytes=free))
        estimated = outcome(lambda: checkpoints.save(2, write, facts={}))
        left = find(tmp_path, ONE), hidden(tmp_path), shutil.disk_usage(tmp_path).free
        size = sum(path.stat().st_size for path in (tmp_path / "step-00000001").glob("**/*.pt"))
        save(tmp_path, 3, ONE)
        return early, late, estimated, left, free, size, calls, find(tmp_path, ONE)

    answer = Child(work).result()
    if answer is None:
        pytest.skip("the kernel gives this user no file system of his own to fill")
    early, late, estimated, left, free, size, calls, after = answer
    for (word, text), need in ((early, free + 1), (late, free), (estimated, size)):
        assert word == "refused"
        assert re.search(
            rf"disk full: {tmp_path}/.tmp-step-00000002 needs {need:,} bytes, [\d,]+ are free", text
        )
    assert f"{free:,} are free" in early[1]
    assert calls == []
    assert left == ((1, True), [], free)
    assert after == (3, True)


# --- two ranks ----------------------------------------------------------------------------------------------


def test_two_ranks_save_and_find_one_checkpoint(answers):
    assert answers["both_save"] == [("step-00000007", (7, True), FACTS)] * 2


def test_a_rank_that_fails_fails_them_all_and_the_last_one_stays(answers):
    first, second = answers["one_fails"]
    assert first == second
    (full, *after_full), (bug, *after_bug), (well, *after_all) = first
    assert after_full == after_bug == [(1, True), []]
    assert "failed on rank 1 of 2: OSError: [Errno 28] disk full" in full[1]
    assert bug[1].endswith("failed on rank 1 of 2: RuntimeError: a bug")
    assert [well, *after_all] == ["step-00000004", (4, True), []]


def test_a_slow_rank_and_a_kill_leave_the_one_before(answers):
    assert answers["slow_rank_then_kill"] == [[None, None], [".tmp-step-00000002"], [(1, True)] * 2]


def test_rank_0_killed_at_every_point_ends_rank_1_and_leaves_a_whole_one(answers):
    count, *kills = answers["one_killed_at_every_point"]
    assert len(kills) == count >= 20
    found_steps = []
    for (killed, other), seconds, (first, second) in kills:
        assert killed is None
        assert other[0] == "raised"
        assert seconds < 10
        assert first == second
        found, after, files = first
        assert found in [(2, True), (3, True)]
        assert (after, files) == ((4, True), 3)  # the pointer and two checkpoints
        found_steps.append(found[0])
    assert found_steps == sorted(found_steps)
    assert set(found_steps) == {2, 3}


def test_two_ranks_pass_over_the_same_damage(answers):
    first, second = answers["damaged"]
    assert first == second
    assert first[0] == (1, True)
    assert re.search(r"no checkpoint is whole: .*2/shard-1.pt has .*1/shard-1.pt has", first[1][1])


def test_a_folder_that_is_not_shared_is_refused(answers):
    for fresh, none_on_rank_0, other_on_rank_1 in answers["folder_not_shared"]:
        assert "this rank does not see it: the folder must be shared" in fresh[1]
        assert "failed on rank 1 of 2: CheckpointError: rank 0 sees other checkpoints" in none_on_rank_0[1]
        assert "failed on rank 1 of 2: CheckpointError" in other_on_rank_1[1]


def test_facts_that_cannot_be_kept_are_refused_before_anything_is_written(answers):
    for (word, text), calls in answers["facts_that_are_not_json"]:
        assert word == "refused"
        assert "rank 0 of 2: TypeError" in text
        assert calls == 0


def test_a_disk_that_fills_under_two_ranks(answers):
    if answers["full_disk"] is None:
        pytest.skip("the kernel gives this user no file system of his own to fill")
    for made, (word, text), found, left in answers["full_disk"]:
        assert (made, found, left) == ("step-00000001", (1, True), [])
        assert word == "refused"
        assert re.search(r"disk full: .*/.tmp-step-00000002 needs 4,[\d,]+ bytes, [\d,]+ are free", text)
