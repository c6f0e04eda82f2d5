"""Converters against what the formats' own libraries made: checked-in vectors, and live runs where a library is installed.

``golden/make.py`` made the vectors. Weights must be those of the library, and writing them again must give its tensors.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay
from assay.formats.checkpoint import open_checkpoint
from assay.formats.ggml import GGML_WRITABLE, from_ggml, to_ggml
from assay.formats.int4 import (
    Int4Weights,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    from_hqq,
    to_awq,
    to_compressed_tensors,
    to_gptq,
    to_hqq,
)
from assay.formats.safetensors import SafetensorsWriter
from assay.formats.weights import Weights
from assay.formats.wide import (
    NestedAbsmax,
    from_bnb4,
    from_hqq_float,
    from_mxfp4,
    from_nvfp4,
    to_bnb4,
    to_mxfp4,
    to_nvfp4,
)
from golden.make import GGML, GROUP, MAKERS

GOLDEN = Path(__file__).parent / "golden"
Arrays = dict[str, np.ndarray]
IMPORTS = {"autoawq": "awq", "compressed-tensors": "compressed_tensors"}


def same(written: dict[str, Any], stored: Arrays) -> None:
    for name, array in written.items():
        assert np.array_equal(array, stored[name]), name


def read_gptq(g: Arrays, version: int) -> Weights:
    parts = [g[name] for name in ("qweight", "qzeros", "scales", "g_idx")]
    w = from_gptq(*parts, group_size=GROUP, version=version, zero_16="carry")
    same(to_gptq(w, version=version, zero_16="carry"), g)
    return w


def read_awq(g: Arrays) -> Weights:
    w = from_awq(g["qweight"], g["qzeros"], g["scales"], group_size=GROUP)
    same(to_awq(w), g)
    return w


def read_compressed(g: Arrays) -> Weights:
    parts = [g.get(f"weight_{part}") for part in ("packed", "scale", "shape", "zero_point")]
    dtype = "bfloat16" if g["weight_scale"].dtype == np.uint16 else None
    w = from_compressed_tensors(*parts, group_size=GROUP, scales_dtype=dtype)
    same({k: v for k, v in to_compressed_tensors(w).items() if dtype is None or k != "weight_scale"}, g)
    assert (w.zeros is None) == (dtype is not None)
    return w


def read_nvfp4(g: Arrays) -> Weights:
    w = from_nvfp4(g["weight_packed"], g["weight_scale"], g["weight_global_scale"], divide=True)
    back = to_nvfp4(w)
    assert np.array_equal(from_nvfp4(**back, divide=True).dequantize(), w.dequantize())
    assert np.array_equal(back["weight_packed"], g["weight_packed"])
    return w


def read_nvfp4_torchao(g: Arrays) -> Weights:
    w = from_nvfp4(g["weight"], g["weight_scale"], g["weight_scale_2"], divide=False)
    back = to_nvfp4(w, divide=False)
    assert np.array_equal(from_nvfp4(**back, divide=False).dequantize(), w.dequantize())
    return w


def read_mxfp4(g: Arrays) -> Weights:
    w = from_mxfp4(g["blocks"], g["scales"])
    same(to_mxfp4(w), g)
    return w


def read_bnb(g: Arrays) -> Weights:
    state = json.loads(next(v for k, v in g.items() if "quant_state" in k).tobytes())
    nested = None
    if "nested_absmax" in g:
        numbers = state["nested_offset"], state["nested_blocksize"]
        nested = NestedAbsmax(g["nested_quant_map"], g["nested_absmax"], *numbers)
    w = from_bnb4(g["weight"], g["absmax"], state["shape"], quant_map=g["quant_map"], blocksize=64, nested=nested)
    same({k: v for k, v in to_bnb4(w).items() if nested is None or k != "absmax"}, g)
    return w


def read_hqq(g: Arrays) -> Weights:
    parts = [g["W_q"], g["scale"], g["zero"], tuple(g["shape"].tolist())]
    w = from_hqq_float(*parts, group_size=int(g["group_size"]))
    if (g["zero"] == np.rint(g["zero"])).all():
        exact = from_hqq(*parts, group_size=int(g["group_size"]))
        same({"W_q": to_hqq(exact)["W_q"]}, g)
        return exact
    return w


def read_ggml(g: Arrays, kind: str) -> Weights:
    w = from_ggml(g["rows"], kind)
    if kind in GGML_WRITABLE:
        again = from_ggml(to_ggml(w, kind), kind)
        assert np.array_equal(again.q, w.q)
        assert np.array_equal(again.dequantize(), w.dequantize())
    return w


READERS = {
    "gptq": lambda g: read_gptq(g, 1),
    "gptq_act_order": lambda g: read_gptq(g, 1),
    "gptq_v2": lambda g: read_gptq(g, 2),
    "awq": read_awq,
    "compressed_tensors": read_compressed,
    "compressed_tensors_symmetric": read_compressed,
    "nvfp4": read_nvfp4,
    "nvfp4_torchao": read_nvfp4_torchao,
    "mxfp4_torchao": read_mxfp4,
    "nf4": read_bnb,
    "nf4_double": read_bnb,
    "fp4": read_bnb,
    "hqq": read_hqq,
    "hqq_integer": read_hqq,
} | {f"ggml_{kind}": (lambda g, kind=kind: read_ggml(g, kind)) for kind in GGML}


def check(name: str, g: Arrays) -> None:
    w = READERS[name](g)
    ours, theirs = w.dequantize(), g["values"].astype(np.float64)
    if (
        name == "hqq"
    ):  # float32 zero points: theirs rounds (q - z) s twice, ours -z s and the sum; each 2^-24 of the parts
        span = 32 * np.abs(g["scale"]).max()
        assert np.abs(ours - theirs).max() <= 4 * 2.0**-24 * span
    else:
        assert np.array_equal(ours, theirs)
    if "product" in g and isinstance(w, Int4Weights):
        a = g["a"] if w.perm is None else np.ascontiguousarray(g["a"][:, w.perm])
        c = assay.w4a16_gemm(a, assay.pack(**w.pack_args()))
        size = np.abs(g["a"]).astype(np.float64) @ np.abs(theirs).T
        steps = a.shape[1] * 17  # a rounding for each term, of parts up to 17 times the weight's: q s and z s apart
        assert (np.abs(c - g["product"]) <= steps * 2.0**-24 * size + 1e-6).all()


def test_every_maker_has_a_reader_and_a_file():
    assert set(READERS) == set(MAKERS) == {p.stem for p in GOLDEN.glob("*.npz")}
    assert sum(p.stat().st_size for p in GOLDEN.glob("*.npz")) < 300_000


@pytest.mark.parametrize("name", sorted(READERS))
def test_checked_in(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        assert json.loads(str(file["versions"]))
        check(name, {key: file[key] for key in file.files if key != "versions"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(READERS))
def test_live(name):
    maker, distributions = MAKERS[name]
    module = IMPORTS.get(distributions[0], distributions[0])
    try:
        importlib.import_module(module)
    except ImportError as exc:
        pytest.skip(f"{distributions[0]} is not installed here ({exc})")
    check(name, maker(1))


def test_a_stored_15_carries_as_in_gptqmodel():
    """The vector has zero points of 0, and reading them nibble by nibble spoils their neighbours."""
    with np.load(GOLDEN / "gptq.npz") as g:
        parts = [g[name] for name in ("qweight", "qzeros", "scales", "g_idx")]
        right = from_gptq(*parts, group_size=GROUP, zero_16="carry")
        wrong = from_gptq(*parts, group_size=GROUP, zero_16="wrap")
    assert (right.zeros[0] == 0).all()
    assert (right.zeros[3] == 15).all()
    assert (wrong.zeros[1] != right.zeros[1]).any()


# ---- as checkpoints: the names and configurations that the tools write ----------------------------------------------


def _gptq_config(layout: str) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
    return base | {"checkpoint_format": layout, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}


def _compressed_config(symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


#: name -> quantization_config, stored type, and the names of tensors that are not "m." and the vector's own
CHECKPOINTS: dict[str, tuple[dict[str, Any] | None, str, dict[str, str]]] = {
    "gptq": (_gptq_config("gptq"), "GPTQ", {}),
    "gptq_act_order": (_gptq_config("gptq") | {"desc_act": True}, "GPTQ", {}),
    "gptq_v2": (_gptq_config("gptq_v2"), "GPTQ v2", {}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, "AWQ", {}),
    "compressed_tensors": (_compressed_config(False), "compressed-tensors", {}),
    "compressed_tensors_symmetric": (_compressed_config(True), "compressed-tensors", {}),
    "nvfp4": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "NVFP4", {}),
    "nvfp4_torchao": (None, "NVFP4", {}),
    "mxfp4_torchao": (None, "MXFP4", {"blocks": "m.weight_blocks", "scales": "m.weight_scales"}),
    "nf4": (None, "NF4", {}),
    "nf4_double": (None, "NF4", {}),
    "fp4": (None, "FP4", {}),
    "hqq": (None, "HQQ", {}),
    "hqq_integer": (None, "HQQ", {}),
}


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_as_a_checkpoint(tmp_path, name):
    """A file with the tool's names and configuration holds the tool's weights, and packs, by assay.load."""
    config, stored, names = CHECKPOINTS[name]
    with np.load(GOLDEN / f"{name}.npz") as file:
        g = {key: file[key] for key in file.files}
    skipped = {"versions", "values", "a", "product"}
    bnb = stored in ("NF4", "FP4")
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, 1 << 14) as f:
        for key in set(g) - skipped:
            own = f"m.weight.{key}" if bnb and key != "weight" else f"m.{key}"
            dtype = "BF16" if g[key].dtype == np.uint16 else None
            if stored == "NVFP4" and key == "weight_scale":
                dtype = "F8_E4M3"
            f.add(names.get(key, own), g[key], dtype)
        f.finish({})
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with open_checkpoint(tmp_path) as c:
        (t,) = c.tensors.values()
        assert (t.name, t.stored, t.shape) == ("m.weight", stored, g["values"].shape)
        assert t.nbytes == sum(g[key].nbytes for key in set(g) - skipped)
        ours = c.weights("m.weight").dequantize()
    if name != "hqq":
        assert np.array_equal(ours, g["values"])
    (loaded,) = assay.load(tmp_path)
    packed = loaded.packed[0].dequantize()
    packed = packed if loaded.perm is None else packed[:, np.argsort(loaded.perm)]
    if name.startswith("hqq"):  # float32 scales and zeros: packed, rounded to float16, or product and sum rounded once
        bound = 2.0**-11 * np.abs(ours).max() if name == "hqq_integer" else 2.0**-23 * 32 * np.abs(g["scale"]).max()
        assert np.abs(packed - ours).max() <= bound
    else:
        assert np.array_equal(packed, ours)


def test_mxfp4_of_compressed_tensors(tmp_path):
    with np.load(GOLDEN / "mxfp4_torchao.npz") as g:
        packed, scale, want = g["blocks"].reshape(len(g["blocks"]), -1), g["scales"], g["values"]
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, 1 << 14) as f:
        f.add("m.weight_packed", packed)
        f.add("m.weight_scale", scale)
        f.finish({})
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}}
    with open_checkpoint(path, config) as c:
        assert np.array_equal(c.weights("m.weight").dequantize(), want)
