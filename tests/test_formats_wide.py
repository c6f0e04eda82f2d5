"""The forms that weights run in, and the formats of the wider one: exactness both ways, refusals, rounding."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay.errors import FormatError
from assay.formats.checkpoint import RUN_BITS, RUNS_AS
from assay.formats.container import form_of
from assay.formats.dequant import GGML_TYPES, MXFP4_VALUES, dequantize_rows
from assay.formats.ggml import GGML_READABLE, GGML_WRITABLE, from_ggml, to_ggml
from assay.formats.int4 import Int4Weights
from assay.formats.lossy import round_to
from assay.formats.weights import (
    Int8Weights,
    WideWeights,
    as_int4,
    as_int8,
    as_wide,
    conversion_error,
    regroup,
    run_bits_per_weight,
)
from assay.formats.wide import (
    NF4_VALUES,
    from_bnb4,
    from_hqq_float,
    from_mxfp4,
    from_nvfp4,
    int8_codebook,
    to_bnb4,
    to_hqq_float,
    to_mxfp4,
    to_nvfp4,
)

BLOCKS = {t.name: t for t in GGML_TYPES.values()}
#: Bytes of a block that hold the high half of a float16, or a scale that may be NaN.
SCALE_BYTES = {
    "Q4_1": (1, 3), "Q5_1": (1, 3), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,), "MXFP4": (0,),
    "NVFP4": (0, 1, 2, 3), "Q2_K": (81, 83), "Q3_K": (109,),
}  # fmt: skip


def blocks(kind: str, rows: int = 3, k: int = 512, seed: int = 0) -> np.ndarray:
    """Rows of random bytes whose scales are finite."""
    _, size, nbytes = BLOCKS[kind]
    out = np.random.default_rng(seed).integers(0, 256, (rows, k // size * nbytes), np.uint8)
    for at in SCALE_BYTES.get(kind, (1,)):
        out.reshape(-1, nbytes)[:, at] &= 0xAB
    if kind == "MXFP4":
        out.reshape(-1, nbytes)[:, 0] = out.reshape(-1, nbytes)[:, 0] % 32 + 104
    return out


# ---- GGML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GGML_READABLE)
def test_ggml_values_are_the_dequantisers(kind):
    rows = blocks(kind)
    w = from_ggml(rows, kind)
    want = dequantize_rows(rows, kind)
    assert np.array_equal(w.dequantize(), want)
    assert form_of(w) == RUNS_AS[kind]
    assert run_bits_per_weight(w) == RUN_BITS[kind]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GGML_WRITABLE), st.integers(0, 2**32 - 1))
def test_ggml_there_and_back(kind, seed):
    rows = blocks(kind, 2, seed=seed)
    w = from_ggml(rows, kind)
    again = from_ggml(to_ggml(w, kind), kind)
    assert np.array_equal(again.q, w.q)
    assert np.array_equal(again.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        ("Q4_0", {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}),
        ("Q4_1", {"Q4_1", "Q5_1"}),
        ("Q5_0", {"Q5_0", "Q8_0"}),
        ("Q4_K", {"Q4_K", "Q5_K"}),
        ("Q6_K", {"Q6_K"}),
        ("IQ4_NL", {"IQ4_NL", "Q8_0"}),
    ],
)
def test_what_holds_what(kind, holds):
    """A repack is exact or refused; never rounded."""
    w = from_ggml(blocks(kind), kind)
    found = set()
    for other in GGML_WRITABLE:
        try:
            rows = to_ggml(w, other)
        except FormatError:
            continue
        assert np.array_equal(dequantize_rows(rows, other), w.dequantize())
        found.add(other)
    assert found == holds


def test_ggml_refuses():
    with pytest.raises(FormatError, match=r"t: expected a type of Q4_0, .*, got IQ2_S"):
        from_ggml(np.zeros((1, 82), np.uint8), "IQ2_S", name="t")
    with pytest.raises(FormatError, match=r"t: expected rows of whole Q4_K blocks \(144 bytes\), got uint8 \[1, 100\]"):
        from_ggml(np.zeros((1, 100), np.uint8), "Q4_K", name="t")
    rows = blocks("Q5_1")
    rows[1, 24:28] = 0xFF
    with pytest.raises(FormatError, match=r"t: expected a finite scale, got nan in row 1, group 1"):
        from_ggml(rows, "Q5_1", name="t")
    rows = blocks("MXFP4")
    rows[0, 17] = 255
    with pytest.raises(
        FormatError, match=r"t: scale: expected E8M0 exponents 0\.\.254 \(255 is NaN\), got 255 in block 1"
    ):
        from_ggml(rows, "MXFP4", name="t")
    rows = blocks("NVFP4")
    rows[0, 2] = 0x7F
    with pytest.raises(FormatError, match="finite E4M3"):
        from_ggml(rows, "NVFP4")
    perm = np.arange(64, dtype=np.int32)[::-1].copy()
    w = Int4Weights(np.zeros((1, 64), np.uint8), np.ones((1, 2), np.float16), None, 32, perm)
    with pytest.raises(FormatError, match="act-order"):
        to_ggml(w, "Q8_0")
    with pytest.raises(FormatError, match="type: expected one of"):
        to_ggml(w, "IQ2_XS")


def test_the_table_in_the_docs():
    """docs/formats.md states what each type runs as: the same forms, groups and bits as in the code."""
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = {cells[0]: cells for cells in lines if len(cells) == 6}
    for kind in GGML_READABLE:
        _, stored, form, group, run, exact = rows[kind]
        assert float(stored) == 8 * BLOCKS[kind].block_bytes / BLOCKS[kind].block_size
        assert (form, float(run)) == (RUNS_AS[kind], RUN_BITS[kind])
        assert int(group) == from_ggml(blocks(kind), kind).group_size
        assert "yes" in exact


# ---- forms -----------------------------------------------------------------------------------------------------------


def random_int4(seed: int = 0, *, symmetric: bool = False) -> Int4Weights:
    rng = np.random.default_rng(seed)
    zeros = None if symmetric else rng.integers(0, 16, (4, 3), np.uint8)
    return Int4Weights(rng.integers(0, 16, (4, 96), np.uint8), rng.uniform(-1, 1, (4, 3)).astype(np.float16), zeros, 32)


@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_in_the_other_forms(symmetric):
    w = random_int4(symmetric=symmetric)
    want = w.dequantize()
    for other in (as_int8(w), as_wide(w, 4), as_wide(w, 8), as_wide(as_wide(w, 4), 8)):
        assert np.array_equal(other.dequantize(), want)
    assert np.array_equal(as_int4(as_wide(w, 4)).dequantize(), want)
    assert np.array_equal(as_int4(as_int8(w)).dequantize(), want)
    assert as_int4(w) is w


def test_forms_refuse_what_would_change_a_weight():
    wide = WideWeights(np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float32), np.full((1, 1), 0.3, np.float32), 32)
    with pytest.raises(FormatError, match=r"minimum: expected -scale z with an integer z .* 1 of 1 groups"):
        as_int4(wide)
    with pytest.raises(FormatError, match="minimum: expected 0 everywhere"):
        as_int8(wide)
    nf4 = WideWeights(np.zeros((1, 64), np.uint8), np.ones((1, 1), np.float32), None, 64, NF4_VALUES)
    with pytest.raises(FormatError, match="codebook: expected integers"):
        as_int8(nf4)
    with pytest.raises(FormatError, match="codes of 4 bits"):
        as_wide(Int8Weights(np.zeros((1, 32), np.int8), np.ones((1, 1), np.float16), 32), 4)
    spread = Int8Weights(np.array([[-9] + [7] * 31], np.int8), np.ones((1, 1), np.float16), 32)
    with pytest.raises(FormatError, match=r"at most 16 codes around 0 \(INT4\), got -9\.\.7"):
        as_int4(spread)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: WideWeights(q.astype(np.int32), np.ones((2, 1), np.float32), None, 32), "q: expected int8 or uint8"),
        (
            lambda q: WideWeights(q + np.uint8(16), np.ones((2, 1), np.float32), None, 32),
            r"q: expected 0\.\.15, got 16",
        ),
        (lambda q: WideWeights(q, np.ones((2, 2), np.float32), None, 32), r"scales: expected float32 \[2, 1\]"),
        (lambda q: WideWeights(q, np.full((2, 1), np.nan, np.float32), None, 32), "scales: expected finite"),
        (lambda q: WideWeights(q, np.ones((2, 1), np.float32), np.ones((2, 1)), 32), "minimum: expected float32"),
        (lambda q: WideWeights(q, np.ones((2, 1), np.float32), None, 24), "group_size: expected a divisor of K = 32"),
        (
            lambda q: WideWeights(q, np.ones((2, 1), np.float32), None, 32, np.ones(8, np.float32)),
            r"codebook: .*\[16\]",
        ),
        (
            lambda q: WideWeights(q.view(np.int8), np.ones((2, 1), np.float32), None, 32, NF4_VALUES),
            "codebook: expected None with int8 codes",
        ),
        (lambda q: Int8Weights(q, np.ones((2, 1), np.float16), 32), "q: expected int8"),
        (lambda q: Int8Weights(q[:, :0].view(np.int8), np.ones((2, 1), np.float16), 32), "N, K >= 1"),
    ],
)
def test_forms_check_their_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make(np.zeros((2, 32), np.uint8))


def test_regroup():
    w = WideWeights(np.zeros((1, 512), np.uint8), np.array([[1, 2]], np.float32), None, 256, NF4_VALUES)
    parts = regroup(w, (128, 64, 32, 16))
    assert (parts.group_size, parts.scales.tolist()) == (128, [[1, 1, 2, 2]])
    assert np.array_equal(parts.dequantize(), w.dequantize())
    assert w.pack_args()["group_size"] == 128
    whole = WideWeights(np.zeros((1, 100), np.uint8), np.ones((1, 1), np.float32), None, 100)
    assert regroup(whole, (128, 64, 32, 16)) is whole


def test_int4_and_int8_pack_to_the_same_weights():
    for kind in ("Q4_0", "Q5_0", "Q8_0"):
        w = from_ggml(blocks(kind), kind)
        pack = assay.pack if isinstance(w, Int4Weights) else assay.pack_int8
        assert np.array_equal(pack(**w.pack_args()).dequantize(), w.dequantize())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_1", "Q4_K", "Q5_1", "Q5_K", "Q6_K", "MXFP4", "NVFP4", "IQ4_XS"])
def test_wide_packs_to_the_same_weights(kind):
    pack_wide = getattr(assay, "pack_wide", None)
    if pack_wide is None:
        pytest.skip("this build has no wide kernels")
    w = from_ggml(blocks(kind), kind)
    packed = pack_wide(**w.pack_args())
    assert np.array_equal(packed.dequantize(), w.dequantize())


# ---- MXFP4, NVFP4 ----------------------------------------------------------------------------------------------------


def test_mxfp4_by_hand_and_stacks():
    packed = np.zeros((2, 3, 2, 16), np.uint8)
    packed[1, 2, 1, 0] = 0xF7  # even element 6, odd -6
    exponents = np.full((2, 3, 2), 127, np.uint8)
    exponents[1, 2, 1] = 130
    w = from_mxfp4(packed, exponents)
    assert w.q.shape == (6, 64)
    assert w.dequantize()[5, 32:34].tolist() == [48.0, -48.0]
    back = to_mxfp4(w)
    assert np.array_equal(back["blocks"].reshape(packed.shape), packed)
    assert np.array_equal(back["scales"].reshape(exponents.shape), exponents)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 252), st.integers(0, 15))
def test_mxfp4_exponents(exponent, code):
    w = from_mxfp4(np.full((1, 1, 16), code * 17, np.uint8), np.full((1, 1), exponent, np.uint8))
    assert w.dequantize()[0, 0] == float(MXFP4_VALUES[code]) * 2.0 ** (exponent - 128)
    assert to_mxfp4(w)["scales"][0, 0] == exponent


def test_mxfp4_refuses():
    good = np.zeros((2, 1, 16), np.uint8)
    with pytest.raises(FormatError, match=r"e_scales: expected uint8 \[2, 1\] .*, got uint8 \[2, 2\]"):
        from_mxfp4(good, np.zeros((2, 2), np.uint8), name="e")
    with pytest.raises(FormatError, match=r"e_scales: expected exponents 0\.\.254 \(255 is NaN\), got 255 at \[1, 0\]"):
        from_mxfp4(good, np.array([[1], [255]], np.uint8), name="e")
    with pytest.raises(FormatError, match=r"e_blocks: expected uint8 \[\.\.\., rows, G, 16\]"):
        from_mxfp4(good[..., :8], np.zeros((2, 1), np.uint8), name="e")
    w = WideWeights(np.zeros((1, 32), np.uint8), np.full((1, 1), 3, np.float32), None, 32, MXFP4_VALUES)
    with pytest.raises(FormatError, match=r"scales: expected powers of two, .* got 3\.0"):
        to_mxfp4(w)
    with pytest.raises(FormatError, match="codebook: expected the values of MXFP4, got Int4Weights"):
        to_mxfp4(random_int4())


def nvfp4_parts(factor: float, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "weight_packed": rng.integers(0, 256, (3, 16), np.uint8),
        "weight_scale": rng.integers(0, 127, (3, 2), np.uint8),
        "global_scale": np.array([factor], np.float32),
    }


@settings(max_examples=40, deadline=None)
@given(st.floats(0.25, 1e4, width=32), st.booleans(), st.integers(0, 1000))
def test_nvfp4_there_and_back(factor, divide, seed):
    """The global scale is found again, or one that gives the same products."""
    parts = nvfp4_parts(factor if divide else 1 / factor, seed)
    w = from_nvfp4(**parts, divide=divide)
    back = to_nvfp4(w, divide=divide)
    assert np.array_equal(back["weight_packed"], parts["weight_packed"])
    assert np.array_equal(from_nvfp4(**back, divide=divide).scales, w.scales)


def test_nvfp4_refuses():
    parts = nvfp4_parts(2000.0)
    parts["weight_scale"][0, 0] = 126
    with pytest.raises(FormatError, match=r"m\.global scale: .*multiplied by it.*is it the reciprocal"):
        from_nvfp4(**parts, divide=False, name="m")
    for value in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(FormatError, match="global scale: expected a positive number"):
            from_nvfp4(**(parts | {"global_scale": np.array([value], np.float32)}), divide=True)
    bad = parts["weight_scale"].copy()
    bad[2, 1] = 0x80
    with pytest.raises(FormatError, match=r"m\.weight_scale: .* got 0x80 at \[2, 1\]"):
        from_nvfp4(**(parts | {"weight_scale": bad}), divide=True, name="m")
    with pytest.raises(FormatError, match="K a multiple of 16"):
        from_nvfp4(parts["weight_packed"][:, :5], bad, parts["global_scale"], divide=True)
    loose = WideWeights(
        np.zeros((1, 64), np.uint8), np.array([[1, 1.01, 1.02, 1.03]], np.float32), None, 16, MXFP4_VALUES
    )
    with pytest.raises(FormatError, match="expected E4M3 numbers times one global scale"):
        to_nvfp4(loose)


# ---- bitsandbytes, HQQ -----------------------------------------------------------------------------------------------


def test_bnb_blocks_that_straddle_rows():
    """K = 96 with blocks of 64: groups of 32, the common divisor."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (2 * 96 // 2, 1), np.uint8)
    absmax = np.array([1, 2, 4], np.float32)
    w = from_bnb4(packed, absmax, (2, 96), quant_map=NF4_VALUES)
    assert w.group_size == 32
    flat = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
    want = (NF4_VALUES[flat] * np.repeat(absmax, 64)).reshape(2, 96)
    assert np.array_equal(w.dequantize(), want)
    with pytest.raises(FormatError, match="a common divisor of at least 16"):
        from_bnb4(packed[:72], absmax, (2, 72), quant_map=NF4_VALUES)
    with pytest.raises(FormatError, match=r"m\.weight: expected uint8 of 96 bytes"):
        from_bnb4(packed[:-1], absmax, (2, 96), quant_map=NF4_VALUES, name="m")
    with pytest.raises(FormatError, match=r"m\.absmax: expected float32 \[3\], got float32 \[2\]"):
        from_bnb4(packed, absmax[:2], (2, 96), quant_map=NF4_VALUES, name="m")
    with pytest.raises(FormatError, match=r"m\.quant_map: expected float32 \[16\]"):
        from_bnb4(packed, absmax, (2, 96), quant_map=NF4_VALUES[:8], name="m")
    with pytest.raises(FormatError, match=r"group_size: expected a multiple of blocksize = 64, got 32"):
        to_bnb4(w)


