"""The AVX-VNNI, AVX-512 and AMX GEMMs on any x86 CPU with AVX2: the kernels' own source, their intrinsics emulated, against
portable C."""

import numpy as np
import pytest

from bf16 import BFloat16
from test_int4_gemm import SHAPES, activations, sizes, weights
from test_int8_gemm import weights as weights8
from test_wide_gemm import CASES, CODEBOOKS
from test_wide_gemm import SHAPES as WIDE_SHAPES
from test_wide_gemm import weights as weights_wide

#: Rows of a call, by tier: AMX leaves calls of few rows, up to 32 of wide weights, to AVX-512; its row blocks end at 32, its
#: tiles at 16.
ROWS = {
    "avxvnni": (1, 2, 3, 6, 7, 13),
    "avx512vnni": (1, 2, 3, 4, 5, 6, 7, 8, 13),
    "amx": (2, 7, 9, 12, 13, 16, 17, 32, 33, 41, 70),
}
TIERS = sorted(ROWS)
ROWS["avx512bf16"] = (1, 2, 3, 4, 5, 6, 7, 8, 13)  # of INT4 alone


def bits(array, ctype, ffi):
    return ffi.cast(ctype, array.__array_interface__["data"][0])


def tier(emulated, isa):
    """The number of a tier."""
    ffi, lib = emulated
    name, features = ffi.new("char **"), ffi.new("char **")
    supported, allowed = ffi.new("int *"), ffi.new("int *")
    for i in range(lib.assay_isa_count()):
        lib.assay_isa_info(i, name, features, supported, allowed)
        if ffi.string(name[0]).decode() == isa:
            return i
    raise AssertionError(f"no tier {isa}")


def aligned(ffi, size):
    """Memory on a cache line, and what keeps it alive."""
    raw = ffi.new("char[]", size + 64)
    return ffi.cast("void *", -(-int(ffi.cast("uintptr_t", raw)) // 64) * 64), raw


def run(emulated, isa, a16, a, packed, n, k, group_size, symmetric):
    """`a`: float32, or the bits of bfloat16 as uint16."""
    ffi, lib = emulated
    dtype = lib.ASSAY_F32 if a.dtype == np.float32 else lib.ASSAY_BF16
    w = ffi.new("assay_w4 *", {"n": n, "k": k, "group_size": group_size, "symmetric": symmetric, "data": packed[0]})
    out = np.full((len(a), n), np.nan, np.float32)
    size = lib.assay_w4_gemm_workspace(w, len(a), a16)
    status = (lib.assay_w4a16_gemm if a16 else lib.assay_w4a8_gemm)(
        w, bits(a, "void *", ffi), dtype, k, len(a), bits(out, "float *", ffi), n, tier(emulated, isa), 1,
        ffi.new("char[]", size), size,
    )  # fmt: skip
    assert status == lib.ASSAY_OK
    return out


def run8(emulated, isa, a, packed, n, k, group_size):
    ffi, lib = emulated
    w = ffi.new("assay_w8 *", {"n": n, "k": k, "group_size": group_size, "data": packed[0]})
    out = np.full((len(a), n), np.nan, np.float32)
    size = lib.assay_w8_gemm_workspace(w, len(a))
    status = lib.assay_w8a8_gemm(
        w, bits(a, "void *", ffi), lib.ASSAY_F32, k, len(a), bits(out, "float *", ffi), n, tier(emulated, isa), 1,
        ffi.new("char[]", size), size,
    )  # fmt: skip
    assert status == lib.ASSAY_OK
    return out


@pytest.mark.parametrize("isa", sorted(ROWS))
@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (32, 512, 512)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_int4_equals_portable_c_bit_for_bit(emulated, isa, n, k, group_size, symmetric):
    ffi, lib = emulated
    qweight, scales, zeros = weights(n, k, group_size, symmetric)
    size = lib.assay_w4_packed_bytes(n, k, group_size, symmetric)
    packed = aligned(ffi, size)
    status = lib.assay_w4_pack(
        n, k, group_size, bits(qweight, "uint8_t *", ffi), bits(scales, "uint16_t *", ffi),
        ffi.NULL if zeros is None else bits(zeros, "uint8_t *", ffi), packed[0], 1,
    )  # fmt: skip
    assert status == lib.ASSAY_OK
    for m in ROWS[isa]:
        a = activations(m, k)
        if m > 2:
            a[1, k // 2] = np.inf
        for a16 in (False, True):
            got = run(emulated, isa, a16, a, packed, n, k, group_size, symmetric)
            np.testing.assert_array_equal(got, run(emulated, "scalar", a16, a, packed, n, k, group_size, symmetric))
        half = BFloat16(a * sizes(a.shape)).bits
        got = run(emulated, isa, True, half, packed, n, k, group_size, symmetric)
        np.testing.assert_array_equal(got, run(emulated, "scalar", True, half, packed, n, k, group_size, symmetric))


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (32, 512, 512)])
def test_int8_equals_portable_c_bit_for_bit(emulated, isa, n, k, group_size):
    ffi, lib = emulated
    qweight, scales = weights8(n, k, group_size)
    packed = aligned(ffi, lib.assay_w8_packed_bytes(n, k, group_size))
    status = lib.assay_w8_pack(
        n, k, group_size, bits(qweight, "int8_t *", ffi), bits(scales, "uint16_t *", ffi), packed[0], 1
    )
    assert status == lib.ASSAY_OK
    for m in ROWS[isa]:
        a = activations(m, k)
        got = run8(emulated, isa, a, packed, n, k, group_size)
        np.testing.assert_array_equal(got, run8(emulated, "scalar", a, packed, n, k, group_size))


def run_wide(emulated, isa, a16, a, w, n, k):
    ffi, lib = emulated
    out = np.full((len(a), n), np.nan, np.float32)
    size = lib.assay_wide_gemm_workspace(w, len(a), a16)
    status = lib.assay_wide_gemm(
        w, bits(a, "void *", ffi), lib.ASSAY_F32, k, len(a), bits(out, "float *", ffi), n, a16, tier(emulated, isa), 1,
        ffi.new("char[]", size), size,
    )  # fmt: skip
    assert status == lib.ASSAY_OK
    return out


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("n", "k", "group_size"), WIDE_SHAPES)
@pytest.mark.parametrize(("width", "codebook"), CASES)
def test_wide_equals_portable_c_bit_for_bit(emulated, isa, n, k, group_size, width, codebook):
    ffi, lib = emulated
    book = CODEBOOKS.get(codebook)
    for minimum in (False, True):
        qweight, scales, low = weights_wide(n, k, group_size, width, minimum)
        packed = aligned(ffi, lib.assay_wide_packed_bytes(n, k, group_size, width, minimum))
        status = lib.assay_wide_pack(
            n, k, group_size, width, bits(qweight, "void *", ffi), bits(scales, "float *", ffi),
            ffi.NULL if low is None else bits(low, "float *", ffi), packed[0], 1,
        )  # fmt: skip
        assert status == lib.ASSAY_OK
        w = ffi.new(
            "assay_wide *",
            {"n": n, "k": k, "group_size": group_size, "bits": width, "has_minimum": minimum,
             "codebook": list(range(16)) if book is None else book.tolist(), "data": packed[0]},
        )  # fmt: skip
        for m in ROWS[isa]:
            a = activations(m, k)
            for a16 in (False, True):
                got = run_wide(emulated, isa, a16, a, w, n, k)
                np.testing.assert_array_equal(got, run_wide(emulated, "scalar", a16, a, w, n, k))
