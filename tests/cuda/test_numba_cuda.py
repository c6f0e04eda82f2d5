"""The Numba twins for GPUs of routing and the INT4 GEMM, in Numba's simulator. A process of its own, for Numba reads
NUMBA_ENABLE_CUDASIM when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from w4 import Weights, bf16, from_bf16

import assay
import test_moe_routers as routers

pytest.importorskip("numba", reason="the twins are Numba's")

TESTS = Path(__file__).resolve().parents[1]
SCORES = {"softmax": 0, "softmax_topk": 0, "sigmoid": 1, "sqrtsoftplus": 2, "none": 3}


def route(x, top_k, renormalize=None, *, dtype=0, scoring="softmax", bias=None, n_group=1, topk_group=1, group_score=None,
          routed_scaling_factor=1.0, num_shared=0, shared_weight=1.0):  # fmt: skip
    from assay.jit import cuda_moe

    weights, ids = (
        np.full((len(x), top_k + num_shared), 9, np.float32),
        np.full((len(x), top_k + num_shared), 9, np.int32),
    )
    status = np.full(len(x), 9, np.int32)
    top2 = group_score == "top2" or (group_score is None and bias is not None)
    renormalize = scoring != "none" if renormalize is None or scoring == "softmax_topk" else renormalize
    cuda_moe.route(x, dtype, SCORES[scoring], renormalize, bias, n_group, topk_group, top2, routed_scaling_factor, top_k,
                   shared_weight, weights, ids, status)  # fmt: skip
    return weights, ids, status


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def simulated_routing():
    for name in ("deepseek_v3", "deepseek_v4", "softmax_bias_all", "odd", "logits", "shared_wide", "all"):
        x, top_k, options = routers.case(name, 6, ties=True)
        routers.poison(x)
        assert_same(route(x, top_k, **options), assay.moe_route(x, top_k, **options))
    x, top_k, options = routers.case("llama4", 3)
    half = bf16(x)
    assert_same(route(half, top_k, dtype=2, **options), assay.moe_route(from_bf16(half), top_k, **options))
    half = x.astype(np.float16)
    assert_same(route(half.view(np.uint16), top_k, dtype=1, **options), assay.moe_route(half, top_k, **options))
    bias = np.zeros(16, np.float32)
    for bad, status in ((np.inf, 3), (np.nan, 1)):
        bias[11] = bad
        weights, ids, found = route(x, 2, bias=bias)
        assert (found == status).all()
        assert (ids == -1).all()
        assert (weights == 0).all()
    weights, ids, found = route(x, 2, bias=np.full(16, -np.inf, np.float32))
    assert (found == 0).all()
    assert (ids == -1).all()
    assert (weights == 0).all()
    assert route(x[:0], 2)[1].shape == (0, 2)


def simulated_gemm():
    from assay.jit import cuda_int4

    for m, n, k, group_size, symmetric in ((3, 40, 64, 32, True), (9, 33, 37, 37, False), (1, 8, 128, 64, False)):
        w = Weights(n, k, group_size, symmetric)
        a = np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)
        for dtype, given, values in ((0, a, a), (1, a.astype(np.float16).view(np.uint16), a.astype(np.float16)),
                                     (2, bf16(a), from_bf16(bf16(a)))):  # fmt: skip
            c = np.full((m, n), np.nan, np.float32)
            cuda_int4.w4a16_gemm(w.packed, n, k, group_size, symmetric, given, dtype, c)
            exact = values.astype(np.float64) @ w.values.astype(np.float64).T
            # K products and sums of a group, then two roundings a group.
            bound = (2 * k + 2 * k // group_size) * 2.0**-24 * (np.abs(values.astype(np.float64)) @ np.abs(w.values.T))
            assert (np.abs(c - exact) <= bound + 1e-30).all()
    cuda_int4.w4a16_gemm(w.packed, n, k, group_size, symmetric, a[:0], 0, c[:0])


@pytest.mark.parametrize("what", ["simulated_routing", "simulated_gemm"])
def test_the_simulated_twin(what):
    code = f"import test_numba_cuda; test_numba_cuda.{what}()"
    path = os.pathsep.join([str(Path(__file__).parent), str(TESTS)])
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
