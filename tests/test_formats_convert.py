"""Checkpoints of every method as one list, ``assay convert`` and ``assay.load``: weights kept, memory bounded, nothing
half-written."""

import csv
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay
from assay.cli import main
from assay.errors import FormatError
from assay.formats.checkpoint import open_checkpoint
from assay.formats.convert import TARGETS, Options, convert
from assay.formats.gguf import open_gguf
from assay.formats.int4 import Int4Weights, to_gptq
from assay.formats.lossy import _ROUNDERS
from assay.formats.safetensors import SafetensorsWriter, open_safetensors
from test_formats_wide import blocks

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4", "NVFP4")


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str, tuple[int, ...]]]) -> Path:
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(path, "none")
    w.add_float32("none.number", 0.5)
    for name, (rows, kind, shape) in tensors.items():
        if kind == "F32":
            w.add_tensor(name, rows)
        else:
            w.add_tensor(name, rows.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def mixed_gguf(path: Path) -> Path:
    """A file with a matrix of each type, a stack of experts and a norm."""
    tensors = {f"{kind}.weight": (blocks(kind, 3), kind, (3, 512)) for kind in KINDS}
    tensors["experts.weight"] = (blocks("Q4_K", 6, 256), "Q4_K", (2, 3, 256))
    tensors["norm.weight"] = (np.arange(8, dtype=np.float32), "F32", (8,))
    return write_gguf(path, tensors)


@pytest.fixture
def mixed(tmp_path):
    return mixed_gguf(tmp_path / "mixed.gguf")


def values(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as c:
        return {
            name: c.array(name) if t.form is None else c.weights(name).dequantize().reshape(t.shape)
            for name, t in c.tensors.items()
        }


def assert_same_values(a: Path, b: Path) -> None:
    one, two = values(a), values(b)
    assert set(one) == set(two)
    for name in one:
        assert np.array_equal(one[name], two[name]), name


# ---- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["file", "folder"])
def test_our_container_keeps_every_weight(mixed, tmp_path, shape):
    out = tmp_path / ("out.safetensors" if shape == "file" else "out")
    rows = convert(mixed, out, Options(shard_bytes=2000))
    assert_same_values(mixed, out)
    assert all(row.max_error == row.rms_error == 0 for row in rows)
    assert sum(row.count for row in rows) == len(KINDS) + 2
    assert not list(tmp_path.rglob("*.part"))
    with open_checkpoint(out) as c:
        assert c.kind == "assay"
        assert c.tensors["experts.weight"].shape == (2, 3, 256)
        assert (c.tensors["Q6_K.weight"].stored, c.tensors["Q6_K.weight"].form) == ("Q6_K", "wide8")
    if shape == "folder":
        assert len(list(out.glob("model-*.safetensors"))) > 3
    again = tmp_path / "again.safetensors"
    convert(out, again, Options())
    assert_same_values(mixed, again)


def test_other_libraries_read_it(mixed, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    out = tmp_path / "out.safetensors"
    convert(mixed, out, Options())
    theirs = safetensors.load_file(out)
    with open_safetensors(out) as ours:
        assert set(theirs) == set(ours.tensors)
        assert all(np.array_equal(theirs[name], ours.array(name)) for name in theirs)


def test_load_packs_every_tensor(mixed, tmp_path):
    want = values(mixed)
    out = tmp_path / "out.safetensors"
    convert(mixed, out, Options())
    for path in (mixed, out):
        seen = set()
        for t in assay.load(path):
            seen.add(t.name)
            if t.array is not None:
                assert np.array_equal(t.array, want[t.name])
                continue
            assert len(t.packed) == (2 if len(t.shape) == 3 else 1)
            parts = np.stack([p.dequantize() for p in t.packed]).reshape(t.shape)
            assert np.array_equal(parts, want[t.name]), t.name
        assert seen == set(want)


def test_gguf_to_gguf(mixed, tmp_path):
    small = tmp_path / "small.gguf"
    write_gguf(small, {f"{k}.weight": (blocks(k, 3), k, (3, 512)) for k in ("Q4_0", "Q5_0", "Q8_0")})
    out = tmp_path / "out.gguf"
    rows = convert(small, out, Options(to="q8_0"))
    assert all(row.max_error == 0 for row in rows)
    with open_gguf(out) as f, open_gguf(small) as g:
        assert {t.type_name for t in f.tensors.values()} == {"Q8_0"}
        assert f.metadata == g.metadata
    assert_same_values(small, out)
    with pytest.raises(FormatError, match=r"tensor 'Q4_1.weight': Q8_0: minimum: expected 0 everywhere"):
        convert(mixed, tmp_path / "no.gguf", Options(to="q8_0"))
    assert not list(tmp_path.glob("no.gguf*"))
    lossy = convert(mixed, out, Options(to="q8_0", lossy=True))
    row = next(r for r in lossy if r.stored == "Q6_K")
    assert 0 < row.rms_error < 0.02
    reader = pytest.importorskip("gguf").GGUFReader(out)
    assert {t.name for t in reader.tensors} == set(values(mixed))


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "awq", "compressed-tensors", "hqq", "nf4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("folder", [False, True])
def test_rounded_into_every_method_and_read_again(tmp_path, to, folder):
    """Floats to each method; what is read back is what rounding gave, with the error that was told."""
    w = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    source = tmp_path / "w.safetensors"
    with SafetensorsWriter(source, 4096) as f:
        f.add("a.weight", w)
        f.add("b.weight", (w.view(np.uint32) >> 16).astype(np.uint16), "BF16")
        f.add("norm.weight", w[0])
        f.finish({})
    out = tmp_path / ("out" if folder else "out.safetensors")
    rows = convert(source, out, Options(to=to, quantize=("?.weight",), group_size=64))
    got = values(out)
    name = {"mxfp4": "a"}.get(to, "a.weight")
    want = _ROUNDERS[to][1](w, 64).dequantize()
    assert np.array_equal(got[name], want)
    assert np.array_equal(got["norm.weight"], w[0])
    told = next(r for r in rows if r.stored == "F32" and r.runs_as == to)
    assert told.rms_error == pytest.approx(np.linalg.norm(want - w) / np.linalg.norm(w), rel=1e-6)
    back = tmp_path / "back.safetensors"
    assert all(row.max_error == 0 for row in convert(out, back, Options()))  # a repack, exact
    assert np.array_equal(values(back)[name], want)


def test_int4_repacks_between_the_methods(tmp_path):
    """GPTQ to AWQ, compressed-tensors, and back: codes, zero points (0 and 15 too) and scales to the bit."""
    rng = np.random.default_rng(1)
    zeros = rng.integers(0, 16, (16, 2), np.uint8)
    zeros[:4, 0] = [0, 0, 15, 0]
    w = Int4Weights(
        rng.integers(0, 16, (16, 128), np.uint8), rng.uniform(0.1, 1, (16, 2)).astype(np.float16), zeros, 64
    )
    path = tmp_path / "gptq.safetensors"
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}
    with SafetensorsWriter(path, 4096) as f:
        for part, array in to_gptq(w, version=2).items():
            f.add(f"m.{part}", array)
        f.finish({"quantization_config": json.dumps(config)})
    last = path
    for to in ("awq", "compressed-tensors", "gptq", "gptq_v2", "assay", "hqq", "awq"):
        out = tmp_path / f"{to}-after-{last.name}"
        convert(last, out, Options(to=to))
        with open_checkpoint(out) as c:
            read = c.weights("m.weight")
            assert isinstance(read, Int4Weights)
            assert np.array_equal(read.q, w.q)
            assert np.array_equal(read.zeros, w.zeros)
            assert np.array_equal(read.scales, w.scales)
        last = out


def test_act_order_is_loaded_with_its_permutation(tmp_path):
    rng = np.random.default_rng(2)
    perm = rng.permutation(128).astype(np.int32)
    perm = np.concatenate([np.sort(perm[:64]), np.sort(perm[64:])])
    w = Int4Weights(rng.integers(0, 16, (16, 128), np.uint8), np.ones((16, 2), np.float16), None, 64, perm)
    path = tmp_path / "m.safetensors"
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True}
    with SafetensorsWriter(path, 4096) as f:
        for part, array in to_gptq(w).items():
            f.add(f"m.{part}", array)
        f.finish({"quantization_config": json.dumps(config)})
    out = tmp_path / "out.safetensors"
    convert(path, out, Options())
    for source in (path, out):
        (t,) = assay.load(source)
        a = rng.standard_normal((2, 128)).astype(np.float32)
        c = assay.w4a16_gemm(np.ascontiguousarray(a[:, t.perm]), t.packed[0])
        assert c == pytest.approx(a.astype(np.float64) @ w.dequantize().T.astype(np.float64), rel=1e-4, abs=1e-4)
    with pytest.raises(FormatError, match=r"'m.weight': perm: expected None .* act-order"):
        convert(path, tmp_path / "awq.safetensors", Options(to="awq"))


def test_the_real_file_gives_what_gguf_gives(gemma_gguf):
    """One matrix of each type that llama.cpp wrote: the weights to the bit, and the product within its rounding."""
    quants = pytest.importorskip("gguf").quants
    import gguf

    rng = np.random.default_rng(0)
    with open_checkpoint(gemma_gguf) as c, open_gguf(gemma_gguf) as f:
        first = {t.stored: t for t in c.tensors.values() if t.form is not None and t.shape[0] < 10_000}
        assert set(first) == {"Q8_0", "Q5_0", "Q4_K", "Q6_K"}
        for t in first.values():
            w = c.weights(t.name)
            theirs = quants.dequantize(f.raw(t.name), gguf.GGMLQuantizationType[t.stored])
            assert np.array_equal(w.dequantize(), theirs)
            pack = assay.pack_int8 if t.form == "int8" else assay.pack_wide
            packed = pack(**w.pack_args())
            assert np.array_equal(packed.dequantize(), theirs)
            a = rng.standard_normal((2, w.k)).astype(np.float32)
            want = a.astype(np.float64) @ theirs.astype(np.float64).T
            got = (assay.w4a16_gemm if t.form == "wide4" else assay.w8a8_gemm)(a, packed)
            share = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert share < (1e-5 if t.form == "wide4" else 0.02)  # float32 sums; int8 activations


def test_load_names_what_no_kernel_takes(tmp_path):
    path = checkpoint_of(tmp_path / "m.safetensors", gptq_tensors(96, 16, 24), GPTQ | {"group_size": 24})
    with pytest.raises(FormatError, match=r"m\.weight: group_size: expected 32, 64, 128 or K = 96, got 24"):
        list(assay.load(path))


# ---- memory, interruption --------------------------------------------------------------------------------------------


def big_gguf(path: Path, tensors: int, rows: int) -> Path:
    data = blocks("Q8_0", rows, 1024)
    return write_gguf(path, {f"t{i}.weight": (data, "Q8_0", (rows, 1024)) for i in range(tensors)})


def test_memory_is_one_tensors(tmp_path):
    """24 tensors of 2.2 MB: the peak of what Python allocates stays that of a few copies of one."""
    source = big_gguf(tmp_path / "big.gguf", 24, 2000)
    tracemalloc.start()
    convert(source, tmp_path / "out.safetensors", Options())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out.safetensors").stat().st_size > 24 * 2_100_000
    assert peak < 5 * 2_200_000


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
def test_a_checkpoint_larger_than_memory(tmp_path):
    """Under a limit of 32 MB of new memory, 106 MB of weights convert."""
    source = big_gguf(tmp_path / "big.gguf", 48, 2000)
    code = (
        "import resource, sys, numpy\n"
        "from assay.formats.convert import Options, convert\n"
        "import assay.formats.ggml, assay.formats.safetensors\n"
        "used = next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmData'))\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + (32 << 20),) * 2)\n"
        "try:\n    numpy.ones(64 << 20, numpy.uint8)\n    sys.exit('the limit does not hold')\n"
        "except MemoryError:\n    pass\n"
        "convert(sys.argv[1], sys.argv[2], Options())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out.safetensors")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").stat().st_size > 100_000_000


@pytest.mark.parametrize("name", ["out.safetensors", "out.gguf"])
def test_interrupted_file_leaves_nothing(mixed, tmp_path, name):
    def stop(_: float, tensor: str) -> None:
        if tensor == "Q5_0.weight":
            raise KeyboardInterrupt

    out = tmp_path / name
    out.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        convert(mixed, out, Options(to="q8_0" if name.endswith("gguf") else "assay", lossy=True), stop)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixed.gguf", name]


def test_a_folder_goes_on_where_it_was_interrupted(mixed, tmp_path):
    seen: list[str] = []

    def stop(_: float, tensor: str) -> None:
        seen.append(tensor)
        if tensor == "Q5_1.weight":
            raise KeyboardInterrupt

    out, options = tmp_path / "out", Options(shard_bytes=1500)
    with pytest.raises(KeyboardInterrupt):
        convert(mixed, out, options, stop)
    done = sorted(p.name for p in out.iterdir())
    assert done
    assert all(name.startswith("model-") and name.endswith(".safetensors") for name in done)
    stamps = {name: (out / name).stat().st_mtime_ns for name in done}
    with pytest.raises(FormatError, match=r"expected a folder with model\.safetensors\.index\.json"):
        open_checkpoint(out)  # unfinished
    with pytest.raises(FormatError, match="expected an empty folder or this very conversion begun"):
        convert(mixed, out, Options(shard_bytes=1501))
    rows = convert(mixed, out, options)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == stamps
    assert sum(row.resumed for row in rows) >= len(done)
    assert sum(row.count for row in rows) == len(KINDS) + 2
    assert_same_values(mixed, out)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(mixed, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(mixed), "-o", str(out)]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert text.startswith(f"{out}: {len(KINDS) + 2} tensors, ")
    assert "every weight kept" in text.splitlines()[0]
    assert text.rstrip().endswith(f"Next: assay inspect {out}")
    assert main(["convert", str(mixed), "-o", str(out), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["exact"], report["to"]) == ("assay-convert", True, "assay")
    assert report["bytes_before"] == sum(row["bytes_before"] for row in report["rows"])
    assert main(["convert", str(mixed), "-o", str(out), "--format", "csv"]) == 0
    assert {row["stored"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))} == {*KINDS, "F32"}
    gguf = tmp_path / "out.gguf"
    assert main(["convert", str(mixed), "-o", str(gguf), "--to", "q4_0", "--lossy"]) == 0
    assert "rounded: RMS error up to" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "wide8" in text
    assert main(["inspect", str(out), "--error"]) == 2
    assert "--error: expected a GGUF file, got assay" in capsys.readouterr().err


def test_command_refuses(mixed, tmp_path, capsys):
    cases = [
        (["-o", str(tmp_path / "x.safetensors"), "--to", "q8_0"], "expected a name in .gguf for q8_0"),
        (["-o", str(tmp_path / "x.gguf")], "expected a name in .safetensors, or a folder, for assay, got a .gguf"),
        (["-o", str(mixed), "--to", "q8_0", "--lossy"], "expected another file than the one that is read"),
        (["-o", str(tmp_path / "x"), "--group-size", "0"], "--group-size: expected 1 or more, got 0"),
        (["-o", str(tmp_path / "x"), "--shard-gib", "0"], "--shard-gib: expected a positive number, got 0"),
        (["-o", str(tmp_path / "none" / "x.safetensors")], "No such file"),
    ]
    before = mixed.read_bytes()
    for arguments, message in cases:
        assert main(["convert", str(mixed), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert mixed.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mixed.gguf"]
    with pytest.raises(ValueError, match="to: expected one of"):
        convert(mixed, tmp_path / "x", Options(to="q9"))


def test_the_commands_list_is_the_librarys():
    from assay.commands import convert as command

    assert set(command.TARGETS) == set(TARGETS)


# ---- from safetensors -------------------------------------------------------------------------------------------------------


def gptq_tensors(k: int = 128, n: int = 16, group: int = 64) -> dict[str, np.ndarray]:
    w = Int4Weights(np.full((n, k), 5, np.uint8), np.ones((n, k // group), np.float16), None, group)
    return to_gptq(w)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}


def checkpoint_of(path: Path, tensors: dict[str, Any], config: Any) -> Path:
    with SafetensorsWriter(path, 1 << 16) as f:
        for name, array in tensors.items():
            f.add(f"m.{name}", *(array if isinstance(array, tuple) else (array,)))
        f.finish({"quantization_config": json.dumps(config)} if config is not None else {})
    return path


def test_bf16_scales_are_widened_exactly(tmp_path):
    scales = np.full((2, 16), 0x3F81, np.uint16)  # 1.0078125
    path = checkpoint_of(tmp_path / "m.safetensors", gptq_tensors() | {"scales": (scales, "BF16")}, GPTQ)
    with open_checkpoint(path) as c:
        assert c.weights("m.weight").dequantize()[0, 0] == -3 * 1.0078125
