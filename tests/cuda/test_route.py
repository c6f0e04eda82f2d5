"""Routing on the GPU: the kernel's own source, emulated, has the bits of the CPU's op."""

import numpy as np
import pytest
from emulator import emulate, kernels

import assay
import test_moe_routers as routers
from bf16 import BFloat16

SIZES = [64, 128, 256, 512, 2048]
SCORES = {"softmax": 0, "softmax_topk": 0, "sigmoid": 1, "sqrtsoftplus": 2, "none": 3}
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


def launch(x, top_k, renormalize=None, *, scoring="softmax", bias=None, n_group=1, topk_group=1, group_score=None,
           routed_scaling_factor=1.0, num_shared=0, shared_weight=1.0, dtype=None, ld=None, least=0, seed=0):  # fmt: skip
    """(weights, ids, status) by the kernel for at least `least` experts, and what the launch counted."""
    tokens, experts = x.shape
    if renormalize is None or scoring == "softmax_topk":
        renormalize = scoring != "none"
    size = next(s for s in SIZES if s >= max(experts, least))
    width = top_k + num_shared
    weights, ids = np.full((tokens, width), 7, np.float32), np.full((tokens, width), 7, np.int32)
    status = np.full(tokens, 7, np.int32)
    counted = emulate(f"assay_moe_route_{size}", -(-tokens // 4), {
        "logits": np.ascontiguousarray(x) if ld is None else x.base, "dtype": DTYPES[dtype or x.dtype.name],
        "scoring": SCORES[scoring], "ld": ld or experts, "tokens": tokens, "num_experts": experts, "top_k": top_k,
        "bias": bias, "n_group": n_group, "topk_group": topk_group,
        "group_top2": group_score == "top2" or (group_score is None and bias is not None), "renormalize": renormalize,
        "scaling": routed_scaling_factor, "shared_weight": shared_weight, "num_shared": num_shared,
        "topk_weights": weights, "topk_ids": ids, "status": status,
    }, smem=4 * 4 * (size + n_group) if n_group > 1 or size == 2048 else 0, seed=seed)  # fmt: skip
    return (weights, ids, status), counted


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), np.asarray(b).view(np.uint32), err_msg=name)


@pytest.mark.parametrize("name", [n for n in routers.ROUTERS if n != "past_the_copy"])
def test_every_router_has_the_bits_of_the_cpu(name):
    for seed, ties in enumerate((False, True)):
        x, top_k, options = routers.case(name, 11, ties=ties)
        routers.poison(x)
        got, _ = launch(x, top_k, seed=seed, **options)
        assert_same(got, assay.moe_route(x, top_k, **options))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (7, 7), (31, 3), (32, 32), (33, 33), (63, 40), (64, 8),
                                                (65, 8), (128, 128), (129, 9), (256, 8), (500, 70), (513, 2), (2048, 8)])  # fmt: skip
def test_every_size_has_the_bits_of_the_cpu(experts, top_k, renormalize):
    for ties in (False, True):
        x = np.random.default_rng([experts, ties]).standard_normal((5, experts)) * 3
        x = (np.round(x) if ties else x).astype(np.float32)
        got, _ = launch(x, top_k, renormalize, seed=ties)
        assert_same(got, assay.moe_route(x, top_k, renormalize))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_every_instance_routes_alike(size, scoring):
    """A few experts by the kernel for many: the keys past the last are never chosen, in registers and in shared memory."""
    rng = np.random.default_rng(size)
    x = (rng.standard_normal((5, 48)) * 3).astype(np.float32)
    bias = rng.standard_normal(48).astype(np.float32)
    for options in ({}, {"bias": bias}, {"bias": bias, "n_group": 6, "topk_group": 2}, {"n_group": 3, "topk_group": 1}):
        for renormalize in {scoring != "none", False}:
            got, _ = launch(x, 7, renormalize, scoring=scoring, least=size, **options)
            assert_same(got, assay.moe_route(x, 7, renormalize, scoring=scoring, **options))


