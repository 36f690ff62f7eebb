"""Files: whole or not at all, links and devices as they are, and one line where it fails."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from archs.errors import UserError
from archs.files import make_folder, read, read_text, write


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    path.chmod(0o640)
    write(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_new_file_has_the_mode_that_the_user_s_mask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a.txt", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_link_s_target_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name in ("there.txt", "new.txt"):
        link = tmp_path / f"link-{name}"
        link.symlink_to(Path("real") / name)
    (tmp_path / "real" / "there.txt").write_text("before")
    for name in ("there.txt", "new.txt"):
        write(tmp_path / f"link-{name}", "after")
        assert (tmp_path / f"link-{name}").is_symlink()
        assert (tmp_path / "real" / name).read_text() == "after"


def test_a_pipe_and_the_output_are_written_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    print("first")
    write(Path("/dev/stdout"), "second\n")
    print("third")
    assert capfd.readouterr().out == "first\nsecond\nthird\n"
    write(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a.txt' cannot be written: No space left.*; free some"):
        write(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_that_is_really_full_is_refused() -> None:
    with pytest.raises(UserError, match=r"'/dev/full' cannot be written: No space left"):
        write(Path("/dev/full"), "x")


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for call, reason in (
        (lambda: write(tmp_path / "none" / "a", "x"), "none/a' .*No such file"),
        (lambda: write(tmp_path / "file" / "a", "x"), "file/a' .*Not a directory"),
        (lambda: write(tmp_path, "x"), "Is a directory"),
        (lambda: write(tmp_path / "loop", "x"), "loop' .*symbolic links"),
        (lambda: write(tmp_path / ("a" * 300), "x"), "File name too long"),
        (lambda: make_folder(tmp_path / "file"), "file' cannot be made a folder: File exists"),
        (lambda: make_folder(tmp_path / "file" / "a"), "Not a directory"),
        (lambda: read(tmp_path / "none"), "none' cannot be read: No such file"),
        (lambda: read(tmp_path), "Is a directory"),
        (lambda: read(tmp_path / "unreadable"), "unreadable' cannot be read"),
        (lambda: read_text(tmp_path / "latin"), r"latin' is not UTF-8 text \(byte 3\)"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value) and "; " in str(caught.value)
