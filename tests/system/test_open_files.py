"""Open files: what they are, and that they close by themselves, and not before."""

import os
from types import SimpleNamespace

import pytest

from mmcache.system import files
from mmcache.system.files import Descriptor, close_read, file_status, open_known
from mmcache.system.syscalls import LINUX


def test_a_file_is_closed_with_its_last_reference(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    one = Descriptor(fd)
    other = [one]
    del one
    assert os.fstat(fd).st_size == 0
    other.clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_alignment_of_direct_reads_is_a_power_of_two(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    alignment = file_status(fd).alignment
    os.close(fd)
    assert alignment & (alignment - 1) == 0
    assert alignment <= 4096


@pytest.mark.parametrize("fast", [True, False])
def test_the_status_of_a_file_is_what_fstat_says(tmp_path, monkeypatch, fast):
    monkeypatch.setattr(files, "LINUX", fast and LINUX)
    path = tmp_path / "file"
    path.write_bytes(bytes(12_345))
    os.utime(path, ns=(1, 1_234_567_890_987_654_321))
    for mode, owner in ((0o644, os.geteuid()), (0o400, 1234 if os.geteuid() == 0 else os.geteuid())):
        path.chmod(mode)
        os.chown(path, owner, -1)
        fd = os.open(path, os.O_RDONLY) if os.geteuid() == 0 or mode & 0o400 else os.open(path, os.O_PATH)
        found, expected = file_status(fd), os.fstat(fd)
        os.close(fd)
        assert found[:-1] == (
            expected.st_mode, expected.st_size, expected.st_ino, expected.st_mtime_ns, expected.st_uid
        )  # fmt: skip
        assert found.modified == 1_234_567_890_987_654_321
        assert found.owner == owner


def test_a_file_is_opened_and_closed_with_the_lock_as_without(tmp_path):
    path = tmp_path / "ä file"
    path.write_bytes(b"here")
    fd = open_known(str(path), os.O_RDONLY)
    assert os.read(fd, 9) == b"here"
    assert not os.get_inheritable(fd)
    close_read(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(FileNotFoundError, match="none") as failed:
        open_known(str(tmp_path / "none"), os.O_RDONLY)
    assert failed.value.filename == str(tmp_path / "none")


def test_where_a_file_has_no_direct_reads_they_would_be_of_pages(tmp_path, monkeypatch):
    def statx(_fd, _path, _flags, _mask, told):
        # As of an encrypted file: the kernel knows the answer, and it is zero.
        told.raw = files._DIOALIGN.to_bytes(4, "little").ljust(256, b"\0")
        return 0

    monkeypatch.setattr(files, "LIBC", SimpleNamespace(statx=statx))
    (tmp_path / "file").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    assert file_status(fd).alignment == 4096
    os.close(fd)
