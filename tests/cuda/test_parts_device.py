"""Parts of device arrays, weights read back from a GPU, layers on packed weights, probes from Python; on the mock driver."""

import numpy as np
import pytest

import assay
from assay.cuda import probe
from assay.cuda.moe_experts import DeviceExperts
from assay.cuda.verify import outputs
from assay.ops import moe_experts


def test_a_part_is_the_same_memory_and_keeps_it(gpu):
    whole = gpu.to_device(np.arange(64, dtype=np.float32))
    part = whole.part(16, (2, 3), "float32")
    assert (part.numpy() == np.arange(4, 10).reshape(2, 3)).all()
    part.copy_from(np.full((2, 3), -1, np.float32))
    assert (whole.numpy()[4:10] == -1).all()
    del whole
    assert (part.numpy() == -1).all()
    tail = part.part(4, (1,), "uint32")
    del part
    assert tail.numpy()[0] == np.float32(-1).view(np.uint32)


@pytest.mark.parametrize(("offset", "shape"), [(-4, (1,)), (61, (1,)), (0, (17,)), (64, (1,))])
def test_a_part_beyond_the_whole_is_refused(gpu, offset, shape):
    whole = gpu.empty(16, "float32")
    with pytest.raises(ValueError, match="part: expected at most 64 bytes"):
        whole.part(offset, shape, "float32")


@pytest.mark.parametrize(
    ("n", "k", "group", "symmetric"),
    [(32, 128, 32, True), (40, 96, 32, False), (70, 256, 128, False), (33, 75, 75, True), (64, 640, 64, False)],
)
def test_weights_come_back_as_they_were_packed(gpu, n, k, group, symmetric):
    rng = np.random.default_rng(n)
    qweight = rng.integers(0, 256, (n, (k + 1) // 2), dtype=np.uint8)
    if k % 2:
        qweight[:, -1] &= 15
    scales = rng.standard_normal((n, k // group)).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 16, scales.shape, dtype=np.uint8)
    w = assay.pack(qweight, scales, zeros, k=k, group_size=group).to_device(0)
    for columns in (None, 1, 32, n):
        got = w.unpack(columns)
        rows = slice(None if columns is None else columns)
        np.testing.assert_array_equal(got[0], qweight[rows])
        np.testing.assert_array_equal(got[1], scales[rows])
        assert (got[2] is None) == symmetric
        if zeros is not None:
            np.testing.assert_array_equal(got[2], zeros[rows])


def test_a_layer_on_packed_weights_is_the_layer(gpu):
    rng = np.random.default_rng(3)
    packed = moe_experts.quantize_experts(
        rng.standard_normal((3, 96, 64)).astype(np.float32), rng.standard_normal((3, 64, 48)).astype(np.float32),
        symmetric=False, group_size=32, down_group_size=48,
    )  # fmt: skip
    first = packed.to_device(0)
    again = DeviceExperts.like(packed, first.gate_up, first.down)
    x, ids = rng.standard_normal((4, 64)).astype(np.float32), np.array([[0, 2], [1, 0], [2, 1], [0, 1]], np.int32)
    weights = np.full(ids.shape, 0.5, np.float32)
    args = [gpu.to_device(a) for a in (x, ids, weights)]
    want = assay.moe_experts(*args, first).numpy()
    np.testing.assert_array_equal(assay.moe_experts(*args, again).numpy(), want)
    for e in range(3):
        for there, here in zip(again.expert(e), packed.expert(e), strict=True):
            for got, kept in zip(there.unpack(), here.unpack(), strict=True):
                np.testing.assert_array_equal(got, kept)


def test_outputs_are_what_verification_takes(gpu):
    logits = gpu.to_device(np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32))
    best = logits.numpy().argmax(1).astype(np.int32)
    cu = np.array([0, 2, 3], np.int32)
    out = outputs(2, 2)
    got = assay.verify_chain(logits, best[[0, 1, 3]], cu, rule="greedy", temperature=0.0, out=out)
    assert got.output_token_ids is out[0]
    assert (out[1].numpy() == [2, 1]).all()


def test_probes_do_their_work_from_python(gpu):
    data = gpu.to_device(np.random.default_rng(1).integers(0, 2**32, 4096, dtype=np.uint32))
    sink = gpu.empty(256 * 2, "uint32").fill(0)
    probe.read(data, sink, 2)
    assert np.bitwise_xor.reduce(sink.numpy()[:2]) == np.bitwise_xor.reduce(data.numpy())
    probe.write(data, 2, repeats=2, value=7)
    assert (data.numpy() == 7).all()
    probe.empty(sink)
    for kind, k, dtype in (("f16", 16, "float32"), ("bf16", 16, "float32"), ("s8", 32, "int32")):
        sums = gpu.empty(256 * 2, dtype).fill(0)
        operations = probe.multiply(kind, sums, 2, 3)
        assert operations == 2 * 8 * 8 * 3 * 2 * 16 * 8 * k
        assert (sums.numpy() == 8 * 4 * 3 * k).all()
    counters = gpu.empty(8, "uint32").fill(0)
    assert probe.add(counters, 8, 2, 3) == counters.numpy().sum() == 2 * 256 * 3