@pytest.mark.parametrize("n_group", [1, 2, 3, 8, 16, 20, 48, 60, 240])
@pytest.mark.parametrize("top2", ["max", "top2"])
def test_groups_of_every_size(n_group, top2):
    """One lane a group, several, and more groups than lanes; ties among groups and a group without two experts."""
    rng = np.random.default_rng(n_group)
    x = np.round(rng.standard_normal((6, 240)) * 2).astype(np.float32)
    x[1, : 240 // n_group] = -np.inf
    x[2, 1 : 240 // n_group] = -np.inf
    bias = np.round(rng.standard_normal(240)).astype(np.float32)
    topk_group = max(1, n_group // 2)
    for given in (None, bias):
        options = {"bias": given, "n_group": n_group, "topk_group": topk_group, "group_score": top2, "scoring": "none"}
        top_k = min(9, topk_group * (240 // n_group))
        got, _ = launch(x, top_k, seed=n_group, **options)
        assert_same(got, assay.moe_route(x, top_k, **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "llama4", "odd"])
def test_half_precision_logits(dtype, name):
    x, top_k, options = routers.case(name, 5)
    x[1, 0] = np.nan
    x[2, 1] = np.inf
    x[3, 1:] = -np.inf
    half = x.astype(np.float16) if dtype == "float16" else BFloat16(x)
    bits = half.view(np.uint16) if dtype == "float16" else half.bits
    got, _ = launch(bits, top_k, dtype=dtype, **options)
    assert_same(got, assay.moe_route(half, top_k, **options))


def test_extreme_logits_and_zeros_of_either_sign():
    x = np.array([[3e38, -3e38, 0, 1e-42], [-200, 0, -87.5, -86], [0.0, -0.0, 1, 1], [-0.0, 0.0, -0.0, -1]], np.float32)
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus", "none"):
        got, _ = launch(x, 4, scoring=scoring)
        assert_same(got, assay.moe_route(x, 4, scoring=scoring))


def test_strided_rows_and_no_tokens():
    wide = np.random.default_rng(0).standard_normal((5, 91)).astype(np.float32)
    got, _ = launch(wide[:, :64], 4, ld=91)
    assert_same(got, assay.moe_route(np.ascontiguousarray(wide[:, :64]), 4))


def test_a_bias_that_is_none_is_a_status_of_every_row():
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    bias = np.zeros(40, np.float32)
    for bad, status in ((np.inf, 3), (np.nan, 1)):
        bias[37] = bad
        (weights, ids, found), _ = launch(x, 4, bias=bias)
        assert (found == status).all()
        assert (ids == -1).all()
        assert (weights == 0).all()
    bias[:] = -np.inf
    got, _ = launch(x, 4, bias=bias)
    assert (got[1] == -1).all()
    assert (got[0] == 0).all()


def test_a_row_has_the_same_bits_in_any_batch_and_schedule():
    x, top_k, options = routers.case("deepseek_v3", 9)
    whole, _ = launch(x, top_k, **options)
    for seed in (1, 2, 3):
        again, _ = launch(x[4:5], top_k, seed=seed, **options)
        for a, b in zip(again, whole, strict=True):
            np.testing.assert_array_equal(a, b[4:5])


def test_reads_each_logit_once_and_no_more_than_it_needs():
    tokens, experts, top_k = 8, 256, 8
    x = np.random.default_rng(1).standard_normal((tokens, experts)).astype(np.float32)
    _, counted = launch(x, top_k)
    assert counted.ldg_bytes == x.nbytes + tokens * top_k * 4  # and the chosen logits again, from L1
    assert counted.st_bytes == tokens * (2 * top_k + 1) * 4
    assert counted.barriers == 0
    assert counted.shared_accesses == 0
    _, grouped = launch(x, top_k, scoring="sigmoid", n_group=8, topk_group=4)
    assert grouped.shared_wavefronts <= 1.5 * grouped.shared_accesses


def test_the_table_says_how_much_shared_memory_each_instance_needs():
    for size in SIZES:
        assert kernels()[f"assay_moe_route_{size}"].smem_bytes == 4 * 4 * 2 * size
