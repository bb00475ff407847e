"""lora/files.py: a folder is there whole or not at all, and what was there before survives a failure."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from lora.files import written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, **files: str) -> None:
    with written_aside(folder) as aside:
        for name, text in files.items():
            (aside / name).write_text(text)


def test_a_new_folder_appears_with_its_files(tmp_path: Path) -> None:
    target = tmp_path / "not" / "there" / "yet"
    write(target, a="1", b="2")
    assert names(target) == ["a", "b"]
    assert (target / "a").read_text() == "1"
    assert names(target.parent) == ["yet"]


def test_the_name_appears_only_when_all_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with written_aside(target) as aside:
        (aside / "a").write_text("1")
        assert not target.exists()
        assert aside.parent == target.parent  # renaming must not cross file systems
        assert aside.name.startswith(".")
    assert names(tmp_path) == ["out"]


def test_an_older_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, a="1", b="2")
    write(target, b="3")
    assert names(target) == ["b"]
    assert (target / "b").read_text() == "3"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type, existed: bool) -> None:
    target = tmp_path / "out"
    if existed:
        write(target, a="1")

    def fail() -> None:
        with written_aside(target) as aside:
            (aside / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == (["out"] if existed else [])
    assert not existed or (target / "a").read_text() == "1"


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(NotADirectoryError, match="out"):
        write(target, a="1")
    assert target.read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_parent_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "out", a="1")
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=tmp_path.name):
        write(tmp_path / "out", a="1")
    tmp_path.chmod(0o700)
    assert names(tmp_path) == []


def test_the_new_name_is_on_the_disk_before_the_old_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", a="1")
    done: list[object] = []
    sync, remove = os.fsync, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), sync(file)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (done.append("removed"), remove(path)))
    write(tmp_path / "out", a="2")
    wanted = [path.stat().st_ino for path in (tmp_path / "out" / "a", tmp_path / "out", tmp_path)]
    assert done == [*wanted, "removed"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", a="1")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", a="2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "2"
    assert names(tmp_path) == ["link", "real"]


def test_a_path_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("out"), a="1")
    assert names(tmp_path / "out") == ["a"]


def test_the_folder_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    write(tmp_path / "out", a="1")
    (tmp_path / "usual").mkdir()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_files_have_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    """Whatever wrote them: safetensors makes its files readable for their owner alone."""
    (tmp_path / "plain").write_text("1")
    with written_aside(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
        (aside / "a").chmod(0o600)
    assert (tmp_path / "out" / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
