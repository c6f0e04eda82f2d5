"""INT4 layouts: what a format or a file cannot hold is refused with its name, what was wanted and what came."""

import numpy as np
import pytest

from assay.errors import FormatError
from assay.formats.int4 import (
    Int4Weights,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    from_q4_0,
    to_awq,
    to_compressed_tensors,
    to_gptq,
    to_hqq,
    to_q4_0,
    to_q4_1,
)
from test_formats_int4 import GROUP, G, K, N, awq_words, compressed_file, gptq_file, q4_rows, sample


def test_q4_refusals():
    q, scales, zeros = sample(14)
    with pytest.raises(FormatError, match="zeros: expected 8 everywhere"):
        to_q4_0(Int4Weights(q, scales, zeros, GROUP))
    with pytest.raises(FormatError, match=r"group_size: expected a multiple of 32 .* got 16"):
        to_q4_0(Int4Weights(q, np.repeat(scales, 2, 1), None, 16))
    fine = scales.astype(np.float32)
    assert np.array_equal(to_q4_0(Int4Weights(q, fine, None, GROUP)), q4_rows(q, scales, None))
    fine[4, 1] = 0.1
    with pytest.raises(FormatError, match=r"scales: expected values that float16 holds exactly .* at \[4, 1\]"):
        to_q4_0(Int4Weights(q, fine, None, GROUP))
    fine[4, 1] = 1e30
    with pytest.raises(FormatError, match="float16 holds exactly"):
        to_q4_0(Int4Weights(q, fine, None, GROUP))
    full = np.full((N, G), 1 + 2**-10, np.float16)  # 11 bits: 3 d needs 12 or 13
    with pytest.raises(FormatError, match=r"zeros: expected minimums .* in 32 of 32 blocks"):
        to_q4_1(Int4Weights(q, full, np.full((N, G), 3, np.uint8), GROUP))
    with pytest.raises(FormatError, match=r"x: expected rows of whole Q4_0 blocks \(18 bytes\), got uint8 \[2, 19\]"):
        from_q4_0(np.zeros((2, 19), np.uint8), name="x")
    rows = q4_rows(q, scales, None)
    rows[3, 18:20] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(FormatError, match="expected a finite scale, got inf in row 3, block 1"):
        from_q4_0(rows)


def test_gptq_refusals():
    q, scales, zeros = sample(20)
    qweight, qzeros = gptq_file(q, zeros, 1)
    s = scales.T
    with pytest.raises(FormatError, match=r"l\.qweight: expected K to be a multiple of group_size = 48 .* got K = 64"):
        from_gptq(qweight, qzeros, s, group_size=48, name="l")
    with pytest.raises(FormatError, match=r"scales: expected .* \[1, 16\] .* got float16 \[2, 16\]"):
        from_gptq(qweight, qzeros, s, group_size=64)
    with pytest.raises(FormatError, match=r"qzeros: expected .* \[2, 2\] .* got int32 \[1, 2\]"):
        from_gptq(qweight, qzeros[:1], s, group_size=GROUP)
    with pytest.raises(FormatError, match=r"qweight: expected N to be a multiple of 8 .* got N = 15"):
        from_gptq(qweight[:, :15], qzeros, s[:, :15], group_size=GROUP)
    with pytest.raises(FormatError, match=r"qweight: expected int32 or uint32 \[\*, \*\] .* got int64"):
        from_gptq(qweight.astype(np.int64), qzeros, s, group_size=GROUP)
    with pytest.raises(FormatError, match=r"qweight: expected .* got int32 .*2, 8, 16"):
        from_gptq(np.stack([qweight, qweight]), qzeros, s, group_size=GROUP)
    with pytest.raises(FormatError, match="qweight: expected K to be a multiple of 8"):
        from_gptq(qweight[:0], qzeros[:0], s[:0], group_size=-1)
    with pytest.raises(FormatError, match="group_size"):
        from_gptq(qweight, qzeros, s, group_size=0)
    with pytest.raises(FormatError, match=r"g_idx: expected int32 or int64 \[64\] .* got int32 \[63\]"):
        from_gptq(qweight, qzeros, s, np.zeros(63, np.int32), group_size=GROUP)
    with pytest.raises(FormatError, match=r"g_idx: expected groups 0\.\.1, got 2"):
        from_gptq(qweight, qzeros, s, np.full(64, 2, np.int32), group_size=GROUP)
    with pytest.raises(FormatError, match="g_idx: expected every group 32 times, got group 0 64 times"):
        from_gptq(qweight, qzeros, s, np.zeros(64, np.int32), group_size=GROUP)
    with pytest.raises(FormatError, match=r"g_idx: expected groups 0\.\.1, got -5"):
        from_gptq(qweight, qzeros, s, np.full(64, -5, np.int32), group_size=GROUP)
    with pytest.raises(FormatError, match="scales: expected finite"):
        from_gptq(qweight, qzeros, s * np.float16(np.nan), group_size=GROUP)
    with pytest.raises(TypeError, match=r"qweight: expected numpy\.ndarray, got list"):
        from_gptq([[1]], qzeros, s, group_size=GROUP)
    with pytest.raises(ValueError, match="version: expected 1 or 2"):
        from_gptq(qweight, qzeros, s, group_size=GROUP, version=3)
    with pytest.raises(ValueError, match="version: expected 1 or 2"):
        to_gptq(Int4Weights(q, scales, zeros, GROUP), version=0)
    with pytest.raises(ValueError, match="zero_16: expected"):
        from_gptq(qweight, qzeros, s, group_size=GROUP, zero_16="clip")


