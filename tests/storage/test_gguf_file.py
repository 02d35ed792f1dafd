"""GGUF files: what is in them, and what damaged ones end in."""

import os
import random
import re
import struct
import sys

import gguf
import numpy as np
import pytest
import torch

from core.errors import BadFile, MissingPackage
from core.storage.gguf_file import open_gguf, quantised_gguf
from core.storage.stored import dtype_and_shape
from tests.tooling import write_gguf

WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
Q = gguf.GGMLQuantizationType


@pytest.fixture
def path(tmp_path):
    kinds = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q8": Q.Q8_0, "q4": Q.Q4_0}
    return write_gguf(tmp_path / "model.gguf", {name: (WEIGHT, kind) for name, kind in kinds.items()})


def test_tensors_are_read_in_their_types_and_quantised_ones_as_bf16(path):
    tensors = open_gguf(path)
    dtypes = {"f32": torch.float32, "f16": torch.float16}
    for name in ("f32", "f16", "bf16", "q8", "q4"):
        dtype = dtypes.get(name, torch.bfloat16)
        assert dtype_and_shape(tensors, name) == (dtype, (6, 64)) and tensors[name].dtype == dtype
    assert torch.equal(tensors["f32"], WEIGHT) and torch.equal(tensors["f16"], WEIGHT.half())
    assert torch.equal(tensors["bf16"], WEIGHT.bfloat16())
    # Blocks of 32 numbers have a scale: their largest over 127, or over 8.
    peaks = WEIGHT.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
    for name, steps in (("q8", 127), ("q4", 8)):
        error = (tensors[name].float() - WEIGHT).reshape(-1, 32).abs()
        assert (error <= 1.02 * peaks / steps).all() and error.mean() > 0.1 * peaks.mean() / steps / 4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")
def test_torch_dequantises_what_the_package_does_bit_for_bit(kind):
    numbers, size = gguf.GGML_QUANT_SIZES[Q[kind]]
    data = np.random.default_rng(0).integers(0, 256, (5, 3 * size), np.uint8)  # some factors are infinite or none
    expected = torch.from_numpy(gguf.quants.dequantize(data, Q[kind]))
    assert expected.isnan().float().mean() < 0.1 < expected.unique().numel()
    narrow = quantised_gguf(torch.from_numpy(data), kind, (5, 3 * numbers))
    assert narrow and narrow.nbytes == data.nbytes
    for dtype in (torch.bfloat16, torch.float32):
        dequantised = narrow.dequantised(dtype)
        torch.testing.assert_close(dequantised, expected.bfloat16().to(dtype), rtol=0, atol=0, equal_nan=True)
    assert quantised_gguf(torch.from_numpy(data), kind, (15, numbers)) is None


def test_a_tokenizers_words_are_passed_over(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "qwen3")
    writer.add_token_list(["", *map(str, range(1000)), "ü" * 40])
    writer.add_token_types([1] * 1002)
    writer.add_token_merges([f"{number} b" for number in range(1000)])
    writer.add_tensor("weight", WEIGHT.numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    texts, read = [], gguf.GGUFReader._get_str
    monkeypatch.setattr(gguf.GGUFReader, "_get_str", lambda *given: texts.append(1) or read(*given))
    tensors = open_gguf(tmp_path / "model.gguf")
    assert tensors.architecture == "qwen3" and torch.equal(tensors["weight"], WEIGHT)
    assert len(texts) < 20
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[:9000])
    with pytest.raises(BadFile, match=r"short\.gguf: cannot be read as GGUF: the file is truncated"):
        open_gguf(tmp_path / "short.gguf")


def test_a_tensor_that_was_made_a_matrix_has_its_shape_again(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "flux")
    writer.add_array("comfy.gguf.orig_shape.kernel", [3, 2, 64])
    writer.add_tensor("kernel", WEIGHT.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(open_gguf(tmp_path / "model.gguf")["kernel"], WEIGHT.reshape(3, 2, 64))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_damaged_file_is_refused_or_read(path, tmp_path):
    whole, rng, outcomes = path.read_bytes(), random.Random(0), {"read": 0, "refused": 0}
    for number in range(120):
        data = bytearray(whole if number % 3 else whole[: rng.randrange(len(whole))])
        for _ in range(rng.choice((1, 2, 8))):
            if data:
                data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        (tmp_path / "damaged.gguf").write_bytes(data)
        try:
            tensors = open_gguf(tmp_path / "damaged.gguf")
            outcomes["read"] += all(isinstance(tensors[name], torch.Tensor) for name in tensors)
        except BadFile as error:
            assert str(error).startswith(f"{tmp_path / 'damaged.gguf'}: ")
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 120 and min(outcomes.values()) > 20


def gguf_header(tensors: int, fields: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


_A, _LIST = struct.pack("<Qc", 1, b"a"), 9  # a name, and the number of the type of lists
_NAMED = [struct.pack("<Q7sIIQ", 7, b"%07d" % number, 0, 0, 0) for number in range(20_000)]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (gguf_header(0, 1, _A, struct.pack("<I", _LIST), struct.pack("<IQ", _LIST, 1) * 20_000), "has lists of lists"),
        (gguf_header(0, 1, struct.pack("<Q", 2**21), bytes(2**21)), "a name has 2,097,152 bytes (limit 1,000)"),
        (gguf_header(1, 0, struct.pack("<Q", 2**21), bytes(2**21)), "a name has 2,097,152 bytes (limit 1,000)"),
        (gguf_header(1, 0, _A, struct.pack("<I", 2**20), bytes(2**24)), "a tensor has 1,048,576 sides (limit 16)"),
        (gguf_header(2**40, 0, *_NAMED), "its header has more than 40,000 values"),
        (gguf_header(0, 1, _A, struct.pack("<IIQ", _LIST, 8, 2**23), bytes(2**26)), "more than 40,000 values"),
    ],
)  # fmt: skip
def test_a_small_file_that_claims_much_is_refused_at_once(tmp_path, content, fault):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(BadFile, match=rf"a\.gguf: cannot be read as GGUF: .*{re.escape(fault)}"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are not in the file system here")
def test_what_is_no_file_is_said_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BadFile, match=r"pipe\.gguf: is not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")
    with pytest.raises(BadFile, match=r"none\.gguf: cannot be read: No such file"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("<html>")
    with pytest.raises(BadFile, match=r"text\.gguf: cannot be read as GGUF: GGUF magic invalid"):
        open_gguf(tmp_path / "text.gguf")


def test_without_the_package_its_command_is_said(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"model\.gguf: .* pip install gguf$"):
        open_gguf(path)


def test_writing_into_a_tensor_changes_no_file(path):
    tensors = open_gguf(path)
    tensors["f32"][:] = 0
    assert torch.equal(tensors["f32"], WEIGHT)
