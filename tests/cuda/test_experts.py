"""The expert layer's GEMMs on the GPU: the kernels' own source, emulated, against the CPU's op and float64."""

import numpy as np
import pytest
from emulator import emulate
from w4 import bf16, from_bf16, pack

import assay
from assay.ops.moe_experts import ACTIVATIONS

BLOCK_N = 256


class Layer:
    """Random experts: for the CPU, and each matrix in the GPU's order, end to end."""

    def __init__(self, experts, hidden, intermediate, group=32, symmetric=True, bias=False, seed=0, **options):
        rng = np.random.default_rng([seed, experts, hidden, intermediate])
        rows = 2 * intermediate if options.get("gated", True) else intermediate
        gate_up = rng.standard_normal((experts, rows, hidden)).astype(np.float32) / hidden**0.5
        down = rng.standard_normal((experts, hidden, intermediate)).astype(np.float32) / intermediate**0.5
        if bias:
            options["gate_up_bias"] = rng.standard_normal((experts, rows)).astype(np.float32)
            options["down_bias"] = rng.standard_normal((experts, hidden)).astype(np.float32)
        shift = np.float32(0 if symmetric else 0.02)
        groups = [group if k % group == 0 else k for k in (hidden, intermediate)]
        self.cpu = assay.quantize_experts(
            gate_up + shift, down + shift, groups[0], down_group_size=groups[1], symmetric=symmetric, **options
        )
        self.matrices = []
        for which in (0, 1):
            parts = [self.cpu.expert(e)[which] for e in range(experts)]
            packed = [pack(*p.unpack(), p.k) for p in parts]
            self.matrices.append((np.concatenate(packed), len(packed[0]), parts[0]))

    def weights(self, which):
        data, _, part = self.matrices[which]
        return {"data": data, "n": part.n, "k": part.k, "group_size": part.group_size, "symmetric": part.symmetric}


