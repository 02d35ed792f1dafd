import contextlib
import errno
import json
import math
import os
import random
import struct
import sys
import time
import tracemalloc

import pytest
import safetensors.torch
import torch

from core.errors import BadFile
from core.storage import files
from core.storage.header import Header
from core.storage.safetensors_file import (
    DTYPES,
    ComputedTensors,
    SafetensorsFile,
    copy_with_metadata,
    save_safetensors,
    write_safetensors,
)


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple = (2,), offsets: tuple = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, generator=generator)
    result = {f"of {code}": values.to(dtype) for code, dtype in DTYPES.items() if code != "BOOL"}
    return result | {"flag": values > 0, "scalar": torch.tensor(3.0).bfloat16(), "empty": torch.zeros(0, 3)}


def test_the_safetensors_library_writes_the_same_bytes(tensors, tmp_path):
    metadata = {'quotes " and \\': "line\nbreak, tab\t, é, \x01, \x7f"}
    if tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 6):  # which has fewer types
        tensors = {name: tensor for name, tensor in tensors.items() if name in ("of F32", "of BF16", "flag", "empty")}
    save_safetensors(tmp_path / "a", tensors, metadata)
    assert (tmp_path / "a").read_bytes() == safetensors.torch.save(tensors, metadata)


def test_every_dtype_is_read_back_bit_by_bit(tensors, tmp_path):
    save_safetensors(tmp_path / "a", tensors, {"key": "value"})
    file = SafetensorsFile.open(tmp_path / "a")
    assert file.metadata == {"key": "value"} and set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert file[name].dtype == tensor.dtype and file.shapes[name] == tuple(tensor.shape)
        assert torch.equal(file[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("code", [code for code in DTYPES if code != "C64"])
def test_single_numbers_are_read_as_torch_reads_them(code, tmp_path):
    data = bytes(range(256)) if DTYPES[code].itemsize == 1 and code != "BOOL" else random.Random(0).randbytes(800)
    values = (
        torch.tensor([0, 1], dtype=torch.uint8)
        if code == "BOOL"
        else torch.frombuffer(bytearray(data), dtype=torch.uint8)
    )
    tensors = {str(number): value for number, value in enumerate(values.view(DTYPES[code]).unbind())}
    save_safetensors(tmp_path / "a", {name: tensor.reshape(()) for name, tensor in tensors.items()})
    found = Header.open(tmp_path / "a").numbers(tensors)
    assert found.keys() == tensors.keys() != set()
    for name, tensor in tensors.items():
        expected = float(tensor.float() if tensor.is_floating_point() and tensor.itemsize < 8 else tensor)
        assert found[name] == expected or (math.isnan(found[name]) and math.isnan(expected))


def test_unaligned_tensors_are_read(tmp_path):
    values = torch.tensor([1.5, -2.0])
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    (tmp_path / "a").write_bytes(raw(header, b"\x07" + values.numpy().tobytes()))
    assert torch.equal(SafetensorsFile.open(tmp_path / "a")["b"], values)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_read(length, tmp_path):
    # 0x80 begins a pickle, 0x80 0x02 one of torch.save, "PK" (0x50 0x4B) a zip.
    header = b"{" + b" " * (length - 2) + b"}"
    (tmp_path / "a").write_bytes(raw(header))
    assert len(SafetensorsFile.open(tmp_path / "a")) == 0


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    save_safetensors(tmp_path / "a", {"x": torch.ones(4)})
    SafetensorsFile.open(tmp_path / "a")["x"].zero_()
    assert torch.equal(SafetensorsFile.open(tmp_path / "a")["x"], torch.ones(4))


def test_whether_a_tensor_is_there_is_known_without_reading_it(tmp_path):
    save_safetensors(tmp_path / "a", {"x": torch.ones(4)})
    opened, made = SafetensorsFile.open(tmp_path / "a"), []
    computed = ComputedTensors([lambda: made.append(1) or {"x": torch.ones(4)}])
    (tmp_path / "a").unlink()
    assert "x" in opened and "y" not in opened
    assert "x" in computed and made == [1]


def test_a_large_file_is_opened_without_reading_its_tensors(tmp_path):
    size = 1 << 33
    header = raw({"x": entry("U8", (size,), (0, size))})
    with (tmp_path / "a").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)  # sparse: takes no room on the disk
    tracemalloc.start()
    opened = SafetensorsFile.open(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened.shapes == {"x": (size,)} and peak < 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the rule is Linux's")
def test_a_file_larger_than_memory_is_read_where_it_is_asked(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    header = raw({"large": entry("U8", (size,), (0, size)), "last": entry("F32", (32,), (size, size + 128))})
    with (tmp_path / "a").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)  # sparse: takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(torch.ones(32).numpy().tobytes())
    assert torch.equal(SafetensorsFile.open(tmp_path / "a")["last"], torch.ones(32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 and more of a zip", "Python pickle"),
        (b"\x80\x02}q\x00X\x05\x00", "Python pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "this is a GGUF file"),
        (b"\x10\x00\x00", "truncated: the file has 3 bytes"),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "this is a web page, not a safetensors file"),
        (b"\xef\xbb\xbf\r\n<html>", "this is a web page, not a safetensors file"),
        (b'{"error": "no access"}', "this is text, not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer"),
        (raw(b"{}")[:9], "truncated: the header needs 10 bytes"),
        (struct.pack("<Q", 2**24 + 1) + b"{}" + bytes(2**24), "claims a header of 16777217 bytes"),
        (raw(b"[1, 2]"), "does not start with '{'"),
        (raw(b'{"a": }'), "damaged header: Expecting value"),
        (raw(b'{"\xff": 1}'), "not UTF-8"),
        (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
        (raw(b'{"a": {}, "a": {}}'), "'a' appears twice"),
        (raw(b'{"__metadata__": {"a": "\\ud800"}}'), "'\\ud800' is not valid Unicode"),
        (raw(b'{"\\udfff": {}}'), "'\\udfff' is not valid Unicode"),
        (raw({"__metadata__": {"a": 1}}), "must map strings to strings"),
        (raw({"__metadata__": ["a"]}), "must map strings to strings"),
        (raw({"a": 5}), "exactly dtype, shape and data_offsets"),
        (raw({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype, shape and data_offsets"),
        (raw(b'{"a": {"dtype": "F32", "shape": [0], "shape": [1]}}'), "exactly dtype, shape and data_offsets"),
        (raw(b'{"__metadata__": {"a": "1", "a": "2"}}'), "'a' appears twice"),
        (raw({"a": entry("F33")}, bytes(8)), "has dtype 'F33'; known: F64, F32"),
        (raw({"a": entry(shape=(-1, -2))}, bytes(8)), "not a list of at most 16 sizes"),
        (raw({"a": entry(shape=(True, 2))}, bytes(8)), "not a list of at most 16 sizes"),
        (raw({"a": entry(shape=(1.0, 2))}, bytes(8)), "not a list of at most 16 sizes"),
        (raw({"a": entry(shape=(1,) * 17)}, bytes(8)), "not a list of at most 16 sizes"),
        (raw({"a": entry(shape=(3,))}, bytes(8)), "does not take 8 bytes"),
        (raw({"a": entry(shape=(2**40, 2**40, 0))}, bytes(8)), "does not take 8 bytes"),
        (raw({"a": entry(offsets=(0, 8, 9))}, bytes(8)), "not two byte positions"),
        (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "is at bytes 8 to 0"),
        (raw({"a": entry(offsets=(0, 8))}, bytes(7)), "only 7 bytes of tensors"),
        (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b' overlaps another"),
        (raw({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, bytes(8)), "'b' overlaps another"),
        (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "'b' leaves a gap"),
        (raw({"a": entry()}, bytes(9)), "1 bytes after the last tensor"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_with_the_reason(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        SafetensorsFile.open(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 2_000_000 + b"[]]}",
        b'{"a":[' + b"{}," * 2_000_000 + b"{}]}",
        b'{"a":{"dtype":"F32","shape":[' + b"999," * 2_000_000 + b"1]}}",
        b'{"__metadata__":{' + b'"a":"",' * 80_000 + b'"b":""}}',
    ],
    ids=["lists", "objects", "numbers", "texts"],
)
def test_a_header_of_millions_of_small_values_is_refused_before_it_is_read(header, tmp_path):
    (tmp_path / "a").write_bytes(raw(header))
    tracemalloc.start()
    with pytest.raises(BadFile, match="commas and brackets"):
        SafetensorsFile.open(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(header) + 1_000_000


@pytest.mark.clock
def test_a_name_that_appears_twice_among_many_is_found_at_once(tmp_path):
    header = b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b',"x":1,"x":2}'
    (tmp_path / "a").write_bytes(raw(header))
    start = time.monotonic()
    with pytest.raises(BadFile, match="'x' appears twice"):
        SafetensorsFile.open(tmp_path / "a")
    assert time.monotonic() - start < 10  # comparing all with all took minutes


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(BadFile, match="No such file"):
        SafetensorsFile.open(tmp_path / "none")
    with pytest.raises(BadFile, match="cannot be read"):
        SafetensorsFile.open(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path):
    save_safetensors(tmp_path / "a", {"x": torch.ones(4)})
    file = SafetensorsFile.open(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(BadFile, match="has changed"):
        file["x"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not truncate a file that is in use")
def test_a_small_file_that_is_truncated_in_use_is_whole_in_memory(tmp_path):
    """Reading a mapped file that has become shorter ends the process, without a message."""
    save_safetensors(tmp_path / "a", {name: torch.ones(5000) for name in "xy"})
    file = SafetensorsFile.open(tmp_path / "a")
    first = file["x"]
    os.truncate(tmp_path / "a", 100)
    assert torch.equal(first, file["y"]) and first.sum() == 5000


@pytest.mark.skipif(os.name == "nt", reason="Windows does not truncate a file that is in use")
def test_a_large_file_that_is_truncated_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_READ", 0)
    save_safetensors(tmp_path / "a", {name: torch.ones(5000) for name in "xy"})
    file = SafetensorsFile.open(tmp_path / "a")
    assert file["x"][0] == 1
    os.truncate(tmp_path / "a", 100)
    with pytest.raises(BadFile, match="a: another program has truncated the file since it was opened"):
        file["y"]


def damaged(good: bytes, chance: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(len(data))
        action = chance.randrange(4)
        if action == 0:
            data[position] = chance.randrange(256)
        elif action == 1:
            data[position] = chance.choice(b'0123456789-"[]{}:,.eE')
        elif action == 2:
            del data[position : position + chance.randint(1, 30)]
        else:
            data[position:position] = data[: chance.randint(1, 30)]
    return bytes(data)


@pytest.fixture
def good_file(tmp_path) -> bytes:
    save_safetensors(tmp_path / "good", {"a": torch.randn(4, 4), "b": torch.tensor(2.0).half()}, {"k": "v"})
    return (tmp_path / "good").read_bytes()


def test_thousands_of_damaged_files_are_refused_or_stay_within_their_own_bytes(good_file, tmp_path):
    chance = random.Random(0)
    refused = 0
    for number in range(3000):
        data = damaged(good_file, chance)
        path = tmp_path / f"{number}"  # new files are written faster than old ones are truncated
        path.write_bytes(data)
        try:
            file = SafetensorsFile.open(path)
            assert sum(file[name].numel() * file[name].element_size() for name in file) <= len(data)
        except BadFile:
            refused += 1
    assert refused > 1000


def test_damaged_files_cause_no_large_allocation(good_file, tmp_path):
    chance = random.Random(1)
    tracemalloc.start()
    for _ in range(200):
        (tmp_path / "a").write_bytes(damaged(good_file, chance))
        with contextlib.suppress(BadFile):
            SafetensorsFile.open(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save_safetensors(path, {"x": torch.ones(4)})
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadFile, match="cannot be written: No space left on device"):
        save_safetensors(path, {"x": torch.zeros(4)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_cancelled_write_leaves_no_file(tmp_path):
    def cancel(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a", {"x": (torch.float32, (4,))}, cancel)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(BadFile, match="cannot be written: No such file"):
        save_safetensors(tmp_path / "none" / "a", {"x": torch.ones(4)})


def test_metadata_with_other_values_than_texts_are_refused_and_the_old_file_stays(tmp_path):
    file = tmp_path / "a.safetensors"
    save_safetensors(file, {"x": torch.ones(4)}, {"epoch": "2"})
    with pytest.raises(BadFile, match=r"metadata: 'epoch' = 3: a safetensors file holds only texts"):
        save_safetensors(file, {"x": torch.ones(4)}, {"epoch": 3})  # pyright: ignore
    assert SafetensorsFile.open(file).metadata == {"epoch": "2"} and list(tmp_path.iterdir()) == [file]


def test_a_type_without_a_name_in_the_format_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"'x' has the unsupported dtype torch\.complex128"):
        save_safetensors(tmp_path / "a", {"x": torch.ones(4, dtype=torch.complex128)})


def test_other_metadata_leave_the_bytes_of_the_tensors_as_they_were(tmp_path):
    # Not in the order that we write: what was published keeps the hash of its tensors.
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    path = tmp_path / "a"
    path.write_bytes(raw(header, b"123456789"))
    copy_with_metadata(SafetensorsFile.open(path), path, {"title": "new"})
    assert path.read_bytes().endswith(b"123456789")
    file = SafetensorsFile.open(path)
    assert file.metadata == {"title": "new"} and file.shapes == {"a": (1,), "b": (2,)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(BadFile, match=r"a\.safetensors: is not a regular file"):
        SafetensorsFile.open(tmp_path / "a.safetensors")


def test_a_name_of_thousands_of_characters_is_refused(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"a" * 1000: torch.zeros(1)})
    Header.open(tmp_path / "a.safetensors")
    save_safetensors(tmp_path / "a.safetensors", {"a" * 1001: torch.zeros(1)})
    with pytest.raises(BadFile, match=r"has a name of 1,001 characters \(limit 1,000\)"):
        Header.open(tmp_path / "a.safetensors")
