"""MoE routing: every variant against the reference, ties, masks, poisoned rows, and the same bits in any batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from bf16 import BFloat16

OP = "moe_route"

# (E, k): one expert, k = E, multiples of 8 up to 32 (tokens by eights), chunks of 16 and groups of 128 and 256 less one,
# exact, plus one, beyond the stack's copy.
SIZES = [(1, 1), (2, 1), (7, 7), (8, 1), (8, 2), (8, 8), (15, 3), (16, 4), (17, 17), (24, 3), (32, 4), (32, 9), (64, 8),
         (127, 8), (128, 8), (129, 8), (255, 6), (256, 8), (257, 9), (512, 32), (2047, 5), (2048, 8), (2049, 8), (3000, 3)]  # fmt: skip


def logits(tokens, experts, dtype="float32", seed=0, ties=False):
    x = np.random.default_rng([seed, tokens, experts]).standard_normal((tokens, experts)) * 3
    return (np.round(x) if ties else x).astype(dtype)


def assert_same(got, want):
    for name, a, b in zip(got._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_variant_equals_portable_c_and_the_reference(variant, experts, top_k, renormalize):
    for ties in (False, True):
        x = logits(21, experts, ties=ties)
        got = assay.moe_route(x, top_k, renormalize, isa=variant)
        assert_same(got, assay.moe_route(x, top_k, renormalize, isa="scalar"))
        weights, ids, status = reference.moe_route(x, top_k, renormalize)
        np.testing.assert_array_equal(got.topk_ids, ids)
        np.testing.assert_array_equal(got.status, status)
        # vexp 1.7e-7, its argument |d| 2^-24 with |d| < 30 here, 128 float32 additions a lane, fold and division.
        np.testing.assert_allclose(got.topk_weights, weights, rtol=1.7e-7 + (30 + 128 + 8) * 2.0**-24)
        if renormalize:
            np.testing.assert_allclose(got.topk_weights.sum(axis=1, dtype=np.float64), 1, rtol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (17, 17), (128, 8), (257, 9), (2049, 8)])
def test_numba_twin_has_the_same_bits(experts, top_k, renormalize):
    x = logits(11, experts, ties=True)
    x[2] = -np.inf
    x[3, : experts // 2 + 1] = -np.inf
    x[4, -1] = np.nan
    x[5, 0] = np.inf
    want = assay.moe_route(x, top_k, renormalize)
    assert_same(assay.moe_route(x, top_k, renormalize, backend="numba"), want)


def check_avx512(monkeypatch, emulated_calls, run):
    """What run(isa) returns for the emulated avx512vnni kernels, against portable C."""
    want = run("scalar")
    monkeypatch.setattr("assay.ops.moe.calls", emulated_calls)
    assert_same(run("avx512vnni"), want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_emulated_avx512_equals_portable_c(monkeypatch, emulated_calls, experts, top_k, dtype):
    x = logits(19, experts, "float16" if dtype == "float16" else "float32", ties=experts % 2 == 0)
    x[2, : experts - 1] = -np.inf
    x[4, experts // 2] = np.nan
    x[6] = -np.inf
    x[7, experts // 3] = np.inf
    x = BFloat16(x) if dtype == "bfloat16" else x
    for renormalize in (True, False):
        with monkeypatch.context() as patch:
            check_avx512(patch, emulated_calls, lambda isa, r=renormalize: assay.moe_route(x, top_k, r, isa=isa))


def test_ties_go_to_the_lower_id_and_ids_are_distinct(variant):
    for experts in (8, 40, 300):
        got = assay.moe_route(np.zeros((13, experts), np.float32), 6, isa=variant)
        np.testing.assert_array_equal(got.topk_ids, np.tile(np.arange(6), (13, 1)))
        np.testing.assert_array_equal(got.topk_weights, np.float32(1) / 6)
    x = np.array([[0.0, -0.0, 1.0, 1.0]], np.float32)  # zeros of either sign are equal
    np.testing.assert_array_equal(assay.moe_route(x, 4, isa=variant).topk_ids, [[2, 3, 0, 1]])


@pytest.mark.parametrize("tied", [1, 9, 17, 40, 64])
@pytest.mark.parametrize("value", [3.0, 0.0, -0.0, -2.5, 1e-40, -1e-40])
def test_equal_best_logits_beside_smaller_ones(variant, tied, value):
    """So many equal ones, of any sign and subnormal too, at places that differ from row to row."""
    rng = np.random.default_rng([tied, int(value < 0)])
    x = (-3 - rng.random((13, 64))).astype(np.float32)
    places = np.sort(np.argsort(rng.random(x.shape), axis=1)[:, :tied], axis=1)
    np.put_along_axis(x, places, np.float32(value), axis=1)
    got = assay.moe_route(x, 8, isa=variant)
    np.testing.assert_array_equal(got.topk_ids[:, :tied], places[:, :8])
    np.testing.assert_array_equal(got.topk_ids, np.argsort(-x, axis=1, kind="stable")[:, :8])


@pytest.mark.parametrize("experts", [3, 16, 130, 300])
def test_masked_experts_are_never_chosen(variant, experts):
    x = np.full((4, experts), -np.inf, np.float32)
    x[0, [1, 2]] = 1, 2
    x[1, experts - 1] = -50
    x[2] = np.arange(experts)
    got = assay.moe_route(x, 3, isa=variant)
    np.testing.assert_array_equal(got.topk_ids[:2], [[2, 1, -1], [experts - 1, -1, -1]])
    np.testing.assert_array_equal(got.topk_weights[0, 2], 0)
    np.testing.assert_array_equal(got.topk_weights[1], [1, 0, 0])
    np.testing.assert_array_equal(got.status, [0, 0, 0, 2])
    np.testing.assert_array_equal(got.topk_ids[3], -1)
    np.testing.assert_array_equal(got.topk_weights[3], 0)


@pytest.mark.parametrize(("bad", "status"), [(np.nan, 1), (np.inf, 3)])
@pytest.mark.parametrize("experts", [8, 100, 300])
def test_a_poisoned_row_has_a_status_and_harms_no_other(variant, experts, bad, status):
    for dtype in ("float32", "float16"):
        for at in (0, experts // 2, experts - 1):
            x = logits(9, experts, dtype)
            clean = assay.moe_route(x, 4, isa=variant)
            x[5, at] = bad
            got = assay.moe_route(x, 4, isa=variant)
            np.testing.assert_array_equal(got.status, np.where(np.arange(9) == 5, status, 0))
            np.testing.assert_array_equal(got.topk_ids[5], -1)
            np.testing.assert_array_equal(got.topk_weights[5], 0)
            keep = np.arange(9) != 5
            np.testing.assert_array_equal(got.topk_ids[keep], clean.topk_ids[keep])
            np.testing.assert_array_equal(got.topk_weights[keep], clean.topk_weights[keep])


def test_extreme_logits(variant):
    """Weights far below the smallest float are 0 but the expert is chosen; the largest floats do not overflow."""
    x = np.array([[3e38, -3e38, 0, 1e-42], [-200, 0, -87.5, -86], [3e38, 3e38, 3e38, 2e38]], np.float32)
    got = assay.moe_route(x, 4, isa=variant)
    assert_same(got, assay.moe_route(x, 4, isa="scalar"))
    np.testing.assert_array_equal(got.topk_ids, [[0, 3, 2, 1], [1, 3, 2, 0], [0, 1, 2, 3]])
    np.testing.assert_array_equal(got.topk_weights[0], [1, 0, 0, 0])
    np.testing.assert_array_equal(got.topk_weights[1, 2:], 0)
    assert got.topk_weights[1, 1] > 0
    np.testing.assert_array_equal(got.status, 0)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (300, 8)])
def test_a_row_has_the_same_bits_in_any_batch(variant, experts, top_k):
    x = logits(700, experts)
    whole = assay.moe_route(x, top_k, isa=variant)
    for threads in (1, 2, 3):
        assert_same(assay.moe_route(x, top_k, isa=variant, num_threads=threads), whole)
    for tokens in (0, 1, 2, 3, 5, 64, 65):
        part = assay.moe_route(x[:tokens], top_k, isa=variant)
        assert_same(part, type(part)(*(a[:tokens] for a in whole)))
    order = np.random.default_rng(1).permutation(700)
    assert_same(assay.moe_route(x[order], top_k, isa=variant), type(whole)(*(a[order] for a in whole)))


@given(st.integers(0, 40), st.integers(1, 300), st.data(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_random_shapes(tokens, experts, data, renormalize):
    top_k = data.draw(st.integers(1, experts))
    x = logits(tokens, experts, ties=data.draw(st.booleans()))
    got = assay.moe_route(x, top_k, renormalize)
    assert_same(got, assay.moe_route(x, top_k, renormalize, isa="scalar"))
    assert got.topk_ids.shape == (tokens, top_k)
    for row in got.topk_ids:
        assert len(set(row.tolist())) == top_k
    assert (np.diff(got.topk_weights, axis=1) <= 0).all()


def test_half_precision_logits_are_widened_exactly(variant):
    half = logits(6, 50, "float16")
    half[0, :3] = 6e-8  # a subnormal float16
    want = assay.moe_route(half.astype(np.float32), 5, isa=variant)
    assert_same(assay.moe_route(half, 5, isa=variant), want)


def test_bfloat16_logits_are_widened_exactly(variant):
    for experts in (5, 16, 50, 200, 2049):
        x = BFloat16(logits(11, experts))
        assert_same(assay.moe_route(x, 4, isa=variant), assay.moe_route(x.widened(), 4, isa=variant))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("experts", [1, 5, 8, 15, 17, 33, 129, 257])
def test_reads_and_writes_nothing_beyond_the_arrays(variant, guarded, experts, dtype):
    k = min(3, experts)
    x = guarded(logits(6, experts, dtype))
    out = tuple(guarded(a) for a in (np.zeros((6, k), np.float32), np.zeros((6, k), np.int32), np.zeros(6, np.int32)))
    for renormalize in (True, False):
        got = assay.moe_route(x, k, renormalize, out, isa=variant)
        assert_same(got, assay.moe_route(x.copy(), k, renormalize, isa="scalar"))


def test_strided_rows_and_out(variant):
    wide = np.zeros((5, 91), np.float32)
    x = logits(5, 64)
    wide[:, 3:67] = x
    want = assay.moe_route(x, 4, isa=variant)
    assert_same(assay.moe_route(wide[:, 3:67], 4, isa=variant), want)
    room = np.full((5, 9), 7, np.float32)
    out = (room[:, 2:6], np.empty((5, 4), np.int32), np.empty(5, np.int32))
    got = assay.moe_route(x, 4, out=out, isa=variant)
    assert got.topk_weights is out[0]
    assert got.status is out[2]
    assert_same(got, want)
    assert (room[:, :2] == 7).all()
    assert (room[:, 6:] == 7).all()
    assert assay.moe_route(x[::-1].copy(), 4, out=got, isa=variant).topk_ids is out[1]
    np.testing.assert_array_equal(out[1], want.topk_ids[::-1])


def test_bad_arguments_say_got_and_wanted():
    x = logits(3, 8)
    out = (np.empty((3, 2), np.float32), np.empty((3, 2), np.int32), np.empty(3, np.int32))
    cases = [
        (TypeError, "router_logits: expected float32 or float16 or bfloat16, got float64",
         lambda: assay.moe_route(x.astype(float), 2)),
        (TypeError, "router_logits: expected an array", lambda: assay.moe_route("no", 2)),
        (ValueError, "router_logits: expected 2 dimensions, got 1", lambda: assay.moe_route(x[0], 2)),
        (ValueError, r"router_logits: expected \[T, E\] with 1 <= E", lambda: assay.moe_route(x[:, :0], 1)),
        (ValueError, "router_logits: expected a dense last dimension", lambda: assay.moe_route(x[:, ::2], 1)),
        (ValueError, r"top_k: expected 1..E = 1..8, got 0", lambda: assay.moe_route(x, 0)),
        (ValueError, r"top_k: expected 1..E = 1..8, got 9", lambda: assay.moe_route(x, 9)),
        (TypeError, "top_k: expected an int, got float", lambda: assay.moe_route(x, 2.0)),
        (TypeError, "out: expected", lambda: assay.moe_route(x, 2, out=out[0])),
        (ValueError, r"topk_weights: expected shape \[3, 3\], got \[3, 2\]", lambda: assay.moe_route(x, 3, out=out)),
        (TypeError, "topk_ids: expected int32, got float32",
         lambda: assay.moe_route(x, 2, out=(out[0], out[0].copy(), out[2]))),
        (ValueError, "topk_weights: expected memory of its own", lambda: assay.moe_route(x, 8, out=(x, None, None))),
        (ValueError, "backend: expected one of", lambda: assay.moe_route(x, 2, backend="cuda")),
        (ValueError, "isa: expected one of", lambda: assay.moe_route(x, 2, isa="mmx")),
        (ValueError, "isa: only backend 'c'", lambda: assay.moe_route(x, 2, isa="scalar", backend="reference")),
        (ValueError, "num_threads: expected", lambda: assay.moe_route(x, 2, num_threads=0)),
        (assay.UnsupportedError, "isa='neon' is not available", lambda: assay.moe_route(x, 2, isa="neon")),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
