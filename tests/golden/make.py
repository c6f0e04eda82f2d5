"""Golden vectors of every format, made by the format's own library: ``python -m golden.make [NAME ...]`` in tests/.

A maker quantises seeded Gaussian weights (a few rows, with zeros and outliers) with the library, and returns the tensors as
the library stores them and ``values``, the weights that the library computes from them, in float32. The files beside this
one were made so; tests check the converters against them, and against a fresh run of the maker where its library is
installed: pip install torch compressed-tensors bitsandbytes, and with --no-deps gptqmodel, autoawq, torchao and hqq and
what their imports ask for.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
N, K, GROUP = 32, 128, 32  # AutoAWQ takes N in multiples of 32
Arrays = dict[str, np.ndarray]


def weights(seed: int, n: int = N, k: int = K) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((n, k)) * 0.05).astype(np.float32)
    w[1, : k // 2] = 0
    w[2, 3] = 1.5
    return w


def grid(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, float16 scales [N, G] and zero points 0..15 [N, G] that quantise them, asymmetric."""
    w = weights(seed)
    groups = w.reshape(N, -1, GROUP)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = (np.maximum(high - low, 1e-3) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15).astype(np.float32)
    zeros[0], zeros[3] = 0, 15
    return w, scales, zeros


def numpy_of(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return tensor.view(torch.uint8).numpy()
    return tensor.detach().contiguous().numpy()


# ---- the makers ------------------------------------------------------------------------------------------------------


def gptq(seed: int, *, version: int = 1, act_order: bool = False) -> Arrays:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    w, scales, zeros = grid(seed)
    layer = TorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=act_order, in_features=K, out_features=N)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.from_numpy(w)
    g_idx = np.arange(K) // GROUP
    if act_order:
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    layer.pack_original(linear, torch.from_numpy(scales.astype(np.float32)), torch.from_numpy(zeros),
                        torch.from_numpy(g_idx.astype(np.int32)))  # fmt: skip
    stored = {name: numpy_of(getattr(layer, name)).copy() for name in ("qweight", "qzeros", "scales", "g_idx")}
    layer.scales = layer.scales.float()  # so that products are not rounded to float16
    layer.eval()
    values = layer.dequantize_weight().float().T
    a = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((3, K)).astype(np.float32))
    product = a.double() @ values.double().T
    if version == 1:
        layer.qzero_format(format=2)
        convert_gptq_v2_to_v1_format_module(layer, layer)  # bits and pack_dtype are the layer's
        stored["qzeros"] = numpy_of(layer.qzeros)
    return stored | {"values": numpy_of(values), "a": numpy_of(a), "product": numpy_of(product)}


def awq(seed: int) -> Arrays:
    import torch
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    w, scales, zeros = grid(seed)
    linear = torch.nn.Linear(K, N, bias=False)
    # AutoAWQ neither clamps nor takes weights off the grid
    on_grid = np.clip(np.rint(w.reshape(N, -1, GROUP) / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, 15)
    linear.weight.data = torch.from_numpy(((on_grid - zeros[..., None]) * scales[..., None]).reshape(N, K))
    layer = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=torch.from_numpy(scales.T.astype(np.float32)), zeros=torch.from_numpy(zeros.T.copy())
    )
    values = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
    a = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((3, K)).astype(np.float32))
    stored = {name: numpy_of(getattr(layer, name)) for name in ("qweight", "qzeros", "scales")}
    product = a.double() @ values.double().T
    return stored | {"values": numpy_of(values), "a": numpy_of(a), "product": numpy_of(product)}


def compressed_tensors(seed: int, *, symmetric: bool = False, bfloat16: bool = False) -> Arrays:
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    w, scales, zeros = grid(seed)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP),
    )
    scale = torch.from_numpy(scales.astype(np.float32))
    scale = scale.to(torch.bfloat16) if bfloat16 else scale
    state = {"weight": torch.from_numpy(w).to(scale.dtype), "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.from_numpy((zeros - 8).astype(np.int8))
    packed = PackedQuantizationCompressor.compress(state, scheme)
    stored = {name: numpy_of(value) for name, value in packed.items()}
    unpacked = dict(packed)
    unpacked["weight_scale"] = unpacked["weight_scale"].float()
    values = PackedQuantizationCompressor.decompress(unpacked, scheme)["weight"]
    return stored | {"values": numpy_of(values.float())}


def nvfp4(seed: int) -> Arrays:
    import torch
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    w = torch.from_numpy(weights(seed))
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16,
                            scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn)  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    factor = (448.0 * 6.0 / w.abs().max()).reshape(1)
    scale = (w.reshape(N, -1, 16).abs().amax(-1) / 6.0 * factor).to(torch.float8_e4m3fn).float()
    state = {"weight": w, "weight_scale": scale, "weight_global_scale": factor}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    # `decompress` computes in bfloat16; the same two steps in float32
    codes = unpack_fp4_from_uint8(packed["weight_packed"], N, K, dtype=torch.float32)
    values = dequantize(codes, packed["weight_scale"].float(), args=args, global_scale=factor, dtype=torch.float32)
    return {name: numpy_of(value) for name, value in packed.items()} | {"values": numpy_of(values.float())}


