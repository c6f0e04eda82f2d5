"""The safetensors reader: files by hand, shards, files that mean harm, and the quantised linears in them."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import assay
from assay.errors import FormatError
from assay.formats.int4 import Int4Weights, to_awq, to_compressed_tensors, to_gptq
from assay.formats.safetensors import open_safetensors, quantized_linears

NAMES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "BF16"}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A file of the tensors one after another; uint16 stands for bfloat16."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = entry(NAMES[array.dtype.name], list(array.shape), len(data), len(data) + len(raw))
        data += raw
    path.write_bytes(build(header, data))


HEADER = {
    "__metadata__": {"format": "pt"},
    "w": entry("F32", [2, 3], 1, 25),  # unaligned on purpose
    "flag": entry("BOOL", [1], 0, 1),
    "b": entry("BF16", [2], 25, 29),
    "none": entry("I64", [0, 5], 29, 29),
    "one": entry("I8", [], 29, 30),
    "tiny": entry("F4", [4], 30, 32),
}
VALUES = np.arange(6, dtype="<f4")
DATA = b"\1" + VALUES.tobytes() + bytes([0x80, 0x3F, 0x00, 0xC0]) + b"\xff" + b"\x21\x43"
SAMPLE = build(HEADER, DATA)


def fails(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        open_safetensors(path)
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_reads_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAMPLE)
    with open_safetensors(path) as f:
        assert f.metadata == {"format": "pt"}
        assert {n: (t.dtype, t.shape) for n, t in f.tensors.items()} == {
            "w": ("F32", (2, 3)), "flag": ("BOOL", (1,)), "b": ("BF16", (2,)), "none": ("I64", (0, 5)),
            "one": ("I8", ()), "tiny": ("F4", (4,)),
        }  # fmt: skip
        assert f.array("w").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert f.array("flag").tolist() == [True]
        assert f.array("b").dtype == np.uint16
        assert f.array("b").tolist() == [0x3F80, 0xC000]
        assert f.array("none").shape == (0, 5)
        assert f.array("one").tolist() == -1
        assert f.raw("tiny").tolist() == [0x21, 0x43]
        with pytest.raises(FormatError, match="tensor 'tiny': expected elements of whole bytes, got F4"):
            f.array("tiny")
        with pytest.raises(FormatError, match="expected a tensor 'nothing', got 6 others"):
            f.raw("nothing")
        kept = f.array("w")
        assert not kept.flags.writeable
    assert kept[1, 2] == 5  # a view outlives the file object
    with pytest.raises(ValueError, match="expected an open file"):
        f.raw("w")


def test_padded_header_and_no_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(json.dumps(HEADER).encode() + b"   ", DATA))
    with open_safetensors(path) as f:
        assert np.array_equal(f.array("w").reshape(-1), VALUES)
    path.write_bytes(build({}))
    with open_safetensors(tmp_path / "x.safetensors") as f:
        assert f.tensors == {}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"t": entry("F32", [2], 0, 8)}, b"1234567", r"tensor 't': data_offsets: expected them within the 7 bytes"),
        ({"t": entry("F32", [2], 0, 8)}, b"123456789", r"expected the tensors to fill the file's"),
        ({"t": entry("F32", [2], 1, 9)}, b"123456789", r"tensor 't': expected it to begin at 0, .* got 1 \(gap\)"),
        (
            {"a": entry("U8", [8], 0, 8), "b": entry("U8", [4], 6, 10)}, b"0123456789",
            r"tensor 'b': expected it to begin at 8, where 'a' ends, got 6 \(overlap\)",
        ),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"01", r"tensor 'b': .*\(overlap\)"),
        ({"t": entry("F32", [3], 0, 8)}, b"12345678", r"tensor 't': expected 12 bytes \(F32 \[3\]\), got 8"),
        ({"t": entry("F4", [3], 0, 1)}, b"1", r"tensor 't': expected 1.5 bytes"),
        ({"t": entry("U8", [2], 2, 0)}, b"12", r"data_offsets: expected them within"),
        ({"t": entry("Q4_0", [2], 0, 2)}, b"12", r"dtype: expected one of BOOL, .*, got 'Q4_0'"),
        ({"t": entry(["F32"], [2], 0, 2)}, b"12", r"dtype: expected one of"),
        ({"t": entry("U8", [-2], 0, 2)}, b"12", r"shape: expected at most 32 sizes, got \[-2\]"),
        ({"t": entry("U8", [2.0], 0, 2)}, b"12", r"shape: expected"),
        ({"t": entry("U8", [True], 0, 1)}, b"1", r"shape: expected"),
        ({"t": entry("U8", [1] * 33, 0, 1)}, b"1", r"shape: expected at most 32"),
        ({"t": entry("U8", "12", 0, 2)}, b"12", r"shape: expected"),
        ({"t": entry("U8", [1 << 62, 1 << 62], 0, 2)}, b"12", r"shape: expected at most 2\^63-1 elements"),
        ({"t": entry("U8", [1 << 70], 0, 2)}, b"12", r"shape: expected at most 32 sizes"),
        ({"t": entry("F64", [1 << 62], 0, 2)}, b"12", r"expected 3.68935e\+19 bytes"),
        ({"t": entry("U8", [2], 0, 1 << 80)}, b"12", r"data_offsets: expected \[begin, end\]"),
        ({"t": {"dtype": "U8", "shape": [2], "data_offsets": [0]}}, b"12", r"data_offsets: expected \[begin, end\]"),
        ({"t": {"dtype": "U8", "shape": [2]}}, b"12", r"tensor 't': expected dtype, shape and data_offsets"),
        ({"t": entry("U8", [2], 0, 2) | {"more": 1}}, b"12", r"tensor 't': expected dtype, shape and data_offsets"),
        ({"t": 5}, b"", r"tensor 't': expected dtype, shape and data_offsets, got 5"),
        ({"__metadata__": {"a": 1}}, b"", r"__metadata__: expected strings by name"),
        ({"__metadata__": "a"}, b"", r"__metadata__: expected strings"),
        ([1], b"", "header: expected a JSON object, got list"),
        (b"{broken", b"", r"header: expected JSON, got b'\{broken'"),
        (b"\xff\xfe{}", b"", "header: expected JSON"),
        (b'{"a": NaN}', b"", "expected JSON numbers, got NaN"),
        (b"[" * 100_000 + b"]" * 100_000, b"", "header: expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "header: expected JSON"),
        (
            b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12", "header: 't': expected once, got twice",
        ),
        (b'{"t":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1", "'dtype': expected once"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, header, data, message):
    fails(tmp_path, build(header, data), message)


@pytest.mark.parametrize("length", [0, 1, len(SAMPLE) - 7, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_header_length(tmp_path, length):
    fails(tmp_path, build(HEADER, DATA, length=length), rf"header length: expected 2\.\..* got {length}$")


def test_header_bound(tmp_path):
    """100 MB of header are refused by their length, not parsed (the file is sparse)."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", 100_000_001))
        handle.truncate(200_000_000)
    with pytest.raises(FormatError, match=r"expected 2\.\.100000000 bytes"):
        open_safetensors(path)


