"""Sets as people have them: everything that lies there is read, or counted in a line of what is left out."""

import errno
import io
import os
import socket
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from fastmim import cli
from fastmim.data import find_images
from fastmim.data.sources import folder, index
from fastmim.data.sources.left_out import LeftOut
from tests.conftest import SHARED_DATA

from .shards import LABELS, PICTURES, with_labels, write_folder, write_parquet, write_tar
from .test_source_kinds import nobody, table

CASES = SHARED_DATA.parent / "cases"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def left_out(path: Path) -> str:
    return str(find_images(path).left_out)


def refused(path: Path, message: str) -> str:
    """The one line that says why a path is no source."""
    with pytest.raises(ValueError, match=message) as error:
        find_images(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def case(name: str) -> Path:
    if not (CASES / name).exists():
        pytest.skip(f"needs {name} in shared/cases")
    return CASES / name


# --- folders -----------------------------------------------------------------------------------------


def test_extensions_in_every_case_and_what_has_none(tmp_path):
    names = ["A.JPG", "B.Jpeg", "c.jfif", "d.JFIF", "e.jpe", "f.JP2", "g.pnm", "h.mpo", "i.j2k"]
    others = ["n", "o.heic", "p.avif", "q.HEIC", "r.jpg~", "s.0001", "t.0002", "Thumbs.db", "jpg"]
    hidden = [".DS_Store", "._A.JPG", "._n", ".git/x.jpg"]
    systems = ["__MACOSX/x.jpg", "@eaDir/y.jpg", "lost+found/z.jpg"]
    images = find_images(write_folder(tmp_path, dict.fromkeys(names + others + hidden + systems, b"x")))
    assert images.names == names
    assert str(images.left_out) == (
        "9 files that are no images by name (.heic 2, no extension 2, others 2, .avif 1, .db 1, .jpg~ 1), "
        "4 hidden files or folders (._* 2, .DS_Store 1, .git 1), "
        "3 folders of an operating system (@eaDir 1, __MACOSX 1, lost+found 1)"
    )


def test_a_set_that_is_read_whole_says_nothing(tmp_path):
    assert not find_images(write_folder(tmp_path / "set")).left_out
    assert not find_images(write_tar(tmp_path / "x.tar", with_labels(LABELS))).left_out


def test_links_that_lead_nowhere_or_in_circles(tmp_path):
    root = write_folder(tmp_path / "set", {"cat/1.jpg": b"1", "dog/2.jpg": b"2", "dog/file": b""})
    write_folder(tmp_path / "far", {"3.jpg": b"3", "folder/4.jpg": b"4"})
    links = {
        "eel": "/nowhere/at/all",  # a class
        "cat/gone.jpg": "gone too.jpg",
        "cat/through.jpg": "../dog/file/x.jpg",
        "cat/self.jpg": "self.jpg",
        "cat/long.jpg": "x" * 255,
        "self": "self",
        "ping": "pong",
        "pong": "ping",
        "dog/up": "..",
        "dog/3.jpg": str(tmp_path / "far" / "3.jpg"),
        "fox": str(tmp_path / "far" / "folder"),
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    images = find_images(root)
    assert images.names == ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg", "fox/4.jpg"]
    assert [images.read(i) for i in range(4)] == [b"1", b"2", b"3", b"4"]
    assert images.classes == ("cat", "dog", "fox")
    assert str(images.left_out) == (
        "1 file that is no image by its name (no extension 1), "
        "1 link that leads nowhere and may be a class: eel, "
        "3 links that lead nowhere: cat/gone.jpg, cat/long.jpg, cat/through.jpg, "
        "5 links that lead in a circle: cat/self.jpg, dog/up, ping, ..."
    )


def test_many_folders_that_link_to_one_another(tmp_path):
    """Deeper than the 40 links that Linux follows in one path, if nobody looks where they lead."""
    for i in range(50):
        write_folder(tmp_path, {f"{i}/{i}.jpg": b"x"})
        (tmp_path / str(i) / "next").symlink_to(f"../{(i + 1) % 50}")
    images = find_images(tmp_path)
    assert {f"{i}/{i}.jpg" for i in range(50)} < set(images.names) and "circle" in str(images.left_out)


def test_what_may_not_be_looked_at_is_named_and_the_rest_read(monkeypatch):
    monkeypatch.setattr(folder, "WORTH_KEEPING", 1)
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        cache = Path(root, "cache")
        cache.mkdir(mode=0o777)
        cache.chmod(0o777)
        monkeypatch.setenv("FASTMIM_CACHE", str(cache))
        write_folder(Path(root, "set"), {"cat/1.jpg": b"", "dog/2.jpg": b"", "eel/deep/3.jpg": b""})
        Path(root, "set", "dog").chmod(0)
        Path(root, "set", "eel").chmod(0o444)  # a list of names that leads no further
        time.sleep(0.02)
        with nobody():
            for _ in range(2):  # the second time by the index
                images = find_images(Path(root, "set"))
                assert images.names == ["cat/1.jpg"] and list(images.classes) == ["cat"]
                assert str(images.left_out).startswith("2 entries that may not be looked at: dog, eel/deep")
            assert len(list(cache.glob("index/*"))) == 1
        if os.geteuid() == 0:  # who may
            assert len(find_images(Path(root, "set"))) == 3


def test_pipes_sockets_and_devices_are_counted_and_never_read(tmp_path):
    write_folder(tmp_path, {"a.jpg": b"A"})
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.jpg")[-100:] if len(str(tmp_path)) > 90 else str(tmp_path / "s.jpg"))
        images = find_images(tmp_path)
    assert images.names == ["a.jpg"]
    assert str(images.left_out) == ("4 pipes, sockets or devices: null.png, pipe.jpg, pipe.tar, ...")
    refused(tmp_path / "pipe.tar", "pipe.tar: it is a pipe, socket or device")
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", "pipe.txt: it is a pipe, socket or device")
    (tmp_path / "l.txt").write_text("a.jpg\npipe.jpg\nnull.png\n")
    images = find_images(tmp_path / "l.txt")
    for i in (1, 2):
        with pytest.raises(OSError, match="a pipe, socket or device, no file"):
            images.read(i)
    (tmp_path / "l.txt").write_text(f"{tmp_path}\n")
    images, held = find_images(tmp_path / "l.txt"), len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        images.read(0)
    assert len(os.listdir("/proc/self/fd")) == held


def test_labels_and_classes_that_are_not_there_are_said(tmp_path):
    files = {"cat/1.jpg": b"", "dog/notes.txt": b"", "eel/deep/er/x.mov": b"", "fox/1.jpg": b""}
    root = write_folder(tmp_path, files)
    assert find_images(root).classes == ("cat", "fox")
    assert "2 class folders without an image: dog, eel" in left_out(root)
    (root / "stray.jpg").write_bytes(b"")
    images = find_images(root)
    assert images.labels is None
    assert "2 class folders' labels, as images lie beside them: stray.jpg" in str(images.left_out)


def test_a_kept_index_says_it_too_and_notices_links_that_lead_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WORTH_KEEPING", 1)
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    root = write_folder(tmp_path / "set", {"cat/1.jpg": b"", "cat/x.txt": b""})
    (root / "cat" / "2.jpg").symlink_to(tmp_path / "later.jpg")
    time.sleep(0.02)
    said = left_out(root)
    assert said == "1 file that is no image by its name (.txt 1), 1 link that leads nowhere: cat/2.jpg"
    with monkeypatch.context() as no_walk:
        no_walk.setattr("fastmim.data.sources.source.walk", lambda path: pytest.fail("walked"))
        assert left_out(root) == said
    (tmp_path / "later.jpg").write_bytes(b"")  # in another folder: no stamp of the set changes
    assert find_images(root).names == ["cat/1.jpg", "cat/2.jpg"]
    write_tar(tmp_path / "x.tar", [("a.jpg", b""), ("a.json", b"{}")])
    time.sleep(0.02)
    assert left_out(tmp_path / "x.tar") == left_out(tmp_path / "x.tar") != ""


def test_every_command_says_it(tmp_path, capsys):
    root = write_folder(tmp_path / "set", PICTURES | {"cat/x.txt": b"", "dog/y\n\udcff.mp4": b""})
    (root / "z\n\udcff").symlink_to("nowhere")
    for command in (["index"], ["verify"], ["stats"], ["stats", "--json"], ["pack"]):
        with pytest.raises(SystemExit) as stopped:
            cli.data([*command, str(root), *([str(tmp_path / "packed")] if command == ["pack"] else [])])
        assert not stopped.value.code
        said = capsys.readouterr().out
        assert "2 files that are no images by name (.mp4 1, .txt 1), " in said, command
        assert r"1 link that leads nowhere and may be a class: z\n\udcff" in said.replace("\\\\", "\\")
        assert said.isprintable() or set(said) - {"\n"} == {c for c in said if c.isprintable()}
    assert not find_images(tmp_path / "packed").left_out  # a pack's own files are no surprise


def test_tallies_add_up_and_survive_json():
    one, other = LeftOut(), LeftOut()
    for i in range(30):
        one.add("nowhere", f"{i:02d}.jpg")
        one.add_file(f"{i}.x{chr(97 + i % 26)}")
        other.add("class", f"c{i:02d}")
    other.add("nowhere", "0.jpg")
    both = one + other
    assert str(LeftOut(both.as_json())) == str(both) == str(other + one)
    assert "31 links that lead nowhere: 0.jpg, 00.jpg, 01.jpg, ..." in str(both)
    assert "c19, ..." in str(both) and "c20" not in str(both)
    assert "(.xa 2, .xb 2, .xc 2, .xd 2, .xe 1, .xf 1, .xg 1, .xh 1, of other sorts 18)" in str(both)
    assert str(LeftOut()) == "" and not LeftOut() and "30" in str(one)  # adding changed neither


# --- lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("\ufeffa b.jpg\r\nc.jpg\r\n", ["a b.jpg", "c.jpg"]),
        ("# what\n\n  \n\t\na b.jpg\n#1.jpg\n#2.jpg\n", ["a b.jpg", "#1.jpg"]),
        ('"a b.jpg"\n\'c.jpg\'\n "c.jpg" \n', ["a b.jpg", "c.jpg", "c.jpg"]),
        ("'q'.jpg\n\"\n", ["'q'.jpg", '"']),
        ("'q'\n c.jpg \n blank.jpg \nnone.jpg ", ["'q'", "c.jpg", " blank.jpg ", "none.jpg"]),
        ("-x.jpg\n[1]{a}*?.jpg\n100%.jpg\n", ["-x.jpg", "[1]{a}*?.jpg", "100%.jpg"]),
        ("é.jpg\ne\u0301.jpg\n\udcff.jpg\n", ["é.jpg", "e\u0301.jpg", "\udcff.jpg"]),
        ("c.jpg\n" * 1000, ["c.jpg"] * 1000),
    ],
)
def test_lists_as_people_write_them(text, names, tmp_path):
    there = {name: name.encode("utf-8", "surrogateescape") for name in names if name != "none.jpg"}
    for path, data in there.items():
        (tmp_path / path).write_bytes(data)
    (tmp_path / "L.TXT").write_bytes(text.encode("utf-8", "surrogateescape"))
    images = find_images(tmp_path / "L.TXT")
    assert images.names == names
    assert [images.read(i) for i in range(len(names)) if names[i] in there] == [
        there[name] for name in names if name in there
    ]
    assert str(images.left_out) == ("2 comments" if "#" in text else "")