def mxfp4_torchao(seed: int) -> Arrays:
    import torch
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    tensor = MXTensor.to_mx(torch.from_numpy(weights(seed)), torch.float4_e2m1fn_x2, 32)
    values = tensor.dequantize(torch.float32)
    return {
        "blocks": tensor.qdata.view(torch.uint8).numpy().reshape(N, -1, 16),
        "scales": tensor.scale.view(torch.uint8).numpy().reshape(N, -1),
        "values": numpy_of(values),
    }


def nvfp4_torchao(seed: int) -> Arrays:
    """ModelOpt's convention: block scales times one float32."""
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    w = torch.from_numpy(weights(seed))
    tensor = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max()))
    return {
        "weight": tensor.qdata.view(torch.uint8).numpy(),
        "weight_scale": numpy_of(tensor.scale).reshape(N, -1),
        "weight_scale_2": numpy_of(tensor.per_tensor_scale.float()).reshape(1),
        "values": numpy_of(tensor.dequantize(torch.float32)),
    }


def bnb(seed: int, *, kind: str = "nf4", double: bool = False) -> Arrays:
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.from_numpy(weights(seed)), quant_type=kind, compress_statistics=double, blocksize=64
    )
    stored = {"weight": packed} | state.as_dict(packed=True)
    return {name: numpy_of(value) for name, value in stored.items()} | {
        "values": numpy_of(functional.dequantize_4bit(packed, state))
    }


def hqq(seed: int, *, optimize: bool = True) -> Arrays:
    import torch
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        torch.from_numpy(weights(seed)), nbits=4, group_size=64, axis=1, optimize=optimize, round_zero=not optimize,
        device="cpu", compute_dtype=torch.float32,
    )  # fmt: skip
    values = Quantizer.dequantize(packed, meta)
    stored = {"W_q": packed, "scale": meta["scale"], "zero": meta["zero"]}
    return {name: numpy_of(value) for name, value in stored.items()} | {
        "shape": np.array(meta["shape"], np.int32),
        "group_size": np.array(meta["group_size"], np.int32),
        "values": numpy_of(values),
    }


def ggml(seed: int, *, kind: str) -> Arrays:
    """By the library's quantiser, or, where it has none, blocks of random bytes with small scales."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    qtype = GGMLQuantizationType[kind]
    try:
        rows = quants.quantize(weights(seed, 4, 512), qtype)
    except NotImplementedError:
        size, nbytes = GGML_QUANT_SIZES[qtype]
        rows = np.random.default_rng(seed).integers(0, 256, (4, 512 // size * nbytes), np.uint8)
        blocks = rows.reshape(-1, nbytes)
        for at in {"Q6_K": (209,), "NVFP4": (0, 1, 2, 3), "IQ4_NL": (1,), "IQ4_XS": (1,)}.get(kind, (1, 3)):
            blocks[:, at] &= 0x2B  # float16 scales below 1, no NaN
    return {"rows": rows, "values": quants.dequantize(rows, qtype)}


GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")

#: name -> (maker of a seed, distributions whose versions are recorded)
MAKERS: dict[str, tuple[Callable[[int], Arrays], tuple[str, ...]]] = {
    "gptq": (gptq, ("gptqmodel", "torch")),
    "gptq_v2": (lambda seed: gptq(seed, version=2), ("gptqmodel", "torch")),
    "gptq_act_order": (lambda seed: gptq(seed, version=1, act_order=True), ("gptqmodel", "torch")),
    "awq": (awq, ("autoawq", "torch")),
    "compressed_tensors": (compressed_tensors, ("compressed-tensors", "torch")),
    "compressed_tensors_symmetric": (
        lambda seed: compressed_tensors(seed, symmetric=True, bfloat16=True), ("compressed-tensors", "torch"),
    ),
    "nvfp4": (nvfp4, ("compressed-tensors", "torch")),
    "nvfp4_torchao": (nvfp4_torchao, ("torchao", "torch")),
    "mxfp4_torchao": (mxfp4_torchao, ("torchao", "torch")),
    "nf4": (bnb, ("bitsandbytes", "torch")),
    "nf4_double": (lambda seed: bnb(seed, double=True), ("bitsandbytes", "torch")),
    "fp4": (lambda seed: bnb(seed, kind="fp4"), ("bitsandbytes", "torch")),
    "hqq": (hqq, ("hqq", "torch")),
    "hqq_integer": (lambda seed: hqq(seed, optimize=False), ("hqq", "torch")),
} | {f"ggml_{kind}": (lambda seed, kind=kind: ggml(seed, kind=kind), ("gguf",)) for kind in GGML}  # fmt: skip


def main(names: list[str]) -> None:
    """Writes NAME.npz for every name, or for all."""
    for name in names or MAKERS:
        maker, distributions = MAKERS[name]
        versions = {d: importlib.metadata.version(d) for d in distributions}
        arrays = maker(0)
        np.savez_compressed(HERE / f"{name}.npz", versions=np.array(json.dumps(versions)), **arrays)
        print(f"{name}: {', '.join(f'{d} {v}' for d, v in versions.items())}, {sorted(arrays)}")


if __name__ == "__main__":
    main(sys.argv[1:])
