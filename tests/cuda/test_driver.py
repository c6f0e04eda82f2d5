"""Python, launcher and driver together, on the mock driver."""

import os
import subprocess
import sys

import numpy as np
import pytest

import assay
from assay._ffi import ffi, lib

CUDA_CALL_ERRORS = [
    ("cuMemAlloc_v2", 2, "DeviceMemoryError", "memory is full"),
    ("cuMemAlloc_v2", 999, "CudaError", "cuMemAlloc"),
    ("cuMemcpyHtoDAsync_v2", 700, "CudaError", "start a new process"),
    ("cuDevicePrimaryCtxRetain", 2, "DeviceMemoryError", "memory is full"),
    ("cuDeviceGetAttribute", 1, "CudaError", "cuDeviceGetAttribute"),
    ("cuInit", 100, "UnsupportedError", "CUDA_VISIBLE_DEVICES"),
    ("cuInit", 34, "UnsupportedError", "stub"),
    ("cuStreamCreate", 709, "CudaError", "no usable CUDA context"),
]


def read_probe(cuda, data, blocks=2, stream=None, sink=None):
    """The exclusive or of an array's words, by the bandwidth probe: a status and a DeviceArray."""
    if sink is None:
        sink = cuda.empty(blocks, "uint32", data.device, stream=stream).fill(0)
    args = ffi.new(
        "assay_probe_read_args *",
        {
            "from": ffi.cast("void *", data.address),
            "bytes": data.nbytes,
            "repeats": 1,
            "sink": ffi.cast("void *", sink.address),
        },
    )
    with cuda.current(data.device):
        status = lib.assay_cuda_launch(
            b"assay_probe_read",
            blocks,
            1,
            1,
            32,
            ffi.cast("void *", sink.stream),
            args,
            ffi.sizeof("assay_probe_read_args"),
        )
    return status, sink


def message():
    return ffi.string(lib.assay_cuda_message()).decode()


def words(n=4096, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)


def test_a_kernel_runs_end_to_end(gpu):
    data = words()
    status, sink = read_probe(gpu, gpu.to_device(data))
    assert status == lib.ASSAY_OK
    assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(data)


@pytest.mark.parametrize(("call", "result", "kind", "text"), CUDA_CALL_ERRORS)
def test_a_call_that_fails_says_what_to_do(mock, call, result, kind, text):
    from assay import cuda

    mock.fail(call, result)
    with pytest.raises(getattr(cuda, kind, None) or getattr(assay, kind), match=text):
        cuda.to_device(words())
    assert assay.w4a16_gemm  # the process and its CPU ops go on


@pytest.mark.parametrize(
    ("call", "result", "status"),
    [
        ("cuLaunchKernel", 700, "ASSAY_CUDA_ESTICKY"),
        ("cuLaunchKernel", 719, "ASSAY_CUDA_ESTICKY"),
        ("cuLaunchKernel", 701, "ASSAY_CUDA_ECALL"),
        ("cuLibraryLoadData", 209, "ASSAY_CUDA_EIMAGE"),
        ("cuLibraryLoadData", 2, "ASSAY_CUDA_ENOMEM"),
        ("cuLibraryGetKernel", 500, "ASSAY_CUDA_EIMAGE"),
        ("cuKernelGetFunction", 2, "ASSAY_CUDA_ENOMEM"),
        ("cuKernelSetAttribute", 1, "ASSAY_CUDA_ECALL"),
        ("cuCtxGetId", 709, "ASSAY_CUDA_ECONTEXT"),
    ],
)
def test_a_launch_that_fails_is_a_status_and_the_next_one_runs(mock, call, result, status):
    from assay import cuda

    data = cuda.to_device(words())
    mock.fail(call, result)
    got, _ = read_probe(cuda, data)
    assert got == getattr(lib, status)
    assert call.removesuffix("_v2") in message()
    assert read_probe(cuda, data)[0] == lib.ASSAY_OK