def test_labels_of_lists_as_people_write_them(tmp_path):
    write_folder(tmp_path, {"a.jpg": b"", "B.JPG": b""})
    (tmp_path / "l.tsv").write_bytes('\ufeff# path\tlabel\r\n"a.jpg"\t CAT\r\nB.JPG\tdog \r\n'.encode())
    images = find_images(tmp_path / "l.tsv")
    assert images.names == ["a.jpg", "B.JPG"] and images.classes == ("CAT", "dog")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.jpg\n".encode("utf-16"), "in UTF-8, got UTF-16 or UTF-32"),
        ("a.jpg\n".encode("utf-32"), "in UTF-8, got UTF-16 or UTF-32"),
        ("\ufeffa.jpg\n".encode("utf-16-be"), "in UTF-8, got UTF-16 or UTF-32"),
        (b"a.jpg 3\n", "is not there: .*a.jpg 3; .* a label follows a tab"),
        (b"a.jpg\t1\n\t2\n", "line 2: want a path, a tab and a label"),
        (b"# nothing\n", "no image in"),
        (POINTER, "l.txt is a Git LFS pointer, .*: run `git lfs pull`"),
    ],
)
def test_lists_that_are_refused(data, message, tmp_path):
    write_folder(tmp_path, {"a.jpg": b"", "l.txt": data})
    refused(tmp_path / "l.txt", message)


