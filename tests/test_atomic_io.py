"""Files, folders and sets that appear in one step: what was there stays until then, whatever happens to a writer."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from diffmem import atomic_io
from diffmem.atomic_io import (
    atomic_file,
    atomic_folder,
    atomic_replacement,
    atomic_set,
    atomic_write,
    check_output_file,
    check_output_folder,
    output_lock,
)
from diffmem.errors import InputError, OutputInUseError


def old_folder(path):
    path.mkdir()
    (path / "old").touch()
    return path


def contents(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


@pytest.fixture(params=["exchange", "no exchange"])
def system(request, monkeypatch):
    """With and without a system that exchanges folders."""
    if request.param == "no exchange":
        monkeypatch.setattr(atomic_io, "_exchange", lambda one, other: False)
    return request.param


def test_takes_the_place_of_what_was_there(tmp_path, system):
    with atomic_replacement(old_folder(tmp_path / "index")) as partial:
        (partial / "new").touch()
        assert "index/old" in contents(tmp_path)
    assert contents(tmp_path) == ["index", "index/new"]


def test_parents_are_made(tmp_path):
    with atomic_replacement(tmp_path / "a" / "b") as partial:
        (partial / "new").touch()
    assert contents(tmp_path) == ["a", "a/b", "a/b/new"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), atomic_replacement(tmp_path / "file" / "b"):
        pass


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("writer", [atomic_replacement, atomic_set])
def test_an_interrupted_writer_leaves_what_was_there(tmp_path, failure, writer):
    with pytest.raises(failure), writer(old_folder(tmp_path / "index")) as partial:  # noqa: PT012
        (partial / "new").touch()
        raise failure
    assert contents(tmp_path) == ["index", "index/old"]


def test_what_was_moved_aside_comes_back_where_the_rename_fails(tmp_path, monkeypatch):
    rename = os.replace

    def no_room(source, target):
        if Path(source).name != "old" and ".partial" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(atomic_io, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", no_room)
    with (
        pytest.raises(InputError, match="No space left"),
        atomic_replacement(old_folder(tmp_path / "index")) as partial,
    ):
        (partial / "new").touch()
    assert contents(tmp_path) == ["index", "index/old"]


def test_a_new_folder_refuses_what_is_there(tmp_path):
    with pytest.raises(InputError, match="exists already"), atomic_folder(old_folder(tmp_path / "set")):
        pass
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as partial:
        (partial / "new").touch()
    assert contents(tmp_path) == ["empty", "empty/new", "set", "set/old"]


def test_names_of_all_kinds(tmp_path):
    names = ["a" * 255, "ü" * 127, os.fsdecode(b"\xff\xfe"), "new\nline", "[*?]", ".hidden"]
    for name in names:
        atomic_write(tmp_path / name, "first")
        atomic_write(tmp_path / name, "second")
        with output_lock(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    atomic_write(tmp_path / "text", "a name \udcff")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "a name \\udcff"


def write_set(folder, text):
    with atomic_set(folder) as stage:
        for name in ("page", "table"):
            (stage / name).write_text(text)


def test_sets_leave_other_files_alone(tmp_path, system, monkeypatch):
    for folder in ("new", "empty", "again", "mixed", "here"):
        if folder != "new":
            (tmp_path / folder).mkdir()
    write_set(tmp_path / "again", "first")
    (tmp_path / "again").chmod(0o750)
    (tmp_path / "mixed" / "notes").mkdir()
    (tmp_path / "mixed" / "page").write_text("first")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path / "new", tmp_path / "empty", tmp_path / "again", tmp_path / "mixed", "."):
        write_set(folder, "second")
        assert {Path(folder, name).read_text() for name in ("page", "table")} == {"second"}
    assert Path("page").exists()  # whoever stands in the folder still does
    assert (tmp_path / "mixed" / "notes").is_dir()
    assert (tmp_path / "again").stat().st_mode & 0o777 == 0o750
    assert not [name for name in contents(tmp_path) if Path(name).name.startswith(".")]


def test_output_goes_where_links_point(tmp_path):
    for name in ("elsewhere", "place", "links"):
        (tmp_path / name).mkdir()
    links = tmp_path / "links"
    for name, target in {
        "file": "../elsewhere/file", "dangling": "../elsewhere/made", "chain": "file", "set": "../place",
        "new set": "../elsewhere/set", "index": str(tmp_path / "elsewhere" / "index"), "nowhere": "/nowhere/at/all",
    }.items():  # fmt: skip
        (links / name).symlink_to(target)
    old_folder(tmp_path / "elsewhere" / "index")
    (tmp_path / "elsewhere" / "file").write_text("old")
    atomic_write(links / "dangling", "new")
    atomic_write(links / "chain", "new")
    for name in ("set", "new set"):
        write_set(links / name, "new")
    with atomic_replacement(links / "index") as partial:
        (partial / "new").touch()
    with pytest.raises(InputError, match="cannot be written"):
        atomic_write(links / "nowhere", "new")
    assert all(link.is_symlink() for link in links.iterdir())
    assert contents(tmp_path / "elsewhere") == [
        "file", "index", "index/new", "made", "set", "set/page", "set/table",
    ]  # fmt: skip
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"
    assert contents(tmp_path / "place") == ["page", "table"]
    (links / "loop").symlink_to("loop")
    for write in (lambda path: atomic_write(path, "new"), check_output_folder, check_output_file):
        with pytest.raises(InputError, match="loop"):
            write(links / "loop")


def test_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="choose another name"):
            atomic_write(path, "new")
        with pytest.raises(InputError, match="choose another name"):
            check_output_file(path)


# Writers of sets, each killed at the n-th of its calls that change names, n = 1, 2, …, until one comes to its end.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    from diffmem import atomic_io

    def counted(call, left):
        def wrapper(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return wrapper

    for number in range(1, 40):
        folder = Path(sys.argv[1], str(number), "report")
        for text in ("first", "second"):
            child = os.fork()
            if child == 0:
                if text == "second":
                    (folder / "notes").touch() if sys.argv[2] == "mixed" else None
                    left = [number]
                    for name in ("rename", "replace", "rmdir", "unlink", "mkdir"):
                        setattr(os, name, counted(getattr(os, name), left))
                    atomic_io._exchange = counted(atomic_io._exchange, left)
                with atomic_io.atomic_set(folder) as stage:
                    for name in ("page", "table"):
                        (stage / name).write_text(text)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
        if status == 0:
            break
    sys.exit(status)
"""


