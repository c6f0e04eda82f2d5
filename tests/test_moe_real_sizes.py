"""Layers of real models at their real sizes, random weights, against float64 within the derived bound."""

import numpy as np
import pytest

import assay
from assay.ops._gemm import aligned_empty
from moe_bound import bounded_layer

#: E, k, H, I, tokens in the call, tokens that are checked. Every checked token costs k experts' weights in float64.
LAYERS = {"mixtral": (8, 2, 4096, 14336, 40, 1), "qwen3_30b_a3b": (128, 8, 2048, 768, 300, 1)}
GROUP = 32


def random_experts(experts, hidden, intermediate, rng):
    """Random codes and scales, expert by expert, so that little more than the packed layer is held."""

    def packed(n, k):
        every = None
        for e in range(experts):
            scales = rng.uniform(0.1, 0.4, (n, k // GROUP)) / np.sqrt(k)
            one = assay.pack(rng.integers(0, 256, (n, k // 2), dtype=np.uint8), scales.astype(np.float16)).data
            every = aligned_empty(experts * one.nbytes).reshape(experts, -1) if every is None else every
            every[e] = one
        return every

    shape = assay.ExpertsShape(experts, hidden, intermediate)
    up, down = packed(2 * intermediate, hidden), packed(hidden, intermediate)
    return assay.PackedExperts(shape, up, (GROUP, True), None, down, (GROUP, True), None)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_real_size_is_within_the_bound(name):
    experts, top_k, hidden, intermediate, tokens, checked = LAYERS[name]
    rng = np.random.default_rng(experts)
    packed = random_experts(experts, hidden, intermediate, rng)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    route = assay.moe_route(rng.standard_normal((tokens, experts)).astype(np.float32), top_k)
    few = slice(0, checked)
    ids, weights = route.topk_ids[few], route.topk_weights[few]
    for a16 in (False, True):
        got = assay.moe_experts(x, route.topk_ids, route.topk_weights, packed, a16=a16)[few]
        want, bound = bounded_layer(x[few], ids, weights, packed, a16)
        assert (np.abs(got - want) <= bound).all()
        # Errors do not all add up: a second line.
        rms = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
        assert rms < (1e-5 if a16 else 0.02)
        alone = assay.moe_experts(x[few], ids, weights, packed, a16=a16)
        np.testing.assert_array_equal(alone, got)
