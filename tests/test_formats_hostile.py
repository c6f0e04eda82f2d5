"""Checkpoints that mean harm or are broken: refused by name, before memory is taken, and nothing half-written."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.cli import main
from assay.errors import FormatError
from assay.formats.checkpoint import open_checkpoint
from assay.formats.convert import Options, convert
from assay.formats.safetensors import SafetensorsWriter
from test_formats_convert import GPTQ, checkpoint_of, gptq_tensors, mixed_gguf, write_gguf
from test_formats_wide import blocks


@pytest.fixture
def mixed(tmp_path):
    return mixed_gguf(tmp_path / "mixed.gguf")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, None, r"tensor 'm\.qweight': expected a config\.json .* got null"),
        ({"g_idx": None}, GPTQ | {"desc_act": True}, r"m\.g_idx: expected it \(desc_act is true\), got no such tensor"),
        ({"scales": None}, GPTQ, r"expected a tensor 'm\.scales'"),
        ({"qzeros": None}, GPTQ, r"expected a tensor 'm\.qzeros'"),
        ({"scales": np.ones((2, 16), np.float64)}, GPTQ, r"m\.scales: expected float16 or float32 .*, got float64"),
        ({"scales": np.full((2, 16), np.nan, np.float16)}, GPTQ, r"m\.scales: expected finite scales, got nan"),
        (
            {},
            GPTQ | {"group_size": 48},
            r"m\.qweight: expected K to be a multiple of group_size = 48 .*short last group",
        ),
        ({}, GPTQ | {"group_size": 32}, r"m\.scales: expected float16 or float32 \[4, 16\] .*, got float16 \[2, 16\]"),
        ({}, GPTQ | {"bits": 3}, r"bits: expected 4, got 3"),
        ({}, GPTQ | {"group_size": "many"}, r"group_size: expected a positive number or -1, got 'many'"),
        ({}, GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format: expected gptq or gptq_v2, got 'marlin'"),
        (
            {"qweight": np.zeros((16, 12), np.int32)},
            GPTQ,
            r"m\.qweight: expected N to be a multiple of 8 .*, got N = 12",
        ),
        ({"qweight": np.zeros((2, 16, 2), np.int32)}, GPTQ, r"'m\.qweight': expected 2 dimensions"),
        ({"g_idx": np.zeros(128, np.int32)}, GPTQ, r"m\.g_idx: expected every group 64 times, got group 0 128 times"),
        ({"g_idx": np.full(128, 7, np.int32)}, GPTQ, r"m\.g_idx: expected groups 0\.\.1, got 7"),
        (
            {"weight": np.zeros(3, np.float32)},
            GPTQ,
            r"tensor 'm\.weight': expected once, got a matrix of that name too",
        ),
    ],
)
def test_bad_gptq(tmp_path, change, config, message):
    """Each is refused by name, and leaves no output."""
    tensors = {name: array for name, array in (gptq_tensors() | change).items() if array is not None}
    path = checkpoint_of(tmp_path / "m.safetensors", tensors, config)
    with pytest.raises(FormatError, match=message):
        convert(path, tmp_path / "out.safetensors", Options())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


BNB_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"quant_type": "int8"}, r"quant_type: expected nf4 or fp4, got 'int8'"),
        ({"shape": [2, -64]}, r"shape: expected \[N, K\], got \[2, -64\]"),
        ({"shape": [2, 1 << 60]}, r"m\.weight: expected uint8 of .* bytes"),
        ({"blocksize": True}, r"blocksize: expected a number from 16 up, got True"),
        ({"blocksize": 32}, r"m\.absmax: expected float32 \[4\], got float32 \[2\]"),
    ],
)
def test_bad_bitsandbytes(tmp_path, state, message):
    raw = np.frombuffer(json.dumps(BNB_STATE | state).encode(), np.uint8)
    parts = {
        "weight": np.zeros((64, 1), np.uint8), "weight.absmax": np.ones(2, np.float32),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32), "weight.quant_state.bitsandbytes__nf4": raw,
    }  # fmt: skip
    path = checkpoint_of(tmp_path / "m.safetensors", parts, None)
    with pytest.raises(FormatError, match=message), open_checkpoint(path) as c:
        c.weights("m.weight")


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ("no json", "matrices: expected JSON"),
        ('{"m": 5}', r"matrix 'm': shape: expected positive"),
        ('{"m": {"shape": [4, 32], "form": "int2", "group_size": 32}}', "form: expected one of int4"),
        ('{"m": {"shape": [4, 32], "form": "int4", "group_size": 24}}', r"group_size: expected a divisor of K = 32, got 24"),
        ('{"m": {"shape": [4, 32], "form": "int8", "group_size": 32}}', r"qweight: expected I8 \[4, 32\], got U8 \[4, 16\]"),
        ('{"m": {"shape": [9, 32], "form": "int4", "group_size": 32}}', r"qweight: expected U8 \[9, 16\], got U8 \[4, 16\]"),
        ('{"x": {"shape": [4, 32], "form": "int4", "group_size": 32}}', r"'x': qweight: .* got no such tensor"),
        ('{"m": {"shape": [4, 32], "form": "int4", "group_size": 16}}', r"m\.scales: expected F16 or F32 \[4, 2\]"),
        ('{"m": {"shape": [4, 32], "form": "wide4", "group_size": 32}}', r"m\.scales: expected F32 \[4, 1\], got F16"),
        ('{"m": {"shape": [4, 32], "form": "int4", "group_size": 32}}', r"zeros: expected 0\.\.15, got 77"),
    ],
)  # fmt: skip
def test_bad_containers(tmp_path, matrices, message):
    path = tmp_path / "c.safetensors"
    with SafetensorsWriter(path, 4096) as f:
        f.add("m.qweight", np.zeros((4, 16), np.uint8))
        f.add("m.scales", np.ones((4, 1), np.float16))
        f.add("m.zeros", np.full((4, 1), 77, np.uint8))
        f.finish({"format": "assay", "assay_layout": "1", "matrices": matrices})
    with pytest.raises(FormatError, match=message) as caught, open_checkpoint(path) as c:
        c.weights("m")
    assert "c.safetensors" in str(caught.value)


def test_hostile_numbers_allocate_nothing(tmp_path):
    """A nested block size of 2^60 and an HQQ shape of 2^60 are refused, or harmless, in a few kilobytes."""
    state = BNB_STATE | {"nested_blocksize": 1 << 60, "nested_offset": 0.5}
    parts = {
        "weight": np.zeros((64, 1), np.uint8), "weight.absmax": np.zeros(2, np.uint8),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32), "weight.nested_absmax": np.ones(1, np.float32),
        "weight.nested_quant_map": np.ones(256, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }  # fmt: skip
    path = checkpoint_of(tmp_path / "m.safetensors", parts, None)
    hqq = {"W_q": np.zeros((2, 64), np.uint8), "scale": np.ones((4, 1), np.float32), "zero": np.ones((4, 1), np.float32),
           "shape": np.array([1 << 60, 64], np.int64), "group_size": np.array(64)}  # fmt: skip
    other = checkpoint_of(tmp_path / "h.safetensors", hqq, None)
    tracemalloc.start()
    with open_checkpoint(path) as c:
        assert (c.weights("m.weight").scales == 1.5).all()
    with (
        open_checkpoint(other) as c,
        pytest.raises(FormatError, match=r"m\.W_q: expected uint8 \[576460752303423488, 64\]"),
    ):
        c.weights("m.weight")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_newer_layout_and_unreadable_types(tmp_path):
    path = tmp_path / "c.safetensors"
    with SafetensorsWriter(path, 4096) as f:
        f.finish({"format": "assay", "assay_layout": "2", "matrices": "{}"})
    with pytest.raises(FormatError, match="assay_layout: expected 1, got '2'"):
        open_checkpoint(path)
    source = write_gguf(tmp_path / "iq2.gguf", {"t.weight": (np.zeros((2, 82), np.uint8), "IQ2_S", (2, 256))})
    with pytest.raises(FormatError, match=r"tensor 't\.weight': IQ2_S cannot be read, only inspected"):
        convert(source, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(source)]) == 0
    (tmp_path / "x.bin").write_bytes(b"GIF8")
    with pytest.raises(FormatError, match=r"expected a GGUF or \.safetensors file"):
        open_checkpoint(tmp_path / "x.bin")


def test_a_truncated_shard(mixed, tmp_path):
    out = tmp_path / "out"
    convert(mixed, out, Options(shard_bytes=2000))
    shard = out / "model-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"model-00002\.safetensors: tensor .* \(truncated file\?\)"):
        convert(out, tmp_path / "again", Options())
    assert not (tmp_path / "again").exists()


def test_a_full_disk_leaves_nothing(mixed, tmp_path):
    """A file size limit stands for the full disk."""
    out = tmp_path / "out.safetensors"
    code = (
        "import resource, signal, sys\nfrom assay.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(main(['convert', sys.argv[1], '-o', sys.argv[2]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(mixed), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mixed.gguf"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_spoiled_files_never_crash(tmp_path, data):
    """Bytes changed, cut or added anywhere: the weights are read, or a FormatError says why not."""
    sources = spoiled_sources(tmp_path)
    source = data.draw(st.sampled_from(sources))
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, min(len(raw) - 1, 1200)), st.integers(0, len(raw) - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path = tmp_path / f"spoiled{source.suffix}"
    path.write_bytes(raw)
    try:
        with open_checkpoint(path) as c:
            for name, t in c.tensors.items():
                if t.form is not None:
                    c.weights(name).dequantize()
    except FormatError as exc:
        assert str(exc)  # noqa: PT017


_SOURCES: dict[Path, list[Path]] = {}


def spoiled_sources(folder: Path) -> list[Path]:
    if folder not in _SOURCES:
        gguf = write_gguf(folder / "a.gguf", {k: (blocks(k, 2), k, (2, 512)) for k in ("Q4_K", "Q5_0", "MXFP4")})
        made = [gguf, checkpoint_of(folder / "b.safetensors", gptq_tensors(), GPTQ), folder / "c.safetensors"]
        convert(gguf, made[2], Options())
        floats = checkpoint_of(folder / "f.safetensors", {"weight": np.ones((4, 128), np.float32)}, None)
        for to in ("nf4", "hqq", "nvfp4"):
            made.append(folder / f"{to}.safetensors")
            convert(floats, made[-1], Options(to=to, quantize=("*",), group_size=64))
        _SOURCES[folder] = made
    return _SOURCES[folder]


def test_writer_refuses_a_name_twice(tmp_path):
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, 500) as f:
        f.add("a", np.ones(3, np.float32))
        with pytest.raises(FormatError, match="tensor 'a': expected once, got twice"):
            f.add("a", np.ones(3, np.float32))
    assert not list(tmp_path.iterdir())