def test_nothing_is_allocated_for_absurd_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({f"t{i}": entry("F32", [1 << 30, 1 << 30], 0, 1 << 62) for i in range(100)}))
    tracemalloc.start()
    with pytest.raises(FormatError):
        open_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_every_truncation(tmp_path):
    path = tmp_path / "x.safetensors"
    for size in range(len(SAMPLE)):
        path.write_bytes(SAMPLE[:size])
        with pytest.raises(FormatError, match=r"x\.safetensors: "):
            open_safetensors(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_damage(tmp_path, changes):
    """Either it is refused, or everything that it lists can be read."""
    raw = bytearray(SAMPLE)
    for at, value in changes:
        raw[at] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        f = open_safetensors(path)
    except FormatError as exc:
        assert "x.safetensors" in str(exc)  # noqa: PT017 - most damage is refused, some is a name or a value
        return
    with f:
        for name, t in f.tensors.items():
            assert f.raw(name).nbytes == t.nbytes
            if not t.dtype.startswith(("F4", "F6")):
                assert f.array(name).shape == t.shape


def test_no_file(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        open_safetensors(tmp_path / "missing.safetensors")
    with pytest.raises(FormatError, match=r"expected a folder with model\.safetensors\.index\.json"):
        open_safetensors(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FormatError, match="expected a regular file"):
        open_safetensors(tmp_path / "pipe.safetensors")
    with pytest.raises(FormatError, match="cannot be read"):
        open_safetensors(tmp_path / "nul\0.safetensors")


# ---- shards --------------------------------------------------------------------------------------------------------


def shards(folder: Path, weight_map: Any, **files: dict[str, np.ndarray]) -> Path:
    for name, tensors in files.items():
        save(folder / f"{name}.safetensors", tensors)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


A, B = np.arange(4, dtype=np.float32), np.arange(3, dtype=np.uint8)


def test_shards(tmp_path):
    index = shards(tmp_path, {"b": "two.safetensors", "a": "one.safetensors"}, one={"a": A}, two={"b": B})
    for path in (index, tmp_path):
        with open_safetensors(path) as f:
            assert list(f.tensors) == ["b", "a"]
            assert f.tensors["a"].file == "one.safetensors"
            assert np.array_equal(f.array("a"), A)
            assert np.array_equal(f.array("b"), B)


def test_shards_behind_links(tmp_path):
    """Hugging Face's cache is a folder of links to blobs elsewhere."""
    (tmp_path / "snapshot").mkdir()
    index = shards(tmp_path / "snapshot", {"a": "one.safetensors"})
    save(tmp_path / "blob", {"a": A})
    (tmp_path / "snapshot" / "one.safetensors").symlink_to("../blob")
    with open_safetensors(index) as f:
        assert np.array_equal(f.array("a"), A)


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..\\one.safetensors", "c:one.safetensors", "..",
     ".safetensors", "one.bin", "one\0.safetensors", "", 5, None, ["one.safetensors"]],
)  # fmt: skip
def test_shard_names_stay_in_the_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    save(tmp_path / "one.safetensors", {"a": A})
    index = shards(tmp_path / "in", {"a": name}, one={"a": A})
    with pytest.raises(FormatError, match="tensor 'a': expected a plain name"):
        open_safetensors(index)