def test_int8_codebook_says_what_it_costs():
    w = round_to(np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32), "nf4")
    rounded, error = int8_codebook(w)
    assert np.array_equal(rounded.codebook, rounded.codebook.astype(np.int8))
    assert error == conversion_error(w.dequantize(), rounded.dequantize())
    assert 0.003 < error.rms_relative < 0.01  # half a step of 1/127 in 0.35, uniform
    assert error.max_relative <= 0.5 / 127 + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_hqq_half_precision_is_exact_both_ways(seed):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.001, 1, (8, 1)).astype(np.float16)
    zero = rng.uniform(-2, 17, (8, 1)).astype(np.float16)
    packed = rng.integers(0, 256, (4, 64), np.uint8)
    w = from_hqq_float(packed, scale, zero, (4, 128), group_size=64)
    back = to_hqq_float(w)
    assert np.array_equal(back["W_q"], packed)
    assert np.array_equal(back["scale"], scale)
    assert np.array_equal(back["zero"], zero)
    q = np.concatenate([packed >> 4, packed & 15]).astype(np.float64)
    exact = ((q - zero) * scale).reshape(4, 128)
    assert np.abs(w.dequantize() - exact).max() <= 2.0**-23 * 17  # one rounding of the sum


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_rounding_is_ggmls(target):
    quants = pytest.importorskip("gguf").quants
    import gguf

    w = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    w[3] = 0
    kind = target.upper()
    rows = quants.quantize(w, gguf.GGMLQuantizationType[kind])
    theirs = conversion_error(w, dequantize_rows(rows, kind))
    ours = conversion_error(w, round_to(w, target).dequantize())
    assert ours.rms_relative == pytest.approx(theirs.rms_relative, rel=0.01)
    assert ours.max_relative == pytest.approx(theirs.max_relative, rel=0.05)


