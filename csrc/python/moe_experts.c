/* The expert layer, the call from Python. */
#include "calls.h"

#include <string.h>

/* moe_experts(experts, x, topk_ids, topk_weights, a16, weights_on_input, num_threads, room, out): float32 [T, H], `out` or a new one.
 *
 * `experts` are the bytes of an assay_experts, whose arrays the caller keeps. `room` is a uint8 array to work in; where it is
 * None or too small the answer is ASSAY_EWORKSPACE. */
PyObject *assay_call_moe_experts(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    enum { ARGUMENTS = 9 };
    if (count != ARGUMENTS) return PyErr_Format(PyExc_TypeError, "moe_experts: %zd arguments", count);
    assay_experts layer;
    assay_matrix x;
    int num_threads;
    PyArrayObject *ids = plain(args[2], 'i', 4, 2), *weights = plain(args[3], 'f', 4, 2);
    PyArrayObject *room = args[7] == Py_None ? NULL : plain(args[7], 'u', 1, 1);
    if (!PyBytes_CheckExact(args[0]) || PyBytes_Size(args[0]) != sizeof layer || !matrix(args[1], 0, &x) || !ids || !weights ||
        !PyArray_CompareLists(PyArray_DIMS(ids), PyArray_DIMS(weights), 2) || PyArray_DIMS(ids)[0] != x.rows ||
        !PyBool_Check(args[4]) || !PyBool_Check(args[5]) || !threads(args[6], &num_threads) ||
        (room && !PyArray_ISWRITEABLE(room)))
        return refused(ASSAY_EINVAL);
    memcpy(&layer, PyBytes_AsString(args[0]), sizeof layer);
    if (x.cols != layer.hidden) return refused(ASSAY_EINVAL);
    assay_experts_args a = {
        .experts = &layer, .x = x.data, .dtype = x.dtype, .a16 = args[4] == Py_True, .ldx = x.ld, .tokens = x.rows,
        .top_k = PyArray_DIMS(ids)[1], .topk_ids = PyArray_DATA(ids), .topk_weights = PyArray_DATA(weights),
        .input_weights = args[5] == Py_True, .ldo = layer.hidden,
    };
    const size_t needed = assay_moe_experts_workspace(&a), bytes = room ? (size_t)PyArray_DIMS(room)[0] : 0;
    if (!needed) return refused(ASSAY_EINVAL);
    if (needed > bytes) return refused(ASSAY_EWORKSPACE);
    PyObject *out = output(args[8], NPY_FLOAT32, 2, (npy_intp[]){(npy_intp)x.rows, (npy_intp)layer.hidden});
    const span spans[] = {span_of(out), span_of_matrix(&x), span_of(ids), span_of(weights)};
    int status = ASSAY_EINVAL;
    if (out && (args[8] == Py_None || apart(spans, 1, sizeof spans / sizeof *spans))) {
        a.out = PyArray_DATA((PyArrayObject *)out);
        PyThreadState *released = PyEval_SaveThread();
        status = assay_moe_experts(&a, -1, num_threads, PyArray_DATA(room), bytes);
        PyEval_RestoreThread(released);
        if (status == ASSAY_OK) return out;
    }
    Py_XDECREF(out);
    return PyErr_Occurred() ? NULL : refused(status);
}
