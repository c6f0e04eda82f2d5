"""Dequantisers: every bit as the gguf package has it."""

import numpy as np
import pytest

from assay.errors import FormatError
from assay.formats.dequant import GGML_TYPES, SUPPORTED, dequantize_rows

gguf = pytest.importorskip("gguf")

# Byte offsets of the f16 scales in a block.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,),
}  # fmt: skip
BLOCKS = {t.name: t for t in GGML_TYPES.values()}


def theirs(rows: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])


def assert_same_bits(ours: np.ndarray, wanted: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == wanted.shape
    assert np.array_equal(ours.view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32))


def test_the_table_is_the_packages():
    wanted = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    mine = {i: tuple(t) for i, t in GGML_TYPES.items()}
    assert {i: mine.get(i) for i in wanted} == wanted


@pytest.mark.parametrize("name", SUPPORTED)
def test_random_blocks(name):
    block_bytes = BLOCKS[name].block_bytes
    rows = np.random.default_rng(1).integers(0, 256, (64, 24 * block_bytes), np.uint8)
    assert_same_bits(dequantize_rows(rows, name), theirs(rows, name))


@pytest.mark.parametrize("name", list(SCALES))
def test_every_finite_scale(name):
    """All 63488 finite f16 patterns (both zeros, subnormals) as every scale of the block, payload random."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7C00) != 0x7C00]
    rng = np.random.default_rng(2)
    for at in SCALES[name]:
        blocks = rng.integers(0, 256, (len(bits), BLOCKS[name].block_bytes), np.uint8)
        for other in SCALES[name]:
            blocks[:, other + 1] &= 0xBB  # keep the other scale finite
        blocks[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
        rows = blocks.reshape(-1, 2 * BLOCKS[name].block_bytes)
        ours = dequantize_rows(rows, name)
        assert_same_bits(ours, theirs(rows, name))
        assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half(name):
    rows = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(16, -1)
    assert_same_bits(dequantize_rows(rows, name), theirs(rows, name))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_values_of_the_packages_quantizer(name):
    w = np.random.default_rng(3).standard_normal((7, 96)).astype(np.float32)
    rows = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])
    ours = dequantize_rows(rows, name)
    assert_same_bits(ours, theirs(rows, name))
    step = {"Q8_0": 1 / 127, "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q4_0": 1 / 8, "Q4_1": 1 / 15}[name]
    assert np.abs(ours - w).max() <= step * 2 * np.abs(w).max()


def test_q4_0_by_hand():
    block = np.zeros(18, np.uint8)
    block[:2] = np.array([0.5], "<f2").view(np.uint8)
    block[2] = 0xF3  # weight 0 is 3, weight 16 is 15
    out = dequantize_rows(block[None], "Q4_0")[0]
    assert (out[0], out[16], out[1], out[17]) == (-2.5, 3.5, -4.0, -4.0)


def test_q4_k_scales_by_hand():
    block = np.zeros(144, np.uint8)
    block[:4] = np.array([1.0, 1.0], "<f2").view(np.uint8)
    block[4] = 0b10_000101  # scale 0 is 5, and two bits for scale 4
    block[12] = 0b0000_0011  # low nibble of scale 4
    block[8] = 0b01_000010  # min 0 is 2, and two bits for min 4
    block[16] = 0x07
    block[16 + 64] = 0x01
    out = dequantize_rows(block[None], "Q4_K")[0]
    assert out[0] == 5 * 7 - 2
    assert out[1] == -2
    assert out[128] == (3 + 32) * 1 - 16


@pytest.mark.parametrize("name", SUPPORTED)
def test_strided_rows_and_chunks(name):
    """More rows than a chunk, taken with a stride, equal the rows one by one."""
    row_bytes = 2 * BLOCKS[name].block_bytes
    rows = np.random.default_rng(4).integers(0, 256, (9000, row_bytes), np.uint8)[::3]
    ours = dequantize_rows(rows, name)
    for at in (0, 1, 511, 512, 1499, 2999):
        assert_same_bits(ours[at : at + 1], theirs(np.ascontiguousarray(rows[at : at + 1]), name))


def test_no_rows():
    assert dequantize_rows(np.empty((0, 36), np.uint8), "Q4_0").shape == (0, 64)


def test_refuses():
    with pytest.raises(FormatError, match=r"type IQ2_XS: expected one of F32, .* to dequantise"):
        dequantize_rows(np.zeros((1, 74), np.uint8), "IQ2_XS")
    with pytest.raises(FormatError, match="expected a multiple of 18 bytes"):
        dequantize_rows(np.zeros((1, 19), np.uint8), "Q4_0")
    with pytest.raises(ValueError, match="expected uint8"):
        dequantize_rows(np.zeros((1, 18), np.int8), "Q4_0")
