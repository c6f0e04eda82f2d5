"""A mixture's ops on a GPU by the public functions, plans and launcher included."""

import numpy as np
import pytest
from w4 import bf16, from_bf16

import assay
import test_moe_routers as routers
from assay.ops.moe import RouteResult


def on(gpu, array, dtype=None):
    return gpu.to_device(array, dtype=dtype)


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(a.numpy(), b, err_msg=name)


@pytest.mark.parametrize("name", [n for n in routers.ROUTERS if n != "past_the_copy"])
def test_routes_as_the_cpu(gpu, name):
    x, top_k, options = routers.case(name, 7)
    routers.poison(x)
    want = assay.moe_route(x, top_k, **options)
    device = dict(options)
    if options.get("bias") is not None:
        device["bias"] = on(gpu, options["bias"])
    assert_same(assay.moe_route(on(gpu, x), top_k, **device), want)
    half = bf16(x)
    want = assay.moe_route(from_bf16(half), top_k, **options)
    assert_same(assay.moe_route(on(gpu, half, "bfloat16"), top_k, **device), want)


def test_routes_into_given_arrays_no_tokens_and_a_graph(gpu):
    x = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    want = assay.moe_route(x, 3, num_shared=1)
    logits = on(gpu, x)
    out = (gpu.empty((9, 4)), gpu.empty((9, 4), "int32"), gpu.empty((9,), "int32"))
    got = assay.moe_route(logits, 3, num_shared=1, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert_same(got, want)
    empty = assay.moe_route(gpu.empty((0, 40)), 3)
    assert empty.topk_ids.numpy().shape == (0, 3)
    stream = gpu.Stream()
    for array in out:
        array.fill(255)
    with stream.capture() as graph:
        assay.moe_route(logits, 3, num_shared=1, out=out, stream=stream)
    for values in (x, -x):
        logits.copy_from(values)
        gpu.synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_same(out_of(out), assay.moe_route(values, 3, num_shared=1))


def out_of(arrays):
    return RouteResult(*arrays)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 8), (1, 8, 64), (300, 4, 17), (700, 6, 160), (40, 3, 3000)]
)
@pytest.mark.parametrize("block_size", [1, 16])
def test_sorts_and_combines_as_the_cpu(gpu, tokens, top_k, experts, block_size):
    """One launch, three with cells in shared memory, and three with cells in the workspace."""
    rng = np.random.default_rng([tokens, experts])
    ids = rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int32)
    want = assay.moe_align(ids, experts, block_size)
    got = assay.moe_align(on(gpu, ids), experts, block_size)
    total, slots = int(got.num_tokens_post_padded.numpy()[0]), ids.size
    assert total == want.num_tokens_post_padded
    ordered, blocks = got.sorted_token_ids.numpy(), got.expert_ids.numpy()
    np.testing.assert_array_equal(ordered[:total], want.sorted_token_ids)
    np.testing.assert_array_equal(blocks[: total // block_size], want.expert_ids)
    assert (ordered[total:] == slots).all()
    assert (blocks[total // block_size :] == -1).all()
    np.testing.assert_array_equal(got.position.numpy(), want.position)
    np.testing.assert_array_equal(got.counts.numpy(), want.counts)
    y = rng.standard_normal((len(ordered), 36)).astype(np.float32)
    weights = rng.random(ids.shape).astype(np.float32)
    combined = assay.moe_unpermute(on(gpu, y), got, on(gpu, weights)).numpy()
    np.testing.assert_array_equal(combined, assay.moe_unpermute(y[:total], want, weights))


def test_sorts_with_an_expert_map(gpu):
    ids = np.random.default_rng(3).integers(0, 8, (50, 2)).astype(np.int32)
    table = np.array([-1, 2, -1, 0, 1, -1, -1, 3], np.int32)
    want = assay.moe_align(ids, 8, 4, table)
    for local in (None, 4):
        got = assay.moe_align(on(gpu, ids), 8, 4, on(gpu, table), num_local_experts=local)
        total = int(got.num_tokens_post_padded.numpy()[0])
        np.testing.assert_array_equal(got.sorted_token_ids.numpy()[:total], want.sorted_token_ids)
        np.testing.assert_array_equal(got.position.numpy(), want.position)
        np.testing.assert_array_equal(got.counts.numpy()[:4], want.counts)
        assert got.counts.shape == (local or 8,)
    fewer = assay.moe_align(ids, 8, 4, table, num_local_experts=2)
    np.testing.assert_array_equal(fewer.position >= 0, np.isin(ids, [3, 4]))


def layer_of(experts, hidden, intermediate, **options):
    rng = np.random.default_rng([experts, hidden])
    gate_up = rng.standard_normal((experts, 2 * intermediate, hidden)).astype(np.float32) / hidden**0.5
    down = rng.standard_normal((experts, hidden, intermediate)).astype(np.float32) / intermediate**0.5
    down_group = 32 if intermediate % 32 == 0 else intermediate
    return assay.quantize_experts(gate_up, down, 32, down_group_size=down_group, **options)


def tokens_of(tokens, hidden, experts, top_k):
    rng = np.random.default_rng(tokens)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    return rng.standard_normal((tokens, hidden)).astype(np.float32), ids, rng.random((tokens, top_k)).astype(np.float32)


@pytest.mark.parametrize("tokens", [0, 1, 9, 70, 300])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_on_codes_have_the_bits_of_the_cpu(gpu, tokens, symmetric):
    """Without cuts in K: small hidden sizes have none."""
    bias = {"gate_up_bias": np.full((4, 96), 0.1, np.float32), "down_bias": np.full((4, 64), -0.2, np.float32)}
    layer = layer_of(4, 64, 48, symmetric=symmetric, **(bias if tokens % 2 else {}))
    x, ids, weights = tokens_of(tokens, 64, 4, 2)
    on_device = layer.to_device()
    for on_input in (False, True):
        got = assay.moe_experts(on(gpu, x), on(gpu, ids), on(gpu, weights), on_device, weights_on_input=on_input)
        want = assay.moe_experts(x, ids, weights, layer, weights_on_input=on_input)
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("tokens", [1, 20, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_at_their_own_precision(gpu, tokens, dtype):
    layer = layer_of(3, 512, 512, symmetric=False)
    x, ids, weights = tokens_of(tokens, 512, 3, 2)
    half = x.astype(np.float16) if dtype == "float16" else bf16(x)
    wide = half.astype(np.float32) if dtype == "float16" else from_bf16(half)
    got = assay.moe_experts(on(gpu, half, dtype), on(gpu, ids), on(gpu, weights), layer.to_device(), a16=True)
    want = assay.moe_experts(wide, ids, weights, layer, a16=True)
    # Hidden units are rounded once, 2^-11 or 2^-8 each and independently: a sum of 512 products errs by some sqrt(512) of
    # them where it is the size of sqrt(512) itself. test_experts.py has the bound; six deviations here.
    np.testing.assert_allclose(
        got.numpy(), want, rtol=0, atol=6 * 2.0 ** (-12 if dtype == "float16" else -9) * np.abs(want).max()
    )


def test_a_token_has_the_same_bits_in_any_batch_and_in_a_graph(gpu):
    layer = layer_of(4, 1024, 64)
    x, ids, weights = tokens_of(40, 1024, 4, 2)
    half, on_device = x.astype(np.float16), layer.to_device()

    def run(rows):
        return assay.moe_experts(
            on(gpu, half[rows]), on(gpu, ids[rows]), on(gpu, weights[rows]), on_device, a16=True
        ).numpy()

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(5, 23)):
        np.testing.assert_array_equal(run(rows), whole[rows])
    a, slots, w, out = on(gpu, half), on(gpu, ids), on(gpu, weights), gpu.empty((40, 1024))
    stream = gpu.Stream()
    assay.moe_experts(a, slots, w, on_device, out, a16=True, stream=stream)
    with stream.capture() as graph:
        assay.moe_experts(a, slots, w, on_device, out, a16=True, stream=stream)
    out.fill(255)
    gpu.synchronize()
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(out.numpy(), whole)


def test_experts_with_a_map(gpu):
    layer = layer_of(3, 64, 32)
    x, ids, weights = tokens_of(12, 64, 8, 3)
    table = np.array([-1, 2, -1, 0, 1, -1, -1, -1], np.int32)
    got = assay.moe_experts(on(gpu, x), on(gpu, ids), on(gpu, weights), layer.to_device(), expert_map=on(gpu, table))
    np.testing.assert_array_equal(got.numpy(), assay.moe_experts(x, ids, weights, layer, expert_map=table))


def test_bad_arguments_say_got_and_wanted(gpu):
    x = on(gpu, np.zeros((3, 8), np.float32))
    host = np.zeros((3, 8), np.float32)
    layer = layer_of(2, 32, 32)
    tokens, ids, weights = (on(gpu, a) for a in tokens_of(3, 32, 2, 2))
    cases = [
        (ValueError, "at most 2048 experts on a GPU, got 2049", lambda: assay.moe_route(gpu.empty((1, 2049)), 2)),
        (ValueError, r"top_k: expected 1..E = 1..8, got 9", lambda: assay.moe_route(x, 9)),
        (TypeError, "bias: expected an array on the GPU", lambda: assay.moe_route(x, 2, bias=np.zeros(8, np.float32))),
        (ValueError, r"bias: expected \[E\] = \[8\], got \[7\]", lambda: assay.moe_route(x, 2, bias=gpu.empty((7,)))),
        (ValueError, "backend: expected 'c' or 'numba'", lambda: assay.moe_route(x, 2, backend="reference")),
        (TypeError, "out: expected", lambda: assay.moe_route(x, 2, out=x)),
        (ValueError, "topk_weights: expected shape", lambda: assay.moe_route(x, 2, out=(gpu.empty((3, 3)), None, None))),
        (TypeError, "topk_ids: expected int32, got float32", lambda: assay.moe_align(x, 8)),
        (ValueError, "num_local_experts: expected at least 0", lambda: assay.moe_align(host.view(np.int32), 8, num_local_experts=3)),
        (TypeError, "experts: expected DeviceExperts", lambda: assay.moe_experts(tokens, ids, weights, layer)),
        (TypeError, "x: expected float16 or bfloat16, got float32",
         lambda: assay.moe_experts(tokens, ids, weights, layer.to_device(), a16=True)),
        (TypeError, "topk_ids: expected an array on the GPU",
         lambda: assay.moe_experts(tokens, ids.numpy(), weights, layer.to_device())),
        (ValueError, "num_shared, return_cost", lambda: assay.moe_experts(tokens, ids, weights, layer.to_device(), num_shared=1)),
        (ValueError, "topk_weights: expected", lambda: assay.moe_experts(tokens, ids, gpu.empty((3, 1)), layer.to_device())),
        (TypeError, "experts: expected PackedExperts", lambda: assay.moe_experts(
            tokens.numpy(), ids.numpy(), weights.numpy(), layer.to_device())),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("uncompiled", [False, True])
def test_the_twin_stands_in_where_no_kernel_is_compiled_for_the_gpu(gpu, monkeypatch, uncompiled):
    """What is dispatched, not what the twins compute: tests/cuda/test_numba_cuda.py has that."""
    from assay.cuda import _images, _twin, gemm, moe

    seen = []

    def no_image(*_):
        raise _images.CompilerMissingError("this build carries no code")

    class Twin:
        @staticmethod
        def route(*args):
            seen.append(args)

        w4a16_gemm = route

    for module in (moe, gemm):
        monkeypatch.setattr(module, "for_numba", lambda handle, *tensors: ["stream", *tensors])
    monkeypatch.setattr(_twin, "import_module", lambda name: seen.append(name) or Twin)
    x = on(gpu, np.zeros((3, 8), np.float32))
    if uncompiled:
        monkeypatch.setattr(_images, "find", no_image)
        a = on(gpu, np.zeros((2, 32), np.float16))
        q, scales = np.zeros((8, 16), np.uint8), np.ones((8, 1), np.float16)
        assay.w4a16_gemm(a, assay.pack(q, scales).to_device())
        assert seen.pop(0) == "assay.jit.cuda_int4"
        packed, n, k, group_size, symmetric, rows, dtype, c, stream = seen.pop(0)
        assert (n, k, group_size, symmetric, rows.shape, dtype, c.shape, stream) == (
            8,
            32,
            32,
            True,
            (2, 32),
            1,
            (2, 8),
            "stream",
        )
        assert packed.dtype == "uint8"
    assay.moe_route(x, 2, backend="c" if uncompiled else "numba")
    assert seen[0] == "assay.jit.cuda_moe"
    logits, dtype, scoring, renormalize, bias, *_, weights, ids, status, stream = seen[1]
    assert (logits.shape, dtype, scoring, renormalize, bias, stream) == ((3, 8), 0, 0, True, None, "stream")
    assert (weights.dtype, ids.dtype, status.dtype, ids.shape) == ("float32", "int32", "int32", (3, 2))

    def absent(name):
        raise ImportError("no numba_cuda")

    monkeypatch.setattr(_twin, "import_module", absent)
    with pytest.raises(assay.UnsupportedError, match=r"pip install 'assay\[numba-cuda\]'"):
        assay.moe_route(x, 2, backend="c" if uncompiled else "numba")