# --- tar ---------------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_members(path: Path, *members, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_are_no_plain_images(form, tmp_path):
    path = write_members(
        tmp_path / "x.tar",
        member("/abs/A.JPG", b"A"),
        member("/abs/A.CLS", b"\xef\xbb\xbfCAT\r\n"),
        member("./rel/../b.Jpeg", b"B"),
        member("rel/b.cls", b"dog"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="/abs/A.JPG"),
        member("hard.CLS", type=tarfile.LNKTYPE, linkname="rel/b.cls"),
        member("lost.jpg", type=tarfile.LNKTYPE, linkname="nobody.jpg"),
        member("soft.jpg", type=tarfile.SYMTYPE, linkname="abs/A.JPG"),
        member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("inner.tar", b"x" * 1024),
        member("c.json", b"{}"),
        member("c.cls", b"3"),
        member("d.cls", b"4"),
        member("__MACOSX/._A.JPG", b"x"),
        member("__MACOSX/A.JPG", b"x"),
        member("folder.jpg", type=tarfile.DIRTYPE),
        form=form,
    )
    images = find_images(path)
    assert images.names == ["abs/A.JPG", "rel/b.Jpeg", "hard.jpg"]
    assert [images.read(i) for i in range(3)] == [b"A", b"B", b"A"]
    assert images.classes == ("CAT", "dog") and images.labels.tolist() == [0, 1, 1]
    assert str(images.left_out) == (
        "2 files that are no images by name (.json 1, .tar 1), 1 hidden file or folder (._* 1), "
        "1 folder of an operating system (__MACOSX 1), 1 link that leads nowhere: lost.jpg, "
        "1 pipe, socket or device: pipe.jpg, 1 symbolic link in a tar: soft.jpg, "
        "2 labels (.cls) without an image beside them: c.cls, d.cls"
    )