def test_shards_that_disagree(tmp_path):
    one, two = "one.safetensors", "two.safetensors"
    both = {"one": {"a": A}, "two": {"b": B}}
    for weight_map, files, message in [
        ({"a": one, "b": two}, {"one": {"a": A}, "two": {"a": A, "b": B}}, r"tensor 'a': expected once, got it in one"),
        ({"a": two, "b": two}, {"two": {"b": B}}, r"tensor 'a': expected in two\.safetensors, got a shard without it"),
        ({"a": one}, {"one": {"a": A, "c": B}}, "tensor 'c': expected in no shard by the index, got it in one"),
        ({"a": two, "b": one}, both, r"tensor 'b': expected in one\.safetensors by the index, got it in two"),
        ({"a": one, "b": "three.safetensors"}, both, r"three\.safetensors: cannot be read"),
        ({}, {}, "weight_map: expected file names by tensor"),
        ([one], {}, "weight_map: expected file names by tensor"),
        ({f"t{i}": f"{i}.safetensors" for i in range(1025)}, {}, "expected at most 1024 files, got 1025"),
    ]:
        with pytest.raises(FormatError, match=message):
            open_safetensors(shards(tmp_path, weight_map, **files))
    index = shards(tmp_path, {"a": one, "b": two}, **both)
    raw = (tmp_path / two).read_bytes()
    (tmp_path / two).write_bytes(raw[:-1])
    with pytest.raises(FormatError, match=r"two\.safetensors: tensor 'b': .*truncated"):
        open_safetensors(index)
    index.write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(FormatError, match="'a': expected once, got twice"):
        open_safetensors(index)


# ---- quantised checkpoints -----------------------------------------------------------------------------------------


