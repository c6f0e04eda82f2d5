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
