"""core/storage/files.py: what is read is bounded, and what is written is as private as its folder."""

import os
from pathlib import Path

import pytest

from core.errors import BadFile
from core.storage.cache_folder import cache_folder
from core.storage.files import check_writable, read_bytes, read_json, remove_leftovers, write_text

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and other permissions")


def test_pipes_devices_folders_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "good").write_bytes(b"x" * 2**20)
    refused = {
        "pipe": "is not a regular file",
        "link": "is not a regular file",
        "large": "the file is larger than 1 MiB, the maximum",
        ".": "cannot be read: Is a directory",
        "none": "cannot be read: No such file or directory",
    }
    for name, why in refused.items():
        with pytest.raises(BadFile, match=f"^{name}: {why}$"):
            read_bytes(tmp_path / name, 2**20, name=name)
    with pytest.raises(BadFile, match=r"pipe: is not a regular file"):
        read_json(tmp_path / "pipe")  # as the settings of diffusers' folders are
    (tmp_path / "large.json").write_bytes(b"[]" + b" " * 2**26)
    with pytest.raises(BadFile, match=r"large\.json: the file is larger than 64 MiB"):
        read_json(tmp_path / "large.json")
    for limit in (2**20, 2**60):  # of which no machine has so much memory
        assert len(read_bytes(tmp_path / "good", limit)) == 2**20


def test_a_file_in_a_private_folder_is_private(tmp_path):
    before = os.umask(0o022)
    try:
        modes = {}
        for folder in (0o700, 0o755, 0o711):
            tmp_path.chmod(folder)
            (tmp_path / "file").unlink(missing_ok=True)
            write_text(tmp_path / "file", "text")
            modes[folder] = (tmp_path / "file").stat().st_mode & 0o777
    finally:
        os.umask(before)
    assert modes == {0o700: 0o600, 0o755: 0o644, 0o711: 0o644}


def test_leftovers_are_deleted_by_the_whole_name_alone(tmp_path):
    mine, others = (
        ".face.png.0123abcd.tmp",
        [".face.png.0123abcd", ".my face.png.0123abcd.tmp", ".face.png.thesis01.tmp"],
    )
    for name in (mine, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, r"face\.png")
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_folder_whose_names_may_not_be_read_has_no_leftovers(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    leftover = tmp_path / ".face.png.01234567.tmp"
    leftover.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        remove_leftovers(tmp_path, r"face\.png")
    assert leftover.exists()
    remove_leftovers(tmp_path, r"face\.png")
    assert not leftover.exists()


@pytest.mark.parametrize("value", ["", "relative"])
def test_only_an_absolute_path_names_the_folder_of_caches(monkeypatch, tmp_path, value):
    monkeypatch.delenv("FACELORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == tmp_path / ".cache" / "facelora"


def test_an_error_without_a_system_message_is_reported_by_its_own_text(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError("the share is gone")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(BadFile, match="cannot be written there: the share is gone"):
        check_writable(tmp_path / "face.safetensors")


def test_a_text_with_invalid_unicode_is_written(tmp_path):
    write_text(tmp_path / "page.html", "b\udcffd")
    assert (tmp_path / "page.html").read_text() == "b?d"