def align(ids, experts, block_m):
    """Sorted slots, experts of blocks and their number, as the GPU's sort leaves them: padded to the most there can be."""
    found = assay.moe_align(ids, experts, block_m)
    most = (ids.size + min(ids.size, experts) * (block_m - 1)) // block_m * block_m
    ordered, blocks = np.full(most, ids.size, np.int32), np.full(most // block_m, -1, np.int32)
    ordered[: found.num_tokens_post_padded] = found.sorted_token_ids
    blocks[: len(found.expert_ids)] = found.expert_ids
    return ordered, blocks, np.array([found.num_tokens_post_padded], np.int32), found


def quantize(rows, part, seed):
    """a8's codes and groups of float32 rows."""
    m, k = rows.shape
    padded, size = -(-k // 128) * 128, part.group_size
    codes, groups = np.zeros((max(m, 1), padded), np.int8), np.zeros((max(m, 1), k // size, 2), np.uint32)
    units = 1 if size >= k else padded // size
    emulate("assay_a8_quantize", m * -(-units // 8), {
        "a": rows, "lda": k, "m": m, "k": k, "group_size": size, "a_dtype": 0, "codes": codes, "groups": groups,
    }, seed=seed)  # fmt: skip
    return codes, groups


def run(layer, x, ids, weights, *, a16, block_m=16, cuts=(1, 1), on_input=False, seed=0, copy="late"):
    """The layer's output by its launches, and what the two GEMMs counted. x: float16, or uint16 for bfloat16; a8: float32."""
    shape = layer.cpu.shape
    if not ids.size:
        return np.zeros((0, shape.hidden), np.float32), []  # a launch of no blocks
    slots, top_k = ids.size, ids.shape[1]
    ordered, blocks, total, alignment = align(ids, shape.num_experts, block_m)
    if on_input:
        kind = {"float32": 0, "float16": 1, "uint16": 2}[x.dtype.name]
        rows = np.zeros((slots, shape.hidden), x.dtype)
        emulate("assay_moe_weigh", (slots, 1), {
            "x": x, "ldx": shape.hidden, "n": shape.hidden, "top_k": top_k, "topk_weights": weights, "out": rows,
            "ldo": shape.hidden, "dtype": kind, "out_dtype": kind,
        })  # fmt: skip
    else:
        rows = x
    ldh, ldy = -(-shape.intermediate // 8) * 8, -(-shape.hidden // 4) * 4
    hidden = np.zeros((slots, ldh), x.dtype if a16 else np.float32)
    y = np.full((slots, ldy), np.nan, np.float32)
    counted = []
    for which, (given, out) in enumerate(((rows, hidden), (hidden, y))):
        part = layer.matrices[which][2]
        lda, source, groups = given.shape[1], given, None
        if not a16:
            source, groups = quantize(np.ascontiguousarray(given[:, : part.k]), part, seed)
        columns, width = -(-part.n // BLOCK_N), -(-part.n // 32) * 32
        name = f"assay_moe_experts_{'w4a8' if not a16 else 'w4a16_f16' if x.dtype == np.float16 else 'w4a16_bf16'}_m{block_m}"
        counted.append(emulate(name + ("" if part.symmetric else "z"), (len(blocks), columns, cuts[which]), {
            "w": layer.weights(which), "expert_bytes": layer.matrices[which][1], "a": source, "a_groups": groups, "lda": lda,
            "aligned": int(lda % 8 == 0 and part.k % 8 == 0), "slots": slots,
            "slots_a_row": 1 if which or on_input else top_k, "down": which, "sorted_token_ids": ordered,
            "expert_ids": blocks, "num_tokens_post_padded": total, "bias": None if which else layer.cpu.gate_up_bias,
            "intermediate": shape.intermediate, "gated": shape.gated, "activation": ACTIVATIONS[shape.activation],
            "alpha": shape.alpha, "limit": shape.limit or np.inf, "out": out, "ldo": out.shape[1],
            "partials": np.full((cuts[which], slots, width), np.nan, np.float32),
            "arrivals": np.zeros(max(len(blocks) * columns, 1), np.uint32),
        }, seed=seed, copy=copy))  # fmt: skip
    out = np.full((len(x), shape.hidden), np.nan, np.float32)
    emulate("assay_moe_combine_1", (len(x), -(-shape.hidden // 128)), {
        "y": y, "ldy": ldy, "n": shape.hidden, "position": alignment.position, "by_slot": 1,
        "topk_weights": None if on_input else weights, "bias": layer.cpu.down_bias, "expert_ids": blocks,
        "block_size": block_m, "tokens": len(x), "top_k": top_k, "out": out, "ldo": shape.hidden,
    })  # fmt: skip
    return out, counted


def routing(tokens, top_k, experts, seed=0):
    """Distinct experts a token, some slots empty, weights."""
    rng = np.random.default_rng([seed, tokens, top_k])
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids[rng.random(ids.shape) < 0.15] = -1
    return ids, rng.random((tokens, top_k)).astype(np.float32)


def activations(tokens, hidden, dtype, seed=1):
    x = np.random.default_rng([seed, tokens]).standard_normal((tokens, hidden)).astype(np.float32)
    return x.astype(np.float16) if dtype == "f16" else bf16(x) if dtype == "bf16" else x


def check16(got, layer, x, ids, weights, on_input=False):
    """Against the CPU's a16 in float32: hidden units are rounded to x's type, 2^-11 or 2^-8 each, and so are weighed inputs; the
    error of an output is that of a sum of I products and so at most that part of sum |h| |w|, which a float64 run gives. Sums in
    another order add (H + I) 2^-24 of the same."""
    wide = from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float32)
    want = assay.moe_experts(wide, ids, weights, layer.cpu, a16=True, weights_on_input=on_input)
    shape = layer.cpu.shape
    rounding = 2.0 ** (-8 if x.dtype == np.uint16 else -11)
    bound = np.zeros(want.shape)
    for e in range(shape.num_experts):
        for t, j in zip(*np.nonzero(ids == e), strict=True):
            up, down = layer.cpu.expert(e)
            w = np.float64(weights[t, j])
            row = wide[t].astype(np.float64) * (w if on_input else 1)
            c_abs = np.abs(row) @ np.abs(up.dequantize().T.astype(np.float64))
            c = row @ up.dequantize().T.astype(np.float64)
            if layer.cpu.gate_up_bias is not None:
                c, c_abs = c + layer.cpu.gate_up_bias[e], c_abs + np.abs(layer.cpu.gate_up_bias[e])
            error = c_abs * ((shape.hidden + 4) * 2.0**-24 + (rounding if on_input else 0))
            if shape.gated:
                tiles, errors = c.reshape(-1, 2, 16), error.reshape(-1, 2, 16)
                g, u = (tiles[:, i].reshape(-1)[: shape.intermediate] for i in (0, 1))
                eg, eu = (errors[:, i].reshape(-1)[: shape.intermediate] for i in (0, 1))
                if shape.activation == "swiglu_oai":
                    u = u + 1
            else:
                g, u, eg, eu = c, np.ones_like(c), error, np.zeros_like(error)
            # |act(x)| <= |x| (relu2: x^2), and its slope is at most 1.2 (silu, gelu) or 2 |x| (relu2).
            size = g * g if shape.activation == "relu2" else np.abs(g)
            slope = 2 * np.abs(g) + eg if shape.activation == "relu2" else 1.2 * np.maximum(1, shape.alpha)
            h_error = slope * eg * np.abs(u) + size * eu + (rounding + 2.0**-20) * size * np.abs(u)
            down_abs = np.abs(down.dequantize().T.astype(np.float64))
            bias = 0 if layer.cpu.down_bias is None else np.abs(layer.cpu.down_bias[e])
            total = h_error @ down_abs + ((size * np.abs(u)) @ down_abs + bias) * (shape.intermediate + 8) * 2.0**-24
            bound[t] += total * (1 if on_input else w)
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= bound + 1e-30).all(), float(np.max(np.abs(got - want) / (bound + 1e-30)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_every_instance(dtype, block_m, symmetric):
    layer = Layer(4, 128, 96, symmetric=symmetric, bias=True)
    x, (ids, weights) = activations(21, 128, dtype), routing(21, 2, 4)
    got, _ = run(layer, x, ids, weights, a16=dtype != "f32", block_m=block_m, seed=block_m)
    if dtype == "f32":
        np.testing.assert_array_equal(got, assay.moe_experts(x, ids, weights, layer.cpu))
    else:
        check16(got, layer, x, ids, weights)


SHAPES = [(1, 1, 32, 32, 1, 32), (3, 5, 64, 40, 2, 32), (0, 4, 64, 64, 2, 64), (1, 8, 96, 300, 8, 32), (9, 3, 260, 33, 3, 128),
          (40, 2, 128, 128, 1, 128), (5, 16, 37, 20, 4, 32), (2, 6, 512, 272, 6, 64)]  # fmt: skip


@pytest.mark.parametrize(("tokens", "experts", "hidden", "intermediate", "top_k", "group"), SHAPES)
def test_shapes(tokens, experts, hidden, intermediate, top_k, group):
    """Rows and columns with tails, K that no vector load fits, k = E, no tokens, one expert, one hidden group."""
    layer = Layer(experts, hidden, intermediate, group, symmetric=tokens % 2 == 0, bias=tokens % 3 == 0)
    ids, weights = routing(tokens, top_k, experts)
    for dtype in ("f16", "bf16"):
        x = activations(tokens, hidden, dtype)
        check16(run(layer, x, ids, weights, a16=True, seed=tokens)[0], layer, x, ids, weights)
    x = activations(tokens, hidden, "f32")
    got, _ = run(layer, x, ids, weights, a16=False, seed=tokens)
    np.testing.assert_array_equal(got, assay.moe_experts(x, ids, weights, layer.cpu))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_gated_and_not(activation, bias):
    for gated in (True, False):
        if activation == "swiglu_oai" and not gated:
            continue
        options = {"limit": 0.7} if bias else {}
        layer = Layer(3, 64, 80, activation=activation, gated=gated, bias=bias, **options)
        x, (ids, weights) = activations(6, 64, "f32"), routing(6, 2, 3)
        got, _ = run(layer, x, ids, weights, a16=False)
        np.testing.assert_array_equal(got, assay.moe_experts(x, ids, weights, layer.cpu))
        if not bias:
            x = activations(6, 64, "f16")
            check16(run(layer, x, ids, weights, a16=True)[0], layer, x, ids, weights)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_weights_on_the_input(dtype):
    layer = Layer(4, 64, 48, bias=True)
    x, (ids, weights) = activations(7, 64, dtype), routing(7, 2, 4)
    got, _ = run(layer, x, ids, weights, a16=dtype != "f32", on_input=True)
    if dtype == "f32":
        np.testing.assert_array_equal(got, assay.moe_experts(x, ids, weights, layer.cpu, weights_on_input=True))
    else:
        check16(got, layer, x, ids, weights, on_input=True)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_cuts_of_k_give_one_result_in_any_schedule(dtype):
    layer = Layer(3, 640, 512, bias=True)
    x, (ids, weights) = activations(5, 640, dtype), routing(5, 2, 3)
    whole, _ = run(layer, x, ids, weights, a16=dtype == "f16")
    results = [
        run(layer, x, ids, weights, a16=dtype == "f16", cuts=(3, 2), seed=seed, copy=copy)[0]
        for seed, copy in ((0, "late"), (5, "random"), (6, "early"))
    ]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    np.testing.assert_allclose(results[0], whole, rtol=0, atol=0.02 * np.abs(whole).max())
    if dtype == "f16":
        check16(results[0], layer, x, ids, weights)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_few_threads_cut_k(dtype):
    """What ThreadSanitizer, a fiber a thread, has room for."""
    layer = Layer(2, 256, 64, bias=True)
    x, ids, weights = activations(2, 256, dtype), np.array([[1], [0]], np.int32), np.ones((2, 1), np.float32)
    got, _ = run(layer, x, ids, weights, a16=dtype == "f16", cuts=(2, 1), seed=1)
    if dtype == "f16":
        check16(got, layer, x, ids, weights)
    else:
        want = assay.moe_experts(x, ids, weights, layer.cpu)
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_a_token_has_the_same_bits_in_any_batch(dtype):
    layer = Layer(4, 128, 64, symmetric=False)
    x, (ids, weights) = activations(40, 128, dtype), routing(40, 2, 4)
    whole, _ = run(layer, x, ids, weights, a16=dtype != "f32", block_m=32)
    for tokens in (slice(0, 1), slice(7, 12), slice(39, 40)):
        part, _ = run(layer, x[tokens], ids[tokens], weights[tokens], a16=dtype != "f32", seed=3)
        np.testing.assert_array_equal(part, whole[tokens])


def test_one_expert_takes_all_and_nobody_takes_any():
    layer = Layer(5, 64, 64)
    x = activations(40, 64, "f16")
    weights = np.ones((40, 1), np.float32)
    got, counted = run(layer, x, np.full((40, 1), 3, np.int32), weights, a16=True)
    check16(got, layer, x, np.full((40, 1), 3, np.int32), weights)
    got, counted = run(layer, x, np.full((40, 1), -1, np.int32), weights, a16=True)
    assert (got == 0).all()
    assert all(c.mma == 0 and c.st_bytes == 0 for c in counted)


def test_nan_stays_with_its_token():
    layer = Layer(3, 64, 64)
    for dtype in ("f16", "f32"):
        x, (ids, weights) = activations(6, 64, dtype), routing(6, 2, 3, seed=9)
        ids[2] = [0, 1]
        clean, _ = run(layer, x, ids, weights, a16=dtype == "f16")
        x[2, 5] = np.nan
        got, _ = run(layer, x, ids, weights, a16=dtype == "f16")
        assert np.isnan(got[2]).all()
        others = np.arange(6) != 2
        np.testing.assert_array_equal(got[others], clean[others])


def test_weights_are_read_once_a_block_of_rows_and_banks_do_not_conflict():
    layer = Layer(4, 256, 128, group=128)
    x, weights = activations(8, 256, "f16"), np.ones((8, 2), np.float32)
    ids = np.tile(np.array([[1, 3]], np.int32), (8, 1))
    _, counted = run(layer, x, ids, weights, a16=True)
    for which, one in enumerate(counted):
        _, expert_bytes, part = layer.matrices[which]
        columns = -(-part.n // BLOCK_N)
        assert one.async_bytes == 2 * expert_bytes + columns * 2 * 8 * part.k * 2
        assert one.ldmatrix_wavefronts == 4 * one.ldmatrix
        assert one.shared_wavefronts <= 4 * one.shared_accesses
        assert one.st_bytes == 16 * (2 * 128 if which == 0 else 4 * 256)
