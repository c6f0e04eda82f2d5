"""Python, launcher and driver together, on the mock driver."""

import numpy as np
import pytest

import assay
from assay._ffi import ffi, lib


def read_probe(cuda, data, blocks=2, stream=None):
    """The exclusive or of an array's words, by the bandwidth probe; a DeviceArray."""
    sink = cuda.empty(blocks, "uint32", data.device, stream=stream).fill(0)
    args = ffi.new("assay_probe_read_args *", {"from": ffi.cast("void *", data.address), "bytes": data.nbytes, "repeats": 1,
                                               "sink": ffi.cast("void *", sink.address)})  # fmt: skip
    with cuda.current(data.device):
        status = lib.assay_cuda_launch(b"assay_probe_read", blocks, 1, 1, 32, ffi.cast("void *", sink.stream), args,
                                       ffi.sizeof("assay_probe_read_args"))  # fmt: skip
    return status, sink


def words(n=4096, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)


def test_a_kernel_runs_end_to_end(gpu):
    data = words()
    status, sink = read_probe(gpu, gpu.to_device(data))
    assert status == lib.ASSAY_OK
    assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(data)