def test_archives_behind_one_another_are_read(tmp_path):
    parts = []
    for i, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        parts.append(write_members(tmp_path / f"{i}.tar", member(f"{i}.jpg", bytes([65 + i])), form=form))
    path = tmp_path / "all" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(parts[0].read_bytes()[:1536] + parts[1].read_bytes() + parts[2].read_bytes())
    images = find_images(path)
    assert images.names == ["0.jpg", "1.jpg", "2.jpg"] and not images.left_out
    assert [images.read(i) for i in range(3)] == [b"A", b"B", b"C"]
    for rest in (b"x", b"text " * 500, parts[1].read_bytes()[512:]):
        path.write_bytes(parts[0].read_bytes() + rest)
        assert find_images(path).names == ["0.jpg"]
        assert left_out(path) == "1 tar with bytes behind its end: x.tar"
    path.write_bytes(parts[0].read_bytes() + parts[1].read_bytes()[:1024])
    refused(path, "cannot index .*x.tar as a tar")


def sparse(name: str) -> bytes:
    """A GNU sparse member of old, as `tar -S` writes it: 512 bytes, and a hole of as many."""
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"%011o\0" % 512  # bytes that are stored
    head[156:157] = b"S"
    for place, number in enumerate((0, 512, 1024, 0)):  # where, how many; the end
        head[386 + 12 * place : 398 + 12 * place] = b"%011o\0" % number
    head[482:483] = b"\0"
    head[483:495] = b"%011o\0" % 1024
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + b"\xff" * 512


def test_sparse_members_are_called_that(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [("a.jpg", b"A")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(sparse("s.jpg") + sparse("t.jpg") + whole)
    assert find_images(tmp_path / "x.tar").names == ["a.jpg"]
    assert left_out(tmp_path / "x.tar") == "2 sparse members: s.jpg, t.jpg"
    (tmp_path / "x.tar").write_bytes(sparse("s.jpg") + bytes(1024))
    refused(tmp_path / "x.tar", "no image in .*; left out: 1 sparse member: s.jpg")


def test_labels_that_some_images_lack_are_counted(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b""), ("c.jpg", b"")])
    images = find_images(tmp_path / "x.tar")
    assert images.labels is None
    assert str(images.left_out) == "1 label, as others have none: b.jpg of 2"


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_pointers_of_git_are_called_that(name, tmp_path):
    pytest.importorskip("pyarrow")
    refused(write_folder(tmp_path, {name: POINTER}) / name, "is a Git LFS pointer, .*: run `git lfs pull`")
    images = find_images(write_folder(tmp_path / "images", {"a.jpg": POINTER}))
    with pytest.raises(OSError, match="a Git LFS pointer") as error:
        images.read(0)
    assert error.value.errno == errno.ENODATA


# --- repositories of a hub, shards below -------------------------------------------------------------