def test_no_driver_is_named(monkeypatch):
    from assay import cuda

    monkeypatch.setenv("ASSAY_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    cuda.refresh()
    assert not cuda.is_available()
    with pytest.raises(assay.UnsupportedError, match=r"/nowhere/libcuda\.so\.1"):
        cuda.device_count()
    cuda.refresh()


def test_an_old_driver_is_named(mock):
    from assay import cuda

    mock.set(driver=11040)
    with pytest.raises(assay.UnsupportedError, match=r"supports CUDA 11\.4: 12\.0"):
        cuda.device_count()


def test_an_old_gpu_is_named(mock):
    from assay import cuda

    mock.set(major=7, minor=5)
    status, _ = read_probe(cuda, cuda.to_device(words()))
    assert status == lib.ASSAY_CUDA_EARCH
    assert "compute capability 7.5: 8.0" in message()


def test_no_such_gpu_is_named(mock):
    from assay import cuda

    with pytest.raises(assay.UnsupportedError, match="cuda:5: expected one of 2"):
        cuda.to_device(words(), 5)


def test_memory_runs_out_and_comes_back(mock):
    from assay import cuda

    mock.set(memory=1 << 20)
    with pytest.raises(MemoryError, match="memory is full"):
        cuda.empty(1 << 21, "uint8")
    assert cuda.to_device(words()).numpy().shape == (4096,)


def test_an_illegal_access_is_told_at_the_wait_and_stays(mock):
    from assay import cuda

    data = cuda.to_device(words())
    short = cuda.empty(1, "uint32").fill(0)
    status, _ = read_probe(cuda, data, blocks=200, sink=short)
    assert status == lib.ASSAY_OK
    with pytest.raises(cuda.CudaError, match="start a new process"):
        cuda.synchronize()
    assert "outside every buffer" in mock.last_error
    assert read_probe(cuda, data, sink=short)[0] == lib.ASSAY_CUDA_ESTICKY


def test_a_second_launch_loads_allocates_and_waits_for_nothing(mock):
    from assay import cuda

    data = cuda.to_device(words())
    _, sink = read_probe(cuda, data)
    calls = ["cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuMemAlloc_v2", "cuMemFree_v2",
             "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"]  # fmt: skip
    before = {call: mock.calls(call) for call in calls}
    assert read_probe(cuda, data, sink=sink)[0] == lib.ASSAY_OK
    assert {call: mock.calls(call) for call in calls} == before


def test_a_graph_runs_what_was_captured(mock):
    from assay import cuda

    first, second = words(seed=1), words(seed=2)
    data, stream = cuda.to_device(first), cuda.Stream()
    _, sink = read_probe(cuda, data, stream=stream)
    with stream.capture() as graph:
        assert read_probe(cuda, data, sink=sink)[0] == lib.ASSAY_OK
    for content in (first, second):
        data.copy_from(content)
        cuda.synchronize()
        sink.fill(0)
        graph.launch(stream)
        assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(content)


def test_a_cold_kernel_is_refused_in_a_capture_which_goes_on(mock):
    from assay import cuda

    data, stream = cuda.to_device(words()), cuda.Stream()
    sink = cuda.empty(2, "uint32", stream=stream).fill(0)
    stream.synchronize()
    cuda.synchronize()
    with stream.capture() as graph:
        assert read_probe(cuda, data, sink=sink)[0] == lib.ASSAY_CUDA_ECAPTURE
        assert "before the capture" in message()
    graph.launch(stream)
    cuda.warmup(prefix="assay_probe")
    with stream.capture() as graph:
        assert read_probe(cuda, data, sink=sink)[0] == lib.ASSAY_OK
    graph.launch(stream)
    assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(data.numpy())


def test_an_allocation_in_a_capture_is_refused_and_named(mock):
    from assay import cuda

    stream = cuda.Stream()
    with pytest.raises(cuda.CudaError, match="graph is being captured"), stream.capture():
        cuda.empty(1)


def test_two_contexts_of_one_device_each_load_the_kernel(mock):
    from assay import cuda

    data = words()
    assert read_probe(cuda, cuda.to_device(data))[0] == lib.ASSAY_OK
    context = mock.create_context(0)
    stream = cuda.Stream()
    inside = cuda.to_device(data, stream=stream)
    status, sink = read_probe(cuda, inside, stream=stream)
    assert status == lib.ASSAY_OK
    assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(data)
    del inside, sink, stream
    mock.destroy_context(context)
    assert read_probe(cuda, cuda.to_device(data))[0] == lib.ASSAY_OK


def test_two_devices(mock):
    from assay import cuda

    for device in (0, 1):
        data = words(seed=device)
        status, sink = read_probe(cuda, cuda.to_device(data, device))
        assert status == lib.ASSAY_OK
        assert sink.device == device
        assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(data)


def test_importing_assay_opens_no_driver():
    code = "import assay, assay.cuda, assay.ops.int4; assert 'libcuda' not in open('/proc/self/maps').read()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
