/* Routing, the call from Python. */
#include "calls.h"

/* moe_route(result, logits, top_k, renormalize, num_threads, out[, variant, is_bfloat16, scoring, bias, n_group, topk_group,
 * group_top2, scaling, shared_weight, num_shared]): a `result` of (topk_weights, topk_ids, status). Without what is in
 * brackets: a softmax and nothing beyond. */
PyObject *assay_call_moe_route(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    enum { SHORT = 6, ALL = 16, OUTPUTS = 3 };
    assay_matrix x;
    assay_route_args a = {.scoring = ASSAY_SCORE_SOFTMAX, .n_group = 1, .topk_group = 1, .scaling = 1};
    int64_t variant = -1;
    int num_threads;
    if (count != SHORT && count != ALL) return PyErr_Format(PyExc_TypeError, "moe_route: %zd arguments", count);
    PyObject *out = args[5];
    if (!matrix(args[1], count == ALL && args[7] == Py_True, &x) || !whole(args[2], 1, x.cols, &a.top_k) ||
        !threads(args[4], &num_threads) || !(args[3] == Py_None || PyBool_Check(args[3])) || !is_outputs(out, OUTPUTS))
        return refused(ASSAY_EINVAL);
    a.renormalize = args[3] != Py_False;
    if (count == ALL) {
        int64_t scoring;
        double scaling, shared_weight;
        if (!whole(args[6], -1, INT32_MAX, &variant) || !whole(args[8], 0, INT32_MAX, &scoring) ||
            !whole(args[10], 1, x.cols, &a.n_group) || !whole(args[11], 1, x.cols, &a.topk_group) ||
            !number(args[13], &scaling) || !number(args[14], &shared_weight) || !whole(args[15], 0, INT32_MAX, &a.num_shared))
            return refused(ASSAY_EINVAL);
        if (args[9] != Py_None) {
            PyArrayObject *bias = plain(args[9], 'f', 4, 1);
            if (!bias || PyArray_DIMS(bias)[0] != x.cols) return refused(ASSAY_EINVAL);
            a.bias = PyArray_DATA(bias);
        }
        a.scoring = (int32_t)scoring;
        a.group_top2 = args[12] == Py_True;
        a.scaling = (float)scaling;
        a.shared_weight = (float)shared_weight;
    }

    const npy_intp dims[2] = {(npy_intp)x.rows, (npy_intp)(a.top_k + a.num_shared)};
    PyObject *made[OUTPUTS] = {NULL};
    made[0] = output_of(out, 0, NPY_FLOAT32, 2, dims);
    if (made[0]) made[1] = output_of(out, 1, NPY_INT32, 2, dims);
    if (made[1]) made[2] = output_of(out, 2, NPY_INT32, 1, dims);
    int status = ASSAY_EINVAL;
    const span spans[] = {span_of(made[0]), span_of(made[1]), span_of(made[2]), span_of_matrix(&x)};
    if (made[2] && (out == Py_None || apart(spans, OUTPUTS, OUTPUTS + 1))) {
        a.logits = x.data;
        a.dtype = x.dtype;
        a.ld = x.ld;
        a.tokens = x.rows;
        a.num_experts = x.cols;
        a.topk_weights = PyArray_DATA((PyArrayObject *)made[0]);
        a.topk_ids = PyArray_DATA((PyArrayObject *)made[1]);
        a.status = PyArray_DATA((PyArrayObject *)made[2]);
        PyThreadState *released = x.rows * x.cols >= LONG_ELEMENTS ? PyEval_SaveThread() : NULL;
        status = assay_moe_route(&a, (int)variant, num_threads);
        if (released) PyEval_RestoreThread(released);
        if (status == ASSAY_OK) return named(args[0], made, OUTPUTS);
    }
    for (int i = 0; i < OUTPUTS; i++) Py_XDECREF(made[i]);
    return PyErr_Occurred() ? NULL : refused(status);
}