@pytest.mark.parametrize("others", ["alone", "mixed"])
def test_killed_anywhere_a_set_is_the_old_one_or_the_new_one(tmp_path, others):
    """At every call that changes names, not at random ones; afterwards the next writer finds and leaves order."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), others], check=True)
    seen = []
    for folder in sorted(tmp_path.glob("*/report"), key=lambda path: int(path.parent.name)):
        seen.append({(folder / name).read_text() for name in ("page", "table")})
        with atomic_set(folder):  # the next writer, which has only begun
            settled = {(folder / name).read_text() for name in ("page", "table")}
        assert len(settled) == 1
        if others == "alone":
            assert seen[-1] == settled  # readers see one set without the help of a next writer
        write_set(folder, "third")
        notes = ["report/notes"] if others == "mixed" else []
        assert contents(folder.parent) == ["report", *notes, "report/page", "report/table"]
    assert len(seen) > 8
    assert seen[0] == {"first"}
    assert seen[-1] == {"second"}


def test_next_writer_removes_what_dead_ones_left_and_nothing_of_living_ones(tmp_path):
    program = """
        import sys
        from diffmem.atomic_io import atomic_file
        with atomic_file(sys.argv[1]) as partial:
            partial.write_text("half")
            print("ready", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "file")]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    (tmp_path / ".file.0123abcd.partial").write_text("left by an earlier version")
    (tmp_path / ".file.mine.partial").write_text("a file of the user's")
    assert len(contents(tmp_path)) == 6
    atomic_write(tmp_path / "file", "new")
    assert len(contents(tmp_path)) == 4  # the file, the user's, the living writer's folder with its file
    writers[1].communicate()
    assert writers[1].returncode == 0
    assert sorted(os.listdir(tmp_path)) == [".file.mine.partial", "file"]
    assert (tmp_path / "file").read_text() == "half"
    for writer in writers:
        writer.stdin.close()
        writer.stdout.close()


def test_locks(tmp_path):
    program = """
        import sys
        from diffmem.atomic_io import output_lock
        with output_lock(sys.argv[1], shared=sys.argv[2] == "shared"):
            print("ready", flush=True)
            sys.stdin.read()
    """
    out = tmp_path / "report"
    (tmp_path / "link").symlink_to("report")

    def other(kind):
        command = [sys.executable, "-c", textwrap.dedent(program), str(out), kind]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    with other("exclusive") as process:
        for path in (out, tmp_path / "link"):
            with (
                pytest.raises(OutputInUseError, match=f"process {process.pid} on .* is writing there"),
                output_lock(path),
            ):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with output_lock(out), output_lock(tmp_path / "link"):  # a dead process holds nothing; the holder may ask again
        failures = []

        def ask():
            try:
                with output_lock(out):
                    pass
            except OutputInUseError as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert len(failures) == 1
    with other("shared") as process, output_lock(out, shared=True):
        process.communicate()
        with pytest.raises(OutputInUseError):
            atomic_io._locked_file(out, out, False, 0.0)
    assert contents(tmp_path) == ["link"]


def test_lock_without_locks_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_io, "_lock", lambda handle, shared=False: None)
    with output_lock(tmp_path / "out"):
        atomic_write(tmp_path / "out", "new")
    assert contents(tmp_path) == ["out"]
    (tmp_path / ".out.0123abcd.partial").touch()
    atomic_write(tmp_path / "out", "new")
    assert len(contents(tmp_path)) == 2  # its writer may live


def test_durable_files_are_synchronized_before_and_folders_after_the_rename(tmp_path, monkeypatch):
    calls = []
    synchronize, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), synchronize(handle))
    )
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("rename"), rename(source, target)))
    with atomic_file(tmp_path / "file") as partial:
        partial.touch()
    assert calls == [str(partial), "rename", str(tmp_path)]
    calls.clear()
    with atomic_file(tmp_path / "file", durable=False) as partial:
        partial.touch()
    assert calls == ["rename"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_are_those_of_what_was_there_or_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for round_ in range(2):
            atomic_write(tmp_path / "file", "text")
            with atomic_set(tmp_path / "set") as stage:
                (stage / "page").write_text("text")
            with atomic_replacement(tmp_path / "folder") as folder:
                (folder / "page").write_text("text")
            modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "set", "set/page", "folder")]
            assert modes == ([0o640, 0o750, 0o640, 0o750] if round_ == 0 else [0o604, 0o705, 0o664, 0o775])
            for name, mode in (("file", 0o604), ("set", 0o705), ("set/page", 0o664), ("folder", 0o775)):
                (tmp_path / name).chmod(mode)
    finally:
        os.umask(before)
