"""Every call of the driver's fails once: what is said, that the process goes on, and that the next call works."""

import re

import emulator
import numpy as np
import pytest
from test_driver import message, read_probe, words

from assay import cuda
from assay._ffi import ffi, lib
from assay.cuda import _status

TABLE = re.findall(r"X\((cu\w+), (cu\w+), \(", (emulator.CUDA / "driver.h").read_text())
REPORTING = ("cuGetErrorName", "cuGetErrorString")
OPENING = ("cuInit",)  # refused, it is refused until the driver is opened anew
CALLS = [(name, exported) for name, exported in TABLE if name not in REPORTING]
RESULTS = {
    2: (cuda.DeviceMemoryError, "the GPU's memory is full: free some"),
    700: (cuda.CudaError, "its CUDA context is lost: start a new process"),
    906: (cuda.CudaError, "a graph is being captured"),
    999: (cuda.CudaError, "CUDA Driver API's reference"),
}


def everything() -> None:
    """Makes every call of the driver's, and raises for the first that fails."""
    check = _status.check
    cuda.driver()
    assert cuda.device_count() == 2
    cuda.device(0)
    stream, other = cuda.Stream(), cuda.Stream()
    data = cuda.to_device(words(64), stream=stream)
    status, sink = read_probe(cuda, data, stream=stream)
    check(status, "read_probe")
    assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(words(64))
    free, total = cuda.memory_info()
    assert 0 < free < total
    handle, other_handle = (cuda._device.pointer(s.handle) for s in (stream, other))
    with cuda.current(0):
        blocks, ordinal = ffi.new("int *"), ffi.new("int *")
        check(lib.assay_cuda_occupancy(b"assay_probe_read", 32, blocks), "occupancy")
        check(lib.assay_cuda_pointer_device(ffi.cast("void *", data.address), ordinal), "pointer")
        assert (blocks[0] > 0, ordinal[0]) == (True, 0)
        to = ffi.new("void **")
        check(lib.assay_cuda_malloc(256, to), "malloc")
        check(
            lib.assay_cuda_copy(to[0], ffi.cast("void *", data.address), 256, lib.ASSAY_CUDA_ON_DEVICE, handle), "copy"
        )
        check(lib.assay_cuda_stream_wait(other_handle, handle), "wait")
        begin, end = ffi.new("void **"), ffi.new("void **")
        check(lib.assay_cuda_event_create(begin), "event")
        check(lib.assay_cuda_event_create(end), "event")
        check(lib.assay_cuda_event_record(begin[0], handle), "record")
        check(lib.assay_cuda_event_record(end[0], handle), "record")
        check(lib.assay_cuda_event_sync(end[0]), "synchronize")
        seconds = ffi.new("double *")
        check(lib.assay_cuda_event_elapsed(begin[0], end[0], seconds), "elapsed")
        check(lib.assay_cuda_event_destroy(begin[0]), "destroy")
        check(lib.assay_cuda_event_destroy(end[0]), "destroy")
        check(lib.assay_cuda_free(to[0]), "free")
        capturing = ffi.new("int *")
        check(lib.assay_cuda_stream_capturing(handle, capturing), "capturing")
    with stream.capture() as graph:
        check(read_probe(cuda, data, sink=sink)[0], "read_probe")
    graph.launch(stream)
    stream.synchronize()
    with cuda.current(0):
        check(lib.assay_cuda_graph_destroy(cuda._device.pointer(graph.handle)), "destroy")
        graph.handle = 0
        made = ffi.new("void **")
        check(lib.assay_cuda_stream_create(made), "stream")
        check(lib.assay_cuda_stream_destroy(made[0]), "destroy")


def failure() -> Exception:
    """What everything() raised; its frames, and the streams in them, are gone."""
    try:
        everything()
    except Exception as exc:  # noqa: BLE001 any of them, to be judged by the test
        return exc.with_traceback(None)
    raise AssertionError("nothing failed")


def test_the_scenario_makes_every_call(mock):
    everything()
    assert {exported for _, exported in CALLS if not mock.calls(exported)} == set()


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize(("name", "exported"), CALLS, ids=[name for name, _ in CALLS])
def test_a_call_that_fails_is_named_and_the_next_ones_work(mock, name, exported, result):
    kind, advice = RESULTS[result]
    mock.fail(exported, result)
    error = failure()
    assert isinstance(error, kind), error
    assert f"{name}: " in str(error), error
    assert f"({result})" in str(error), error
    assert advice in str(error), error
    if name in OPENING:
        assert str(failure()) == str(error)
        cuda.refresh()
    everything()


def test_a_driver_that_cannot_tell_its_version_is_named(mock):
    mock.fail("cuDriverGetVersion", 999)
    assert "cuDriverGetVersion: CUDA error (999)" in str(failure())
    cuda.refresh()
    everything()


@pytest.mark.parametrize("reporting", REPORTING)
def test_an_error_without_name_or_text_is_still_told(mock, reporting):
    mock.fail("cuMemAlloc_v2", 2)
    mock.fail(reporting, 1)
    error = str(failure())
    assert "cuMemAlloc: " in error
    assert "(2)" in error
    assert ("CUDA error" if reporting == "cuGetErrorName" else "no text") in error
    everything()


@pytest.mark.parametrize("result", [700, 702, 710, 714, 715, 716, 717, 718, 719, 214, 4])
def test_results_that_end_a_context_say_so(mock, result):
    mock.fail("cuLaunchKernel", result)
    assert "start a new process" in str(failure())


def test_a_context_that_a_kernel_ended_refuses_what_comes_and_another_device_works(mock):
    data, short = cuda.to_device(words()), cuda.empty(1, "uint32").fill(0)
    assert read_probe(cuda, data, blocks=200, sink=short)[0] == lib.ASSAY_OK
    with pytest.raises(cuda.CudaError, match="start a new process"):
        cuda.synchronize()
    with pytest.raises(cuda.CudaError, match="context is lost"):
        cuda.to_device(words())
    status, sink = read_probe(cuda, cuda.to_device(words(), 1))
    assert status == lib.ASSAY_OK, message()
    assert np.bitwise_xor.reduce(sink.numpy()) == np.bitwise_xor.reduce(words())
