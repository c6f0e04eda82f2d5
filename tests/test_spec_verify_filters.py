"""Filters over vocabularies of several thousand blocks' worth: what they keep, whatever the row looks like."""

import numpy as np
import pytest

import assay
from bf16 import BFloat16

OP = "spec_verify"
VOCAB = 40007  # more than the candidates that a search for a cut stores, and no multiple of a block or of a vector

FILTERS = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": 700}, {"top_k": 30000}, {"top_p": 1e-6}, {"top_p": 0.3}, {"top_p": 0.95},
    {"top_p": 0.9999}, {"top_p": float(np.nextafter(np.float32(1), np.float32(0)))}, {"min_p": 0.02}, {"typical_p": 0.2},
    {"typical_p": 0.95}, {"top_k": 900, "top_p": 0.8}, {"top_k": 25000, "top_p": 0.7, "typical_p": 0.8},
    {"top_p": 0.9, "min_p": 0.001, "typical_p": 0.9},
]  # fmt: skip


def rows():
    """By name: rows that a guess by one run of 32 elements in 512 is right for, and rows made to deceive it."""
    rng = np.random.default_rng(5)
    normal = rng.standard_normal(VOCAB)
    sampled = np.arange(VOCAB) % 512 < 32
    made = {
        "normal": 3 * normal,
        "flat": 0.1 * normal,
        "steep": 12 * normal,
        "equal": np.full(VOCAB, 2.5),
        "few values": np.round(2 * normal) / 2,
        "two values": np.where(normal > 1.5, 1.0, -1.0),
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "large where none looks": np.where(sampled, -8, 3) + normal,
        "large where it looks": np.where(sampled, 3, -8) + normal,
        "rising": np.linspace(-10, 10, VOCAB),
        "mostly absent": np.where(normal > 2, normal, -np.inf),
        "one beyond all": np.where(np.arange(VOCAB) == VOCAB - 1, 90.0, normal),
        "close to zero": 1e-39 * normal,
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


ROWS = rows()
DRAWS = 4


def drawn(row, how, **more):
    """Tokens at several uniforms and their log-probabilities, by the same row for each."""
    logits = BFloat16(np.tile(row, (DRAWS, 1))) if more.pop("bf16", False) else np.tile(row, (DRAWS, 1))
    u = np.repeat(np.linspace(0.01, 0.99, DRAWS), 2)
    got = assay.sample(logits, uniforms=u, return_logprobs=True, **how, **more)
    assert not got.status.any()
    return got


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_every_variant_and_the_twin_keep_the_same_tokens(variant, name, bf16):
    """To the bit of the normaliser of what is kept."""
    pytest.importorskip("numba")
    for how in FILTERS:
        got = drawn(ROWS[name], how, isa=variant, bf16=bf16)
        want = drawn(ROWS[name], how, backend="numba", bf16=bf16)
        for field in ("output_token_ids", "logprobs"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=f"{field} {how}")


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_keeps_as_much(variant, name):
    """The mass kept, which an emitted token's log-probability tells, is the reference's within what its bound leaves open:
    one class of equals, where float32's sums fall on the other side of the bound (2^-20 of the mass)."""
    row = ROWS[name]
    z = row.astype(np.float64) - row.max()
    p = np.exp(z)
    for how in FILTERS:
        if len(how) > 1 or "min_p" in how:
            continue
        got = drawn(row, how, isa=variant)
        kept = p[got.output_token_ids[:, 0]] / np.exp(got.logprobs[:, 0].astype(np.float64))
        order = np.argsort(-z, kind="stable")
        if "typical_p" in how:
            there = p > 0
            center = (p[there] * z[there]).sum() / p.sum()
            order = np.argsort(np.abs(np.where(there, z, -np.inf) - center), kind="stable")
        mass = np.cumsum(p[order])
        if "top_k" in how:
            bounds = (mass[min(how["top_k"], VOCAB) - 1],) * 2
        else:
            (share,) = how.values()
            bounds = tuple(
                mass[min(int(np.searchsorted(mass, np.float32(share) * mass[-1] * (1 + slack))), VOCAB - 1)]
                for slack in (-(2.0**-20), 2.0**-20)
            )
        assert (kept >= bounds[0] * (1 - 1e-5)).all(), (how, kept, bounds)
        assert (kept <= bounds[1] * (1 + 1e-5)).all(), (how, kept, bounds)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_emulated_avx512_keeps_what_portable_c_keeps(emulate_verify, bf16):
    cases = [(name, how) for name in ("normal", "few values", "large where none looks") for how in FILTERS]
    want = [drawn(ROWS[name], how, isa="scalar", bf16=bf16) for name, how in cases]
    emulate_verify()
    for (name, how), expected in zip(cases, want, strict=True):
        got = drawn(ROWS[name], how, isa="avx512vnni", bf16=bf16)
        np.testing.assert_array_equal(got.output_token_ids, expected.output_token_ids, err_msg=f"{name} {how}")
        np.testing.assert_array_equal(got.logprobs, expected.logprobs, err_msg=f"{name} {how}")


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_a_cut_among_equals_stays_when_another_filter_follows(backend):
    """top_k leaves the lower ids of equal logits; top_p and typical_p then choose among those alone, though one of the class
    be left and more of its equals stand behind it."""
    u = np.repeat(np.linspace(0.01, 0.99, 50), 2)
    for row, how, kept in (
        ([0, 0, 0, 0], {"top_k": 1, "top_p": 0.9}, {0}),
        ([0, 3, 0, 0], {"top_k": 2, "top_p": 0.999}, {0, 1}),
        ([0, 3, 0, 0], {"top_k": 2, "typical_p": 0.999}, {0, 1}),
        ([1, 0, 1, 1], {"top_k": 2, "top_p": 0.9}, {0, 2}),
        ([0, -0.0, 0, -0.0], {"top_k": 1, "typical_p": 0.9}, {0}),
    ):
        rows = np.tile(np.array(row, np.float32), (50, 1))
        found = assay.sample(rows, uniforms=u, backend=backend, **how).output_token_ids[:, 0]
        assert set(found.tolist()) == kept, (row, how)