def test_shards_below_are_found(tmp_path):
    root = tmp_path / "repo"
    write_tar(root / "data" / "s-0.tar", [("a.jpg", b"A")])
    write_tar(root / "data" / "more" / "s-1.TAR", [("b.jpg", b"B")])
    write_folder(
        root, {"README.md": b"", ".gitattributes": b"", ".git/x.tar": b"", "data/metadata.parquet": b""}
    )
    images = find_images(root)
    assert images.names == ["b.jpg", "a.jpg"] and [images.read(i) for i in range(2)] == [b"B", b"A"]
    assert str(images.left_out) == (
        "2 files that are no images by name (.md 1, .parquet 1), "
        "2 hidden files or folders (.git 1, .gitattributes 1)"
    )
    write_folder(root, {"assets/logo.png": b""})
    refused(root, r"holds 2 shards, and beside them assets/logo.png: name .*, as .*/repo/data/more/\*.TAR,")


def test_parquet_of_a_repository_split_by_split(tmp_path):
    pytest.importorskip("pyarrow")
    write_folder(tmp_path, {"README.md": b""})
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", {f"{name}.jpg": b"A"}, [0])
    images = find_images(tmp_path)
    assert len(images) == 2 and str(images.left_out) == "1 file that is no image by its name (.md 1)"
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"t.jpg": b"A"}, [1])
    said = refused(tmp_path, "holds the splits test, train: name one, as ")
    assert f"as {tmp_path}/data/train-*.parquet, or several in braces" in said
    refused(tmp_path / "data" / "*.parquet", "holds the splits test, train")
    assert len(find_images(tmp_path / "data" / "train-*.parquet")) == 2
    assert len(find_images(tmp_path / "data" / "{train,test}-*.parquet")) == 3
    assert len(find_images(tmp_path / "dat{a,a}" / "train-*.parquet")) == 2
    refused(tmp_path / "dat{a,a}" / "*-0000{0..0}*.parquet", "holds the splits test, train")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.tar", "val.tar"], "train, validation: name one, as .*/train.*.tar"),
        (["TRAIN/0.tar", "Test/0.tar"], r"test, train: name one, as .*/TRAIN/\*.tar"),
        (["set-train-00.tar", "set-validation-00.tar"], "train, validation"),
        (["unlabeled-00000-of-00001.tar", "train-00000-of-00001.tar"], "train, unlabeled"),
        (["00.tar", "eval_00.tar"], r"test and others \(00.tar\)"),
        (["contest-0.tar", "latest/0.tar", "trainer.tar"], None),
    ],
)
def test_splits_are_known_by_their_names(names, splits, tmp_path):
    for i, name in enumerate(names):
        write_tar(tmp_path / name, [(f"{i}.jpg", b"")])
    if splits:
        refused(tmp_path, f"holds the splits {splits}")
    else:
        assert len(find_images(tmp_path)) == len(names)


# --- names that look like patterns -------------------------------------------------------------------

STRANGE = ["br[1]{a}", "a*b", "what?", "{0..3}", "[!x]", "-x", "sp ace", "#1", "100%", "é", "e\u0301",
           "new\nline", "\udcff", "~", "$HOME", "'q'", 'd"q', "back\\slash", "{a,b}"]  # fmt: skip


def test_archives_that_were_unpacked_are_counted(tmp_path):
    write_folder(tmp_path, {"images/1.jpg": b"", "images.tar.gz": b"", "images/deep/x.TGZ": b""})
    assert left_out(tmp_path) == "2 files that are no images by name (.gz 1, .tgz 1)"
    (tmp_path / "images" / "1.jpg").unlink()
    refused(tmp_path, "want an uncompressed tar")


