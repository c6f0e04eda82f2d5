"""INT4 converters: golden cases packed by loops over bits, round trips, refusals, and the kernels on the result."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay.errors import FormatError
from assay.formats.int4 import (
    Int4Weights,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    from_hqq,
    from_q4_0,
    from_q4_1,
    to_awq,
    to_compressed_tensors,
    to_gptq,
    to_hqq,
    to_q4_0,
    to_q4_1,
)

N, K, GROUP = 16, 64, 32
G = K // GROUP

# ---- the formats by their definitions, a nibble at a time ----------------------------------------------------------


def word(nibbles: list[int]) -> int:
    """Eight nibbles, the first lowest, as the signed 32-bit number that holds them."""
    value = 0
    for i, nibble in enumerate(nibbles):
        value |= int(nibble) << (4 * i)
    return value - (1 << 32) if value >= 1 << 31 else value


def sample(seed: int = 0, *, symmetric: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], float16 scales [N, G] and zero points [N, G]."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (N, K), dtype=np.uint8)
    scales = (rng.uniform(0.001, 0.1, (N, G)) * rng.choice([-1, 1], (N, G))).astype(np.float16)
    zeros = np.full((N, G), 8, np.uint8) if symmetric else rng.integers(0, 16, (N, G), dtype=np.uint8)
    return q, scales, zeros


def matrix(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: list[int]) -> np.ndarray:
    """w = scale (q - zero), an element at a time, in float64."""
    w = np.empty(q.shape, np.float64)
    for n in range(q.shape[0]):
        for k in range(q.shape[1]):
            g = group_of[k]
            w[n, k] = float(scales[n, g]) * (int(q[n, k]) - int(zeros[n, g]))
    return w


def gptq_file(q: np.ndarray, zeros: np.ndarray, version: int) -> tuple[np.ndarray, np.ndarray]:
    n, k = q.shape
    qweight = np.array([[word([q[c, 8 * r + j] for j in range(8)]) for c in range(n)] for r in range(k // 8)], np.int32)
    less = 1 if version == 1 else 0
    qzeros = np.array(
        [[word([(int(zeros[8 * c + j, g]) - less) % 16 for j in range(8)]) for c in range(n // 8)]
         for g in range(zeros.shape[1])], np.int32,
    )  # fmt: skip
    return qweight, qzeros


def awq_words(rows: np.ndarray) -> np.ndarray:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return np.array(
        [[word([row[8 * c + order[i]] for i in range(8)]) for c in range(len(row) // 8)] for row in rows], np.int32
    )


def assert_weights(w: Int4Weights, q: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> None:
    assert np.array_equal(w.q, q)
    assert w.scales.dtype == scales.dtype
    assert np.array_equal(w.scales, scales)
    if (zeros == 8).all():
        assert w.zeros is None
    else:
        assert np.array_equal(w.zeros, zeros)
    groups = [k // w.group_size for k in range(q.shape[1])]
    assert np.array_equal(w.dequantize(), matrix(q, scales, zeros, groups))  # 11 bits times 5: exact in float32


PLAIN = [k // GROUP for k in range(K)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(version, symmetric):
    q, scales, zeros = sample(version, symmetric=symmetric)
    if not symmetric:
        zeros[:8, 0] = [0, 15, 0, 1, 0, 0, 14, 0]  # neighbours of a stored 15, which a carry would spoil
    qweight, qzeros = gptq_file(q, zeros, version)
    for g_idx in (None, np.array(PLAIN, np.int32), np.array(PLAIN, np.int64)):
        w = from_gptq(qweight, qzeros, scales.T, g_idx, group_size=GROUP, version=version)
        assert w.perm is None
        assert_weights(w, q, scales, zeros)
    back = to_gptq(w, version=version)
    assert list(back) == ["qweight", "qzeros", "scales", "g_idx"]
    assert [back[name].dtype.name for name in back] == ["int32", "int32", "float16", "int32"]
    assert np.array_equal(back["qweight"], qweight)
    assert np.array_equal(back["qzeros"], qzeros)
    assert np.array_equal(back["scales"], scales.T)
    assert back["g_idx"].tolist() == PLAIN


def test_gptq_words_by_hand():
    """Rows 0..7 hold codes 1..8 in column 0; stored zeros F0000000 (v1) are 1, ..., 1, 0."""
    qweight = np.zeros((4, 8), np.int32)
    qweight[0, 0] = np.array(0x87654321, np.uint32).view(np.int32)
    qzeros = np.array([[0xF0000000]], np.uint32).view(np.int32)
    scales = np.ones((1, 8), np.float16)
    first = from_gptq(qweight, qzeros, scales, group_size=-1)
    assert first.group_size == 32
    assert first.q[0, :9].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert first.zeros[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert first.dequantize()[0, :3].tolist() == [0, 1, 2]
    second = from_gptq(qweight.view(np.uint32), qzeros, scales, group_size=32, version=2)
    assert second.zeros[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 15]


def test_gptq_stored_15():
    q, scales, zeros = sample(3)
    zeros[:] = 5
    zeros[9, 1] = 0
    qweight, qzeros = gptq_file(q, zeros, 1)
    assert from_gptq(qweight, qzeros, scales.T, group_size=GROUP, zero_16="wrap").zeros[9, 1] == 0
    with pytest.raises(FormatError, match=r"m\.qzeros: expected stored zero points 0\.\.14 .* got 15 at \[1, 9\]"):
        from_gptq(qweight, qzeros, scales.T, group_size=GROUP, zero_16="error", name="m")
    # version 2 has no such doubt: 15 is 15
    assert from_gptq(qweight, qzeros, scales.T, group_size=GROUP, version=2, zero_16="error").zeros[9, 1] == 15


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_act_order(name):
    q, scales, zeros = sample(4)
    group_of = np.random.default_rng(5).permutation(PLAIN).astype(np.int32)
    if name == "gptq":
        qweight, qzeros = gptq_file(q, zeros, 1)
        w = from_gptq(qweight, qzeros, scales.T, group_of, group_size=GROUP)
        back = to_gptq(w)
        assert np.array_equal(back["qweight"], qweight)
    else:
        file = compressed_file(q, scales, zeros)
        w = from_compressed_tensors(**file, weight_g_idx=group_of, group_size=GROUP)
        back = to_compressed_tensors(w)
        assert np.array_equal(back["weight_packed"], file["weight_packed"])
    assert np.array_equal(back["g_idx" if name == "gptq" else "weight_g_idx"], group_of)
    assert sorted(w.perm) == list(range(K))
    assert [int(group_of[w.perm[j]]) for j in range(K)] == PLAIN
    assert all(np.array_equal(w.q[:, j], q[:, w.perm[j]]) for j in range(K))
    dense = matrix(q, scales, zeros, list(group_of))
    assert np.array_equal(w.dequantize(), dense)
    a = np.random.default_rng(6).standard_normal((3, K)).astype(np.float32)
    out = assay.w4a16_gemm(np.ascontiguousarray(a[:, w.perm]), assay.pack(**w.pack_args()))
    assert_product(out, a, dense)
    for refuses in (to_awq, to_q4_0, to_q4_1, to_hqq):
        with pytest.raises(FormatError, match="perm: expected None"):
            refuses(w)


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(symmetric):
    q, scales, zeros = sample(7, symmetric=symmetric)
    qweight, qzeros = awq_words(q.T), awq_words(zeros.T)
    w = from_awq(qweight, qzeros, scales.T, group_size=GROUP)
    assert_weights(w, q, scales, zeros)
    back = to_awq(w)
    assert np.array_equal(back["qweight"], qweight)
    assert np.array_equal(back["qzeros"], qzeros)
    assert np.array_equal(back["scales"], scales.T)
    assert [back[name].dtype.name for name in back] == ["int32", "int32", "float16"]


def test_awq_words_by_hand():
    """0x75316420 holds the columns' own numbers: nibbles 0, 2, 4, 6, 1, 3, 5, 7 from the lowest."""
    qweight = np.full((32, 1), 0x75316420, np.int32)
    w = from_awq(qweight, None, np.ones((1, 8), np.float16), group_size=32)
    assert w.q[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert w.zeros is None


def compressed_file(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    n, k = q.shape
    packed = [[word([q[r, 8 * c + i] for i in range(8)]) for c in range(k // 8)] for r in range(n)]
    points = [
        [word([zeros[8 * r + i, g] if 8 * r + i < n else 0 for i in range(8)]) for g in range(zeros.shape[1])]
        for r in range(-(-n // 8))
    ]
    file = {
        "weight_packed": np.array(packed, np.int32),
        "weight_scale": scales,
        "weight_shape": np.array([n, k], np.int64),
    }
    return file if (zeros == 8).all() else file | {"weight_zero_point": np.array(points, np.int32)}


@pytest.mark.parametrize("n", [1, 7, 8, 13, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors(symmetric, n):
    q, scales, zeros = (x[:n] for x in sample(8, symmetric=symmetric))
    file = compressed_file(q, scales, zeros)
    w = from_compressed_tensors(**file, group_size=GROUP)
    assert_weights(w, q, scales, zeros)
    back = to_compressed_tensors(w)
    assert set(back) == set(file)
    for name, array in file.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array), name
    unset = np.full(K, -1, np.int32)  # the library's value of a g_idx that was never computed
    assert from_compressed_tensors(**file, weight_g_idx=unset, group_size=GROUP).perm is None


def test_compressed_tensors_signed_zero_points():
    """Older writers kept one int8 a zero point, on the signed scale of the codes."""
    q, scales, zeros = sample(9)
    file = compressed_file(q, scales, zeros) | {"weight_zero_point": zeros.astype(np.int8) - np.int8(8)}
    assert_weights(from_compressed_tensors(**file, group_size=GROUP), q, scales, zeros)
    file["weight_zero_point"][3, 1] = 8
    with pytest.raises(FormatError, match=r"weight_zero_point: expected -8\.\.7, got 8"):
        from_compressed_tensors(**file, group_size=GROUP)


def q4_rows(q: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
    rows = []
    for n in range(len(q)):
        row = b""
        for b in range(q.shape[1] // 32):
            row += np.float16(scales[n, b]).tobytes()
            if mins is not None:
                row += np.float16(mins[n, b]).tobytes()
            row += bytes(int(q[n, 32 * b + j]) | int(q[n, 32 * b + j + 16]) << 4 for j in range(16))
        rows.append(list(row))
    return np.array(rows, np.uint8)


def test_q4_0():
    q, scales, zeros = sample(10, symmetric=True)
    rows = q4_rows(q, scales, None)
    w = from_q4_0(rows)
    assert_weights(w, q, scales, zeros)
    assert np.array_equal(to_q4_0(w), rows)


def test_q4_1():
    q, scales, zeros = sample(11)
    scales = (np.rint(scales.astype(np.float64) * 1024) / 1024).astype(np.float16)  # 7 bits, so that d z fits in 11
    scales[2, 1] = 0
    mins = -scales.astype(np.float64) * zeros
    rows = q4_rows(q, scales, mins)
    w = from_q4_1(rows, name="t")
    zeros[2, 1] = 0  # d = 0 says nothing about z, and needs nothing
    assert_weights(w, q, scales, zeros)
    again = from_q4_1(to_q4_1(w))
    assert_weights(again, q, scales, zeros)
    assert np.array_equal(to_q4_1(again), to_q4_1(w))

    mins[5, 1] += 0.25 * float(scales[5, 1])
    with pytest.raises(
        FormatError, match=r"t: .*not representable without loss.* in row 5, block 1, .* 1 of 32 blocks"
    ):
        from_q4_1(q4_rows(q, scales, mins), name="t")
    mins[5, 1] = -16 * float(scales[5, 1])
    with pytest.raises(FormatError, match="not representable"):
        from_q4_1(q4_rows(q, scales, mins))
    mins[5, 1], scales[5, 1] = 1, 0
    with pytest.raises(FormatError, match="not representable"):
        from_q4_1(q4_rows(q, scales, mins))


def test_ggml_agrees():
    gguf = pytest.importorskip("gguf", reason="the format's own library")
    data = np.random.default_rng(12).standard_normal((6, 96)).astype(np.float32)
    rows = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_0)
    w = from_q4_0(rows)
    assert np.array_equal(w.dequantize(), gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_0))
    ours = to_q4_1(from_q4_0(rows))  # -8 d is always a float16
    assert np.array_equal(gguf.quants.dequantize(ours, gguf.GGMLQuantizationType.Q4_1), w.dequantize())


def test_wide_groups_become_blocks_of_32():
    q, scales, _ = sample(13)
    w = Int4Weights(q, scales[:, :1], None, K)
    assert np.array_equal(from_q4_0(to_q4_0(w)).dequantize(), w.dequantize())


def hqq_file(q: np.ndarray) -> np.ndarray:
    groups = q.reshape(-1, GROUP)
    half = len(groups) // 2
    return np.array(
        [[int(groups[r, c]) << 4 | int(groups[r + half, c]) for c in range(GROUP)] for r in range(half)], np.uint8
    )


def test_hqq():
    q, scales, zeros = sample(15)
    W_q, scale, zero = hqq_file(q), scales.reshape(-1, 1), zeros.astype(np.float16).reshape(-1, 1)
    w = from_hqq(W_q, scale, zero, (N, K), group_size=GROUP)
    assert_weights(w, q, scales, zeros)
    back = to_hqq(w)
    assert np.array_equal(back["W_q"], W_q)
    assert np.array_equal(back["scale"], scale)
    assert back["zero"].dtype == np.float16
    assert np.array_equal(back["zero"], zero)
    assert back["shape"] == (N, K)

    zero[7, 0] = 7.5
    with pytest.raises(
        FormatError, match=r"p\.zero: .*not representable without loss.* got 7.5 in group 7, .* 1 of 32"
    ):
        from_hqq(W_q, scale, zero, (N, K), group_size=GROUP, name="p")
    for outside in (16, -1):
        zero[7, 0] = outside
        with pytest.raises(FormatError, match="not representable"):
            from_hqq(W_q, scale, zero, (N, K), group_size=GROUP)
    with pytest.raises(FormatError, match="axis: expected 1"):
        from_hqq(W_q, scale, zero, (N, K), group_size=GROUP, axis=0)
    with pytest.raises(FormatError, match="even number of groups"):
        from_hqq(W_q, scale, zero, (1, 32), group_size=GROUP)
    with pytest.raises(FormatError, match=r"W_q: expected uint8 \[8, 32\]"):
        from_hqq(W_q, scale[:16], zero[:16], (N // 2, K), group_size=GROUP)


# ---- round trips ---------------------------------------------------------------------------------------------------


@st.composite
def weights(draw):
    size = draw(st.sampled_from([8, 16, 32, 64]))
    n, k = 8 * draw(st.integers(1, 3)), size * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from([np.float16, np.float32]))
    scales = (rng.standard_normal((n, k // size)) * 10.0 ** draw(st.integers(-7, 3))).astype(kind)
    zeros = None if draw(st.booleans()) else rng.integers(0, 16, scales.shape, dtype=np.uint8)
    if zeros is not None:
        zeros[0, 0] = 7  # not 8 everywhere, which would come back as None
    perm = None
    if draw(st.booleans()) and k > size:
        g_idx = rng.permutation(np.arange(k) // size)
        perm = np.argsort(g_idx, kind="stable").astype(np.int32)
        perm = None if np.array_equal(perm, np.arange(k)) else perm
    return Int4Weights(rng.integers(0, 16, (n, k), dtype=np.uint8), scales, zeros, size, perm)


def assert_same(a: Int4Weights, b: Int4Weights) -> None:
    assert a.group_size == b.group_size
    assert a.scales.dtype == b.scales.dtype
    for name in ("q", "scales", "zeros", "perm"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        assert x is None or np.array_equal(x, y), name


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from([1, 2]))
def test_round_trips(w, version):
    assert_same(from_gptq(**to_gptq(w, version=version), group_size=w.group_size, version=version), w)
    assert_same(from_compressed_tensors(**to_compressed_tensors(w), group_size=w.group_size), w)
    if w.perm is None:
        assert_same(from_awq(**to_awq(w), group_size=w.group_size), w)
        if w.scales.size % 2 == 0:
            assert_same(from_hqq(**to_hqq(w), group_size=w.group_size), w)
        if w.zeros is None and w.scales.dtype == np.float16 and w.group_size == 32:
            assert_same(from_q4_0(to_q4_0(w)), w)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_any_words_survive(seed):
    """Tensors of random bits come back bit for bit: nothing is lost on the way in."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(np.int32)
    scales = rng.uniform(0.01, 1, (2, 16)).astype(np.float16)

    def bits(*shape: int) -> np.ndarray:
        return rng.integers(info.min, info.max, shape, dtype=np.int32, endpoint=True)

    file = {"qweight": bits(8, 16), "qzeros": bits(2, 2), "scales": scales}
    for version in (1, 2):
        back = to_gptq(from_gptq(**file, group_size=32, version=version), version=version)
        assert all(np.array_equal(back[name], file[name]) for name in file)
    file = {"qweight": bits(64, 2), "qzeros": bits(2, 2), "scales": scales}
    back = to_awq(from_awq(**file, group_size=32))
    assert all(np.array_equal(back[name], file[name]) for name in file)


# ---- the kernels on the result -------------------------------------------------------------------------------------


def assert_product(out: np.ndarray, a: np.ndarray, w: np.ndarray) -> None:
    """A sum of K products in float32 is off by at most (K + 2) 2^-24 of the sum of their sizes (2 for the scaling)."""
    exact = a.astype(np.float64) @ w.T
    bound = (a.shape[1] + 2) * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(w).T)
    assert (np.abs(out - exact) <= bound + 1e-30).all()


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors", "hqq", "q4_0"])
def test_gemm_of_a_converted_layer(name):
    q, scales, zeros = sample(16, symmetric=name == "q4_0")
    w = {
        "gptq": lambda: from_gptq(*gptq_file(q, zeros, 1), scales.T, group_size=GROUP),
        "awq": lambda: from_awq(awq_words(q.T), awq_words(zeros.T), scales.T, group_size=GROUP),
        "compressed-tensors": lambda: from_compressed_tensors(**compressed_file(q, scales, zeros), group_size=GROUP),
        "hqq": lambda: from_hqq(
            hqq_file(q), scales.reshape(-1, 1), zeros.astype(np.float32).reshape(-1, 1).astype(np.float16), (N, K),
            group_size=GROUP,
        ),
        "q4_0": lambda: from_q4_0(q4_rows(q, scales, None)),
    }[name]()  # fmt: skip
    packed = assay.pack(**w.pack_args())
    assert (packed.n, packed.k, packed.group_size, packed.symmetric) == (N, K, GROUP, w.zeros is None)
    assert np.array_equal(packed.dequantize(), w.dequantize())
    a = np.random.default_rng(17).standard_normal((5, K)).astype(np.float32)
    assert_product(assay.w4a16_gemm(a, packed), a, matrix(q, scales, zeros, PLAIN))


def test_pack_args_odd_k():
    w = Int4Weights(np.array([[1, 2, 3]], np.uint8), np.ones((1, 1), np.float16), None, 3)
    assert w.pack_args()["qweight"].tolist() == [[0x21, 0x03]]
    assert assay.pack(**w.pack_args()).dequantize().tolist() == [[-7, -6, -5]]


def test_bfloat16_scales():
    q, _, zeros = sample(18)
    raw = np.random.default_rng(19).integers(0x3A00, 0x3F80, (N, G), dtype=np.uint16)
    wanted = np.array([[float(int(x) & 0x7F | 0x80) * 2.0 ** ((int(x) >> 7) - 134) for x in row] for row in raw])
    file = compressed_file(q, raw, zeros)
    w = from_compressed_tensors(**file, group_size=GROUP, scales_dtype="bfloat16")
    assert w.scales.dtype == np.float32
    assert np.array_equal(w.scales, wanted)
    with pytest.raises(FormatError, match=r"weight_scale: expected float16 or float32 .* got uint16"):
        from_compressed_tensors(**file, group_size=GROUP)
    raw[0, 0] = 0x7F80
    with pytest.raises(FormatError, match=r"weight_scale: expected finite scales, got inf at \[0, 0\]"):
        from_compressed_tensors(**file, group_size=GROUP, scales_dtype="bfloat16")
    with pytest.raises(ValueError, match="scales_dtype: expected"):
        from_compressed_tensors(**file, group_size=GROUP, scales_dtype="float64")


# ---- live: the formats' own libraries ------------------------------------------------------------------------------


def test_compressed_tensors_library_agrees():
    torch = pytest.importorskip("torch", reason="compressed-tensors works on torch tensors")
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="the format's own library"
    )
    q, scales, zeros = (x[:13] for x in sample(23))
    ours = to_compressed_tensors(Int4Weights(q, scales, zeros, GROUP))
    signed = torch.from_numpy(q.astype(np.int8) - np.int8(8))
    points = torch.from_numpy(zeros.astype(np.int8) - np.int8(8))
    assert np.array_equal(helpers.pack_to_int32(signed, 4).numpy(), ours["weight_packed"])
    assert np.array_equal(helpers.pack_to_int32(points, 4, packed_dim=0).numpy(), ours["weight_zero_point"])