def test_other_refusals():
    q, scales, zeros = sample(21)
    with pytest.raises(FormatError, match=r"qweight: expected K to be a multiple of 8 .* got K = 60"):
        from_awq(awq_words(q.T[:60]), None, scales.T, group_size=20)
    with pytest.raises(FormatError, match=r"qzeros: expected .* \[2, 2\] .* got int32 \[2, 1\]"):
        from_awq(awq_words(q.T), awq_words(zeros.T)[:, :1], scales.T, group_size=GROUP)
    file = compressed_file(q, scales, zeros)
    with pytest.raises(FormatError, match=r"weight_shape: expected K to be a multiple of 8 .* got K = 60"):
        from_compressed_tensors(**file | {"weight_shape": np.array([N, 60])}, group_size=GROUP)
    with pytest.raises(FormatError, match=r"weight_packed: expected .* \[16, 16\] .* got int32 \[16, 8\]"):
        from_compressed_tensors(**file | {"weight_shape": np.array([N, 128])}, group_size=GROUP)
    with pytest.raises(FormatError, match="weight_shape: expected N >= 1"):
        from_compressed_tensors(**file | {"weight_shape": np.array([-1, 64])}, group_size=GROUP)
    with pytest.raises(FormatError, match=r"weight_zero_point: expected .* \[2, 2\] .* got int32 \[1, 2\]"):
        from_compressed_tensors(**file | {"weight_zero_point": file["weight_zero_point"][:1]}, group_size=GROUP)
    narrow = Int4Weights(q[:12], scales[:12], None, GROUP)
    for refuses in (to_gptq, to_awq):
        with pytest.raises(FormatError, match="N to be a multiple of 8"):
            refuses(narrow)
    short = Int4Weights(q[:, :60], scales, None, 30)
    for refuses in (to_gptq, to_awq, to_compressed_tensors, to_hqq):
        with pytest.raises(FormatError, match="K to be a multiple of 8"):
            refuses(short)


def test_weights_check_themselves():
    q, scales, zeros = sample(22)
    for change, message in [
        ({"q": q + np.uint8(1)}, r"q: expected 0\.\.15, got 16"),
        ({"q": q.astype(np.int32)}, "q: expected uint8"),
        ({"q": q[:0]}, "N, K >= 1"),
        ({"group_size": 24}, "group_size: expected a divisor of K = 64, got 24"),
        ({"group_size": 0}, "group_size: expected a divisor"),
        ({"scales": scales[:, :1]}, r"scales: expected float16 or float32 \[16, 2\], got float16 \[16, 1\]"),
        ({"scales": scales.astype(np.float64)}, "scales: expected float16 or float32"),
        ({"scales": np.full_like(scales, np.inf)}, "scales: expected finite"),
        ({"zeros": zeros + np.uint8(16)}, r"zeros: expected 0\.\.15"),
        ({"perm": np.zeros(K, np.int32)}, r"perm: expected every number of 0\.\.63 once"),
    ]:
        with pytest.raises(ValueError, match=message):
            Int4Weights(**{"q": q, "scales": scales, "zeros": zeros, "group_size": GROUP} | change)