@pytest.mark.parametrize("name", STRANGE)
def test_a_name_that_exists_is_taken_as_it_is(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_tar(tmp_path / name / f"s-{i}.tar", [(f"{i}.jpg", bytes([65 + i]))])
    for ask in ("s-*.tar", "s-?.tar", "s-{0..1}.tar", "s-{0,1}.tar", "s-[01].tar", ".", "../*/s-*.tar"):
        for path in (Path(name) / ask, tmp_path / name / ask):
            images = find_images(path)
            assert [images.read(i) for i in range(len(images))] == [b"A", b"B"], path
    refused(Path(name) / "t-*.tar", "it does not exist")
    refused(Path(name) / "s-{0..2}.tar", "want every shard of .*, got none at ")
    write_folder(tmp_path / name / "images", {f"{name}/{name}.jpg": b"x"})
    assert find_images(Path(name) / "images").names == [f"{name}/{name}.jpg"]
    (tmp_path / f"{name}.txt").write_bytes(
        os.fsencode(f"{tmp_path}/{name}/images/{name}/{name}.jpg".replace("\n", ""))
    )
    if "\n" not in name:
        assert find_images(Path(f"{name}.txt")).read(0) == b"x"
    with pytest.raises(SystemExit) as stopped:
        cli.data(["index", f"./{name}/s-*.tar"])
    assert not stopped.value.code and "2 images" in capsys.readouterr().out


def test_shards_whose_names_are_patterns(tmp_path):
    write_tar(tmp_path / "a[0].tar", [("x.jpg", b"X")])
    write_tar(tmp_path / "a0.tar", [("y.jpg", b"Y")])
    write_tar(tmp_path / ".hidden.tar", [("z.jpg", b"Z")])
    assert find_images(tmp_path / "a[0].tar").names == ["x.jpg"]
    assert find_images(tmp_path / "a[[]0].tar").names == ["x.jpg"]
    assert find_images(tmp_path / "a[0-9].tar").names == ["y.jpg"]
    assert len(find_images(tmp_path / "*.tar")) == 2
    write_tar(tmp_path / "in" / "a[0]" / "z.tar", [("z.jpg", b"Z")])
    assert find_images(tmp_path / "i*" / "a[0]" / "*.tar").names == ["z.jpg"]  # behind a part that is one
    (tmp_path / "folder.tar").mkdir()
    refused(tmp_path / "*.tar", "folder.tar: it is a folder")
    (tmp_path / "gone.tar").symlink_to("nowhere.tar")
    refused(tmp_path / "gone.tar", "it is a link that leads nowhere")


# --- Parquet -----------------------------------------------------------------------------------------


def test_columns_encoded_as_dictionaries_and_in_upper_case(tmp_path):
    pa = pytest.importorskip("pyarrow")
    columns = {
        "Thumb": [b"a", b"b", b"a"],
        "Image": pa.array([b"A", b"B", None], pa.binary()).dictionary_encode(),
        "LABEL": pa.array(["Wolf", "fox", "fox"]).dictionary_encode(),
    }
    images = find_images(table(tmp_path / "t.parquet", columns, row_group_size=2))
    assert images.classes == ("Wolf", "fox") and images.labels.tolist() == [0, 1, 1]
    assert [images.read(i) for i in range(2)] == [b"A", b"B"] and not images.left_out
    with pytest.raises(OSError, match="row 2 has no bytes"):
        images.read(2)


def test_labels_of_other_types_are_counted(tmp_path):
    pa = pytest.importorskip("pyarrow")
    images = find_images(table(tmp_path / "t.parquet", {"image": [b"A"], "labels": pa.array([[1, 2]])}))
    assert images.labels is None
    assert str(images.left_out).startswith("1 column that is no label by its type (labels list<")
    images = find_images(table(tmp_path / "u.parquet", {"image": [b"A"] * 3, "label": [1, None, -1]}))
    assert str(images.left_out) == "1 label, as others have none: u.parquet/000001 of 2"


def test_files_that_number_other_classes_are_not_mixed(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", {"a.jpg": b""}, [0])
    monkeypatch.setattr("tests.data.shards.CLASSES", ("dog", "cat", "eel"))
    write_parquet(tmp_path / "b.parquet", {"b.jpg": b""}, [0])
    refused(tmp_path, "want the same classes in all files, got 3 in a.parquet and 3, or others, in b.parquet")


# --- the shared cases --------------------------------------------------------------------------------


def test_the_cases_of_files_not_seen():
    images = find_images(case("files-not-seen/mixed_ext"))
    assert len(images) == 42 and {Path(name).suffix for name in images.names} == {
        ".jpg",
        ".JPG",
        ".Jpeg",
        ".jfif",
    }
    assert "(.avif 30, .gif 30, .heic 30, no extension 30, .db 1, .ini 1)" in str(images.left_out)
    assert "(.DS_Store 1, ._* 1), 2 folders of an operating system" in str(images.left_out)
    assert len(find_images(case("files-not-seen/only_jfif"))) == 10


def test_the_cases_of_shards():
    refused(case("called-damaged/sparse.tar"), "left out: 4 sparse members: 0.jpg, ")
    pytest.importorskip("pyarrow")
    refused(case("hub-repository/hubrepo"), r"splits test, train: name one, as .*/data/train-\*.parquet")
    assert len(find_images(case("hub-repository/hubrepo/data") / "train-*.parquet")) == 12
