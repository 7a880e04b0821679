"""Files and folders that appear when they are whole: what was there stays until then."""

import os

import pytest

from diffmem.atomic_io import atomic_folder, atomic_replacement
from diffmem.errors import InputError


def old_folder(path):
    path.mkdir()
    (path / "old").touch()
    return path


def contents(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_takes_the_place_of_what_was_there(tmp_path):
    with atomic_replacement(old_folder(tmp_path / "index")) as partial:
        (partial / "new").touch()
        assert "index/old" in contents(tmp_path)
    assert contents(tmp_path) == ["index", "index/new"]


def test_a_link_is_replaced_and_what_it_points_to_left_alone(tmp_path):
    old_folder(tmp_path / "elsewhere")
    (tmp_path / "index").symlink_to(tmp_path / "elsewhere")
    with atomic_replacement(tmp_path / "index") as partial:
        (partial / "new").touch()
    assert contents(tmp_path) == ["elsewhere", "elsewhere/old", "index", "index/new"]


def test_parents_are_made(tmp_path):
    with atomic_replacement(tmp_path / "a" / "b") as partial:
        (partial / "new").touch()
    assert contents(tmp_path) == ["a", "a/b", "a/b/new"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), atomic_replacement(tmp_path / "file" / "b"):
        pass


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_what_was_there(tmp_path, failure):
    with pytest.raises(failure), atomic_replacement(old_folder(tmp_path / "index")) as partial:  # noqa: PT012
        (partial / "new").touch()
        raise failure
    assert contents(tmp_path) == ["index", "index/old"]


def test_what_was_moved_aside_comes_back_where_the_rename_fails(tmp_path, monkeypatch):
    rename = os.replace

    def no_room(source, target):
        if str(source).endswith(".partial"):
            raise OSError(28, "No space left on device")
        rename(source, target)

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
