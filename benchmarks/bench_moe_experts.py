"""The expert layer on real models' shapes, routed evenly, by a power law, and alike from token to token."""

import numpy as np
import pytest

import assay
from assay.ops import probe
from moe_cases import LAYERS, ROUTINGS, random_experts, router_logits
from peers.roofs import dram_read

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
#: Routings that a case goes through in turn, so that small batches do not find their experts in the cache.
TURNS = 6


OPS = ("moe_experts",)


def test_point(point, time_point):
    """The points of a calibration."""
    time_point(point)


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    return request.param, random_experts(request.param, np.random.default_rng(0))


def unfused(x, ids, weights, packed):
    """One token through its experts by GEMMs of their own."""
    out = np.zeros(packed.shape.hidden, np.float32)
    for e, w in zip(ids, weights, strict=True):
        up, down = packed.expert(e)
        gate, ups = assay.w4a8_gemm(x[None], up).reshape(-1, 2, 16).transpose(1, 0, 2).reshape(2, -1)
        h = (gate / (1 + np.exp(-gate)) * ups)[: packed.shape.intermediate]
        out += w * assay.w4a8_gemm(h[None], down)[0]
    return out


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_moe_experts(benchmark, layer, tokens, routing, threads, arena):
    name, packed = layer
    experts, top_k, hidden, intermediate = LAYERS[name]
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    routes = [assay.moe_route(router_logits(experts, top_k, 1, tokens, routing, rng), top_k) for _ in range(TURNS)]
    out = np.empty_like(x)
    want = unfused(x[0], routes[0].topk_ids[0], routes[0].topk_weights[0], packed)
    first = assay.moe_experts(x, routes[0].topk_ids, routes[0].topk_weights, packed)[0]
    np.testing.assert_allclose(first, want, atol=0.02 * np.abs(want).max())  # a hidden code may round the other way
    bytes_read = []

    def call(turn=[0]):  # noqa: B006
        route = routes[turn[0] % TURNS]
        turn[0] += 1
        _, cost = assay.moe_experts(
            x, route.topk_ids, route.topk_weights, packed, out, num_threads=threads, return_cost=True
        )
        bytes_read.append(cost.weight_bytes)

    benchmark.group = f"moe_experts {name}, {tokens} tokens"
    benchmark.pedantic(call, rounds=2 * TURNS if tokens <= 64 else TURNS, warmup_rounds=1)
    median_s = benchmark.stats.stats.median
    bandwidth = dram_read(arena, threads)
    ops = 6 * tokens * top_k * hidden * intermediate
    benchmark.extra_info.update(
        routing=routing,
        threads=threads,
        weight_bytes=float(np.mean(bytes_read)),
        ops=ops,
        percent_of_read=100 * float(np.mean(bytes_read)) / median_s / bandwidth,
        percent_of_int8=100 * ops / median_s / probe.int8_peak(threads, 0.05),
    )