@pytest.mark.parametrize("target", ["q4_k", "q5_k", "q6_k", "iq4_nl"])
def test_rounding_is_writable(target):
    w = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    w[1, :32], w[2] = 0, 0
    rounded = round_to(w, target)
    rows = to_ggml(rounded, target.upper())
    assert np.array_equal(dequantize_rows(rows, target.upper()), rounded.dequantize())
    bound = {"q4_k": 0.09, "q5_k": 0.045, "q6_k": 0.025, "iq4_nl": 0.1}[target]
    assert 0 < conversion_error(w, rounded.dequantize()).rms_relative < bound
    assert (rounded.dequantize()[2] == 0).all()


@pytest.mark.parametrize("target", ["gptq", "q4_0", "q4_k", "nvfp4", "nf4"])
def test_rounding_in_chunks_is_rounding_at_once(target, monkeypatch):
    from assay.formats import lossy

    w = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    whole = round_to(w, target, 64)
    monkeypatch.setattr(lossy, "_CHUNK", 600)
    parts = round_to(w, target, 64)
    assert np.array_equal(parts.q, whole.q)
    assert np.array_equal(parts.dequantize(), whole.dequantize())


def test_rounding_refuses():
    w = np.ones((2, 64), np.float32)
    w[0, 1] = np.inf
    with pytest.raises(FormatError, match="expected finite numbers"):
        round_to(w, "q8_0")
    with pytest.raises(FormatError, match=r"K a multiple of 256 \(q4_k\), got K = 64"):
        round_to(np.ones((2, 64), np.float32), "q4_k")
    with pytest.raises(FormatError, match="K a multiple of group_size = 128, got K = 64"):
        round_to(np.ones((2, 64), np.float32), "gptq")
    with pytest.raises(FormatError, match=r"scales: expected finite .*\(q4_0\)"):
        round_to(np.full((2, 64), 1e30, np.float32), "q4_0")


def test_conversion_error_by_hand():
    before = np.array([[3, -4, 0, 0]], np.float32)
    after = np.array([[3, -3, 0, 0]], np.float32)
    error = conversion_error(before, after)
    assert error.max_relative == 0.25
    assert error.rms_relative == pytest.approx(0.2)
    assert conversion_error(before * 0, before * 0) == (0, 0)
    assert conversion_error(before * 0, after).rms_relative == float("inf")
