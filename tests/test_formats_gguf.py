"""The GGUF reader: golden files by the gguf package's writer, the real file, and files that mean harm."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from assay.errors import FormatError
from assay.formats.gguf import GGUFArray, model_spec, open_gguf

U32, U64, STRING, ARRAY = 4, 10, 8, 9


# ---- files by hand -------------------------------------------------------------------------------------------------


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + payload


def u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def info(name: str | bytes, dims: list[int], type_id: int, offset: int, num_dims: int | None = None) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type_id, offset)


def build(
    keys: list[bytes] = (),
    infos: list[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    head += b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


SAMPLE_KEYS = [
    kv("general.architecture", STRING, text("llama")),
    u32("a.u32", 7),
    kv("a.list", ARRAY, struct.pack("<IQ", STRING, 3) + text("x") + text("") + text("yz")),
    kv("a.numbers", ARRAY, struct.pack("<IQ", 5, 2) + struct.pack("<2i", -1, 5)),
    kv("a.nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + struct.pack("<IQH", 2, 1, 9) + struct.pack("<IQ", STRING, 0)),
    kv("a.flag", 7, b"\1"),
]
SAMPLE_INFOS = [info("one", [32, 2], 8, 0), info("two", [3], 0, 96)]
SAMPLE = build(SAMPLE_KEYS, SAMPLE_INFOS, bytes(range(96)) + np.array([1, 2, 3], "<f4").tobytes())


def parse(tmp_path: Path, raw: bytes) -> dict:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with open_gguf(path) as f:
        return {"metadata": f.metadata, "tensors": f.tensors}


def fails(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        parse(tmp_path, raw)
    assert "x.gguf" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_reads_what_was_written(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(SAMPLE)
    with open_gguf(path) as f:
        assert (f.version, f.alignment, f.size_bytes) == (3, 32, len(SAMPLE))
        assert f.metadata["a.u32"] == 7
        assert f.metadata["a.flag"] is True
        assert f.metadata["a.list"].to_list() == ["x", "", "yz"]
        assert len(f.metadata["a.list"]) == 3
        assert f.metadata["a.numbers"].to_numpy().tolist() == [-1, 5]
        assert f.metadata["a.nested"].to_list() == [[9], []]
        with pytest.raises(FormatError, match="array of numbers, got string"):
            f.metadata["a.list"].to_numpy()
        one = f.tensors["one"]
        assert (one.shape, one.type_name, one.nbytes, one.num_rows) == ((2, 32), "Q8_0", 68, 2)
        assert one.bits_per_weight == 8.5
        assert one.offset % 32 == 0
        assert bytes(f.raw("one").reshape(-1)) == bytes(range(68))
        assert not f.raw("one").flags.writeable
        assert f.dequantize("two").tolist() == [1, 2, 3]
        assert f.dequantize("one", slice(1, 2)).shape == (1, 32)
        assert np.array_equal(f.dequantize("one", slice(1, 2)), f.dequantize("one")[1:])
        with pytest.raises(FormatError, match="expected a tensor 'three'"):
            f.raw("three")
        kept = f.raw("one")
        lazy = f.metadata["a.list"]
    assert kept[0, 5] == 5  # a view outlives the file object
    with pytest.raises(ValueError, match="expected an open file"):
        f.raw("one")
    with pytest.raises(ValueError, match="expected an open file"):
        lazy.to_list()


def test_version_2_and_alignment(tmp_path):
    raw = build([u32("general.alignment", 128)], [info("t", [2], 0, 128)], b"\0" * 136, version=2, alignment=128)
    assert parse(tmp_path, raw)["tensors"]["t"].offset == 256


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "expected a GGUF file, got 0 bytes"),
        (b"GG", "got 2 bytes"),
        (build(magic=b"GGML"), "magic: expected b'GGUF', got b'GGML'"),
        (build(version=1), "version: expected 2 or 3, got 1"),
        (build(version=4), "version: expected 2 or 3, got 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (build(num_keys=1 << 63), "key count: expected at most"),
        (build(num_tensors=1 << 63), "tensor count: expected at most"),
        (build(num_keys=1), "key count: expected at most"),
        (build([text("k" * 70000) + struct.pack("<IB", 0, 1)]), "a name of 1..65535 bytes, got 70000"),
        (build([kv("", 0, b"\1")]), "a name of 1..65535 bytes, got 0"),
        (build([kv(b"\xff\xfe", 0, b"\1")]), "expected UTF-8"),
        (build([u32("k", 1), u32("k", 2)]), "key 'k': expected once, got twice"),
        (build([kv("k", 13, b"\0" * 8)]), "value type of 0..12, got 13"),
        (build([kv("k", 7, b"\2")]), "bool of 0 or 1, got 2"),
        (build([struct.pack("<Q", 1 << 62) + b"abcdefghijklmnopq"]), r"expected \d+ more bytes"),
        (build([kv("k", STRING, struct.pack("<Q", (1 << 64) - 1))]), r"expected 18446744073709551615 more bytes"),
        (build([kv("k", ARRAY, struct.pack("<IQ", 0, 1 << 60))]), "key 'k': length: expected at most"),
        (build([kv("k", ARRAY, struct.pack("<IQ", 12, 1 << 61))]), "key 'k': length: expected at most"),
        (build([kv("k", ARRAY, struct.pack("<IQ", 99, 0))]), "element type of 0..12, got 99"),
        (build([kv("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", 1 << 63))]), "past its end"),
        (build([kv("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", 60))]), "past its end"),
        (build([kv("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5 + struct.pack("<IQ", 0, 0))]), "nested at most 4 deep"),
        (build([kv("general.alignment", U32, struct.pack("<I", 24))]), "alignment: expected a power of two, got 24"),
        (build([kv("general.alignment", U32, struct.pack("<I", 0))]), "alignment: expected a power of two, got 0"),
        (build([kv("general.alignment", 7, b"\1")]), "alignment: expected a power of two, got True"),
        (build([kv("general.alignment", STRING, text("32"))]), "alignment: expected a power of two, got '32'"),
        (build([], [info("t", [], 0, 0, 0)], b"\0" * 64), "tensor 't': expected 1..4 dimensions, got 0"),
        (build([], [info("t", [1] * 5, 0, 0)], b"\0" * 64), "1..4 dimensions, got 5"),
        (build([], [info("t", [0], 0, 0)], b"\0" * 64), "elements, got dimensions"),
        (build([], [info("t", [1 << 32, 1 << 32], 0, 0)], b"\0" * 64), "elements, got dimensions"),
        (build([], [info("t", [1 << 62], 0, 0)], b"\0" * 64), "tensor 't': expected it to end within"),
        (build([], [info("t", [32], 4, 0)], b"\0" * 64), "tensor 't': expected a known ggml type, got type id 4"),
        (build([], [info("t", [32], 1 << 31, 0)], b"\0" * 64), "known ggml type, got type id 2147483648"),
        (build([], [info("t", [48], 2, 0)], b"\0" * 64), r"multiple of 32 elements \(Q4_0\), got 48"),
        (build([], [info("t", [128], 12, 0)], b"\0" * 64), r"multiple of 256 elements \(Q4_K\), got 128"),
        (build([], [info("t", [1], 0, 8)], b"\0" * 64), "offset that is a multiple of 32, got 8"),
        (build([], [info("t", [17], 0, 0)], b"\0" * 64), "expected it to end within"),
        (build([], [info("t", [1], 0, 1 << 63)], b"\0" * 64), "expected it to end within"),
        (build([], [info("t", [1], 0, 0), info("t", [1], 0, 32)], b"\0" * 64), "'t': expected once, got twice"),
        (build([], [info("a", [9], 0, 0), info("b", [1], 0, 32)], b"\0" * 64), r"'b': expected it after 'a'.*overlap"),
        (build([], [info("a", [1], 0, 0), info("b", [1], 0, 0)], b"\0" * 64), "overlap"),
        (build([], [info("n" * 2000, [1], 0, 0)], b"\0" * 64), "a name of 1..1024 bytes, got 2000"),
        (build([], [info(b"\xc3", [1], 0, 0)], b"\0" * 64), "expected UTF-8"),
    ],
)  # fmt: skip
def test_hostile(tmp_path, raw, message):
    fails(tmp_path, raw, message)


def test_unreadable(tmp_path):
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="regular file"):
        open_gguf(tmp_path)
    with pytest.raises(FormatError, match="regular file"):
        open_gguf("/dev/zero")
    with pytest.raises(FormatError, match="cannot be read"):
        open_gguf("\0")


def test_bytes_that_are_no_text(tmp_path):
    got = parse(tmp_path, build([kv("k", STRING, text(b"a\xffb"))]))
    assert got["metadata"]["k"] == "a\N{REPLACEMENT CHARACTER}b"


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(SAMPLE)
    for size in range(len(SAMPLE)):
        path.write_bytes(SAMPLE[:size])
        with pytest.raises(FormatError):
            open_gguf(path)


def test_flipped_bits_anywhere(tmp_path):
    """Every bit of the header, one at a time, then seeded bursts: parsed or refused, never anything else."""
    path = tmp_path / "x.gguf"
    header = len(SAMPLE) - 108
    rng = np.random.default_rng(5)
    cases = [[bit] for bit in range(8 * header)]
    cases += [rng.integers(0, 8 * len(SAMPLE), rng.integers(2, 40)).tolist() for _ in range(2000)]
    parsed = 0
    tracemalloc.start()
    for bits in cases:
        raw = bytearray(SAMPLE)
        for bit in bits:
            raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            with open_gguf(path) as f:
                for value in f.metadata.values():
                    if isinstance(value, GGUFArray):
                        value.to_list()
                for name, t in f.tensors.items():
                    assert f.raw(name).nbytes == t.nbytes
                try:
                    model_spec(f)
                except FormatError:
                    pass
                parsed += 1
        except FormatError:
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert 0 < parsed < len(cases)


def test_no_allocation_from_an_unchecked_count(tmp_path):
    """A file whose room allows its huge counts still costs little: 8 MB of empty strings are stepped over."""
    count = 1 << 20
    path = tmp_path / "x.gguf"
    path.write_bytes(build([kv("k", ARRAY, struct.pack("<IQ", STRING, count) + b"\0" * 8 * count)]))
    tracemalloc.start()
    with open_gguf(path) as f:
        assert len(f.metadata["k"]) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_too_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.formats.gguf.cursor.MAX_STEPS", 10)
    item = struct.pack("<IQ", STRING, 6) + text("") * 6
    fails(tmp_path, build([kv("a", ARRAY, item), kv("b", ARRAY, item)]), "at most 10 strings and arrays")


def test_too_long_a_string(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.formats.gguf.file._MAX_STRING_BYTES", 10)
    fails(tmp_path, build([kv("a", STRING, text("x" * 11))]), "string of at most 10 bytes, got 11")


# ---- golden: written by the gguf package ---------------------------------------------------------------------------


def write_model(path: Path, arch: str, keys: dict, tensors: dict, quant: str = "F16") -> None:
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if isinstance(value, list):
            w.add_array(f"{arch}.{key}", value)
        else:
            w.add_uint32(f"{arch}.{key}", value)
    w.add_name(f"A {arch}")
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[quant]
    for name, shape in tensors.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            w.add_tensor(name, values)
        elif quant == "F16":
            w.add_tensor(name, values.astype(np.float16))
        else:
            w.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_keys(**more: int | list) -> dict:
    keys = {
        "block_count": 2, "embedding_length": 64, "feed_forward_length": 96, "context_length": 512,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    return keys | {key.replace("__", "."): value for key, value in more.items()}


def dense_tensors(layers: int = 2, d: int = 64, ff: int = 96, kv_n: int = 32, vocab: int = 160) -> dict:
    found = {"token_embd.weight": (vocab, d), "output.weight": (vocab, d), "output_norm.weight": (d,)}
    for i in range(layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (d,), f"blk.{i}.ffn_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (d, d), f"blk.{i}.attn_k.weight": (kv_n, d), f"blk.{i}.attn_v.weight": (kv_n, d),
            f"blk.{i}.attn_output.weight": (d, d), f"blk.{i}.ffn_gate.weight": (ff, d),
            f"blk.{i}.ffn_up.weight": (ff, d), f"blk.{i}.ffn_down.weight": (d, ff),
        }  # fmt: skip
    return found


def test_golden_against_the_packages_reader(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "g.gguf"
    write_model(path, "llama", llama_keys(), dense_tensors(), "Q8_0")
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as f:
        assert list(f.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            mine = f.tensors[t.name]
            assert mine.shape == tuple(int(d) for d in reversed(t.shape))
            assert (mine.type_name, mine.nbytes, mine.offset) == (t.tensor_type.name, t.n_bytes, t.data_offset)
            assert np.array_equal(f.dequantize(t.name).reshape(-1),
                                  gguf.quants.dequantize(t.data, t.tensor_type).reshape(-1))  # fmt: skip
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                assert f.metadata[key] == field.contents()


def test_golden_scalars_and_arrays(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "g.gguf"
    w = gguf.GGUFWriter(path, "none")
    w.add_uint8("u8", 255), w.add_int8("i8", -128), w.add_uint16("u16", 65535), w.add_int16("i16", -32768)
    w.add_int32("i32", -(1 << 31)), w.add_uint64("u64", (1 << 64) - 1), w.add_int64("i64", -(1 << 63))
    w.add_float32("f32", 0.1), w.add_float64("f64", 0.1), w.add_bool("yes", True), w.add_string("s", "snow ☃")
    w.add_array("strings", ["a", "", "β"]), w.add_array("floats", [0.5, -1.5]), w.add_array("flags", [True, False])
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()
    w.close()
    with open_gguf(path) as f:
        m = f.metadata
        assert (m["u8"], m["i8"], m["u16"], m["i16"]) == (255, -128, 65535, -32768)
        assert (m["i32"], m["u64"], m["i64"]) == (-(1 << 31), (1 << 64) - 1, -(1 << 63))
        assert (m["f32"], m["f64"], m["yes"], m["s"]) == (float(np.float32(0.1)), 0.1, True, "snow ☃")
        assert m["strings"].to_list() == ["a", "", "β"]
        assert m["floats"].to_list() == [0.5, -1.5]
        assert m["flags"].to_list() == [True, False]
        assert f.tensors == {}
        with pytest.raises(FormatError, match=r"none\.block_count: expected a positive integer, got None"):
            model_spec(f)


def test_type_without_dequantizer(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(build([], [info("t", [256], 17, 0)], b"\0" * 96))
    with open_gguf(path) as f:
        assert f.raw("t").shape == (1, 74)
        with pytest.raises(FormatError, match=r"tensor 't': expected one of .* to dequantise, got IQ2_XS"):
            f.dequantize("t")


# ---- the real file -------------------------------------------------------------------------------------------------


def test_real_file(gemma_gguf):
    with open_gguf(gemma_gguf) as f:
        counts: dict[str, int] = {}
        for t in f.tensors.values():
            counts[t.type_name] = counts.get(t.type_name, 0) + 1
        assert counts == {"F32": 109, "Q8_0": 10, "Q5_0": 81, "Q4_K": 27, "Q6_K": 9}
        tokens = f.metadata["tokenizer.ggml.tokens"]
        assert (tokens.type_name, tokens.count) == ("string", 262144)
        words = tokens.to_list()
        assert (words[2], words[2000]) == ("<bos>", "']")
        assert f.metadata["tokenizer.ggml.scores"].to_numpy().dtype == np.float32
        spec = model_spec(f)
    assert spec.num_params == 268_098_176
    assert spec.stored_weight_bytes == 246_587_904
    stored = {m.name: m.stored for m in spec.matrices}
    assert stored["ffn_down"] == {"Q6_K": 9, "Q4_K": 9}
    assert stored["lm_head"] == {"Q8_0": 1}
    assert spec.tied_embedding
    assert {a.window: a.num_layers for a in spec.attention} == {512: 15, None: 3}


def test_real_tensors_bit_for_bit(gemma_gguf):
    """Every tensor but the embedding whole, the embedding's rows with a stride, against the gguf package."""
    gguf = pytest.importorskip("gguf")
    with open_gguf(gemma_gguf) as f:
        for t in f.tensors.values():
            rows = slice(0, None, 97) if t.num_rows > 100_000 else slice(None)
            mine = f.dequantize(t.name, rows)
            theirs = gguf.quants.dequantize(np.ascontiguousarray(f.raw(t.name)[rows]),
                                            gguf.GGMLQuantizationType[t.type_name])  # fmt: skip
            assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32)), t.name


def test_real_file_truncated(gemma_gguf, tmp_path):
    """Cut at every power of two below its end, and just short of it (a sparse copy, so that it costs no disk)."""
    size = Path(gemma_gguf).stat().st_size
    path = tmp_path / "cut.gguf"
    with Path(gemma_gguf).open("rb") as source, path.open("wb") as target:
        target.write(source.read(8 << 20))
        target.truncate(size)
    open_gguf(path).close()
    for cut in [size - 1, *(1 << p for p in range(27, 1, -1))]:
        with path.open("r+b") as target:
            target.truncate(cut)
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            open_gguf(path)
