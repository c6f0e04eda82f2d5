"""The probes do what they say, on the emulator."""

import numpy as np
import pytest
from emulator import emulate


@pytest.mark.parametrize("seed", [0, 1])
def test_read_reads_every_byte_once_a_repeat(seed):
    data = np.random.default_rng(0).integers(0, 2**32, 8 * 3001, dtype=np.uint32)
    sink = np.zeros(3, np.uint32)
    counted = emulate(
        "assay_probe_read", 3, {"from": data, "bytes": data.nbytes, "repeats": 3, "sink": sink}, seed=seed
    )
    assert np.bitwise_xor.reduce(sink) == np.bitwise_xor.reduce(data)
    assert counted.ldg_bytes == 3 * data.nbytes
    assert counted.global_sectors == 3 * data.nbytes // 32 + sink.size


def test_write_writes_every_byte_once_a_repeat():
    data = np.zeros(8 * 1001, np.uint32)
    counted = emulate("assay_probe_write", 2, {"to": data, "bytes": data.nbytes, "value": 0xABCD1234, "repeats": 3})
    assert (data == 0xABCD1234).all()
    assert counted.st_bytes == 3 * data.nbytes == 32 * counted.global_sectors


def test_empty_does_nothing_but_what_it_is_told():
    sink = np.zeros(1, np.uint32)
    assert emulate("assay_probe_empty", 5, {"sink": None}).st_bytes == 0
    emulate("assay_probe_empty", 1, {"sink": sink, "value": 7})
    assert sink[0] == 7


@pytest.mark.parametrize(
    ("name", "one", "k"), [("f16", 0x3C003C00, 16), ("bf16", 0x3F803F80, 16), ("s8", 0x01010101, 32)]
)
def test_mma_does_as_many_as_it_says(name, one, k):
    sink = np.zeros(2 * 256, np.int32 if name == "s8" else np.float32)
    counted = emulate(f"assay_probe_mma_{name}", 2, {"a": one, "b": one, "repeats": 5, "sink": sink})
    assert counted.mma == 2 * 8 * 8 * 5
    assert (sink == 8 * 4 * 5 * k).all()


def test_atomics_all_count():
    counters = np.zeros(7, np.uint32)
    counted = emulate("assay_probe_atomic", 2, {"counters": counters, "slots": 7, "repeats": 3}, seed=2)
    assert counters.sum() == counted.atomics == 2 * 256 * 3
    assert counters.max() - counters.min() <= 3