def layer(seed: int, *, zeros: bool = True, perm: bool = False, group_size: int = 32) -> Int4Weights:
    rng = np.random.default_rng(seed)
    n, k = 16, 64
    order = rng.permutation(np.arange(k) // group_size)
    return Int4Weights(
        rng.integers(0, 16, (n, k), dtype=np.uint8),
        rng.uniform(0.01, 0.1, (n, k // group_size)).astype(np.float16),
        rng.integers(0, 8, (n, k // group_size), dtype=np.uint8) if zeros else None,
        group_size,
        np.argsort(order, kind="stable").astype(np.int32) if perm else None,
    )


def compressed(**weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False, "actorder": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme | weights}},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
CASES = [
    (GPTQ, layer(1, perm=True), to_gptq),
    (GPTQ | {"checkpoint_format": "gptq_v2"}, layer(2, perm=True), lambda w: to_gptq(w, version=2)),
    (GPTQ | {"desc_act": False, "group_size": -1}, layer(3, group_size=64), to_gptq),
    (AWQ, layer(4), to_awq),
    (AWQ | {"version": "GEMM"}, layer(5), to_awq),
    (compressed(), layer(6), to_compressed_tensors),
    (compressed(symmetric=True), layer(7, zeros=False), to_compressed_tensors),
    (compressed(actorder="group"), layer(8, perm=True), to_compressed_tensors),
    (
        compressed(strategy="channel", group_size=None, symmetric=True), layer(9, zeros=False, group_size=64),
        to_compressed_tensors,
    ),
]  # fmt: skip


def checkpoint(folder: Path, *layers: dict[str, np.ndarray]) -> Path:
    tensors = {f"model.layers.{i}.q_proj.{name}": x for i, part in enumerate(layers) for name, x in part.items()}
    save(folder / "model.safetensors", tensors | {"model.norm.weight": np.ones(3, np.float16)})
    return folder / "model.safetensors"


@pytest.mark.parametrize(("config", "w", "write"), CASES)
def test_quantized_linears(tmp_path, config, w, write):
    path = checkpoint(tmp_path, write(w), write(w))
    with open_safetensors(path) as f:
        for given_config in (config, {"model_type": "llama", "quantization_config": config}):
            found = list(quantized_linears(f, given_config))
            assert [name for name, _ in found] == ["model.layers.0.q_proj", "model.layers.1.q_proj"]
            for _, got in found:
                assert got.group_size == w.group_size
                assert (got.zeros is None) == (w.zeros is None)
                assert (got.perm is None) == (w.perm is None)
                assert np.array_equal(got.dequantize(), w.dequantize())
    got = found[0][1]  # its memory is its own: the file is closed
    packed = assay.pack(**got.pack_args())
    a = np.random.default_rng(10).standard_normal((2, w.k)).astype(np.float32)
    out = assay.w4a16_gemm(a if got.perm is None else np.ascontiguousarray(a[:, got.perm]), packed)
    dense = w.dequantize().astype(np.float64)
    bound = (w.k + 2) * 2.0**-24 * (np.abs(a) @ np.abs(dense).T)
    assert (np.abs(out - a @ dense.T) <= bound).all()


def test_bfloat16_scales_of_a_file(tmp_path):
    w = layer(11)
    file = to_compressed_tensors(w)
    file["weight_scale"] = (w.scales.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with open_safetensors(checkpoint(tmp_path, file)) as f:
        _, got = next(quantized_linears(f, compressed()))
    assert np.array_equal(got.scales.view(np.uint32), file["weight_scale"].astype(np.uint32) << 16)
    assert got.scales.flags.aligned


def test_two_schemes_are_told_apart(tmp_path):
    coarse, fine = layer(12, zeros=False, group_size=64), layer(13)
    config = compressed()
    config["config_groups"]["group_1"] = compressed(strategy="channel", symmetric=True)["config_groups"]["group_0"]
    path = checkpoint(tmp_path, to_compressed_tensors(coarse), to_compressed_tensors(fine))
    with open_safetensors(path) as f:
        sizes = [w.group_size for _, w in quantized_linears(f, config)]
        assert sizes == [64, 32]
    path = checkpoint(tmp_path, to_compressed_tensors(layer(14, group_size=16)))
    with (
        open_safetensors(path) as f,
        pytest.raises(FormatError, match="expected tensors of one of the 2 config_groups"),
    ):
        list(quantized_linears(f, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quant_method: expected one of gptq, awq, compressed-tensors, got None"),
        ({"quantization_config": 5}, "quantization_config: expected an object"),
        (GPTQ | {"quant_method": "bitsandbytes"}, "quant_method: expected one of"),
        (GPTQ | {"bits": 8}, "bits: expected 4, got 8"),
        (GPTQ | {"group_size": None}, "group_size: expected a positive number or -1, got None"),
        (GPTQ | {"group_size": 0}, "group_size: expected a positive number or -1, got 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: expected gptq or gptq_v2, got 'marlin'"),
        (AWQ | {"version": "gemv"}, "version: expected gemm, got 'gemv'"),
        (compressed() | {"format": "int-quantized"}, "format: expected pack-quantized, got 'int-quantized'"),
        (compressed() | {"config_groups": {}}, "config_groups: expected schemes by name"),
        (compressed() | {"config_groups": {"a": {}}}, r"config_groups\.'a': weights: expected a scheme"),
        (compressed(num_bits=8), "num_bits: expected 4, got 8"),
        (compressed(type="float"), "type: expected int, got 'float'"),
        (compressed(strategy="tensor"), "strategy: expected group or channel, got 'tensor'"),
    ],
)
def test_refused_configurations(tmp_path, config, message):
    path = checkpoint(tmp_path, to_gptq(layer(15)) | to_compressed_tensors(layer(15)))
    with open_safetensors(path) as f, pytest.raises(FormatError, match=message):
        quantized_linears(f, config)  # at once, not at the first module


def test_refused_modules(tmp_path):
    file = to_gptq(layer(16))
    for config, change, message in [
        (GPTQ, {"g_idx": None}, r"model\.layers\.0\.q_proj\.g_idx: expected it \(desc_act is true\)"),
        (GPTQ, {"scales": None}, r"expected a tensor 'model\.layers\.0\.q_proj\.scales'"),
        (GPTQ, {"qzeros": None}, r"expected a tensor 'model\.layers\.0\.q_proj\.qzeros'"),
        (GPTQ | {"group_size": 48}, {}, r"q_proj\.qweight: expected K to be a multiple of group_size = 48"),
        (GPTQ, {"qzeros": file["qzeros"][:1]}, r"q_proj\.qzeros: expected .* \[2, 2\] .* got int32 \[1, 2\]"),
        (AWQ, {}, r"q_proj\.qweight: expected K to be a multiple of group_size = 32 .* got K = 8"),
    ]:
        tensors = {name: x for name, x in (file | change).items() if x is not None}
        with (
            open_safetensors(checkpoint(tmp_path, tensors)) as f,
            pytest.raises(FormatError, match=message) as caught,
        ):
            list(quantized_linears(f, config))
        assert "model.safetensors" in str(caught.value)
    with (
        open_safetensors(checkpoint(tmp_path)) as f,
        pytest.raises(FormatError, match=r"expected tensors named \*\.qweight \(gptq\), got none"),
    ):
        quantized_linears(f, GPTQ)


# ---- live ----------------------------------------------------------------------------------------------------------


def test_the_library_agrees(tmp_path):
    """Its files are read; what it reads of ours is the same."""
    library = pytest.importorskip("safetensors.numpy", reason="the format's own library")
    rng = np.random.default_rng(17)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.integers(0, 9, (2, 2, 2)),
        "c": np.zeros((0, 4), np.float16),
        "d": np.array(3, np.uint8),
        "e": rng.random(3) < 0.5,
    }
    path = tmp_path / "x.safetensors"
    library.save_file(tensors, path, metadata={"k": "v"})
    with open_safetensors(path) as f:
        assert f.metadata == {"k": "v"}
        assert set(f.tensors) == set(tensors)
        for name, array in tensors.items():
            assert f.array(name).dtype == array.dtype
            assert np.array_equal(f.array(name), array)
    mine = to_gptq(layer(18))
    save(path, mine)
    theirs = library.load_file(path)
    assert all(np.array_equal(theirs[name], mine[name]) for name in mine)
