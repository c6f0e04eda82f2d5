/* Calls from Python without cffi: what the entries share.
 *
 * An entry takes its arguments in the form in which they mostly come: numpy arrays that are aligned, in native byte order and
 * (but for rows of logits) in C order, Python's own int, float, bool and None. It answers with the results, or with the
 * ASSAY_ status that says why there are none. Arguments in any other form are ASSAY_EINVAL: what they mean, and every message
 * about them, is ops/'s, which brings them into this form and calls again. */
#ifndef ASSAY_PYTHON_CALLS_H
#define ASSAY_PYTHON_CALLS_H

#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL assay_numpy
#ifndef ASSAY_PYTHON_MODULE /* the one file that asks numpy for its functions */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "assay.h"

/* Elements of logits from which a kernel takes longer than giving the GIL up and having it back: a microsecond. */
enum { LONG_ELEMENTS = 16384 };

typedef struct {
    const void *data;
    int64_t rows, cols, ld;
    int32_t dtype; /* ASSAY_F32.. */
} assay_matrix;

static inline PyObject *refused(int status) { return PyLong_FromLong(status); }

/* An int, and no subclass of it (bool), from least to most. */
static inline int whole(PyObject *o, int64_t least, int64_t most, int64_t *value) {
    if (!PyLong_CheckExact(o)) return 0;
    int overflow;
    *value = PyLong_AsLongLongAndOverflow(o, &overflow);
    return !overflow && *value >= least && *value <= most;
}

/* A float, or an int that a double holds. */
static inline int number(PyObject *o, double *value) {
    int64_t i;
    if (PyFloat_CheckExact(o)) {
        *value = PyFloat_AsDouble(o);
        return 1;
    }
    if (!whole(o, -((int64_t)1 << 53), (int64_t)1 << 53, &i)) return 0;
    *value = (double)i;
    return 1;
}

/* None is the C API's 0. */
static inline int threads(PyObject *o, int *count) {
    int64_t n = 0;
    if (o != Py_None && !whole(o, 1, 256, &n)) return 0;
    *count = (int)n;
    return 1;
}

/* Whether an array's elements are of this kind (numpy's 'f', 'i', 'u') and size, and lie where C finds them. */
static inline int holds(PyArrayObject *a, char kind, int size) {
    const PyArray_Descr *d = PyArray_DESCR(a);
    return d->kind == kind && PyArray_ITEMSIZE(a) == size && !PyTypeNum_ISUSERDEF(d->type_num) && PyArray_ISBEHAVED_RO(a);
}

/* An array in C order, or NULL. */
static inline PyArrayObject *plain(PyObject *o, char kind, int size, int ndim) {
    if (!PyArray_Check(o)) return NULL;
    PyArrayObject *a = (PyArrayObject *)o;
    return PyArray_NDIM(a) == ndim && PyArray_IS_C_CONTIGUOUS(a) && holds(a, kind, size) ? a : NULL;
}

/* Rows of logits, each dense. float32 and float16; bfloat16 only where the caller says that uint16 holds it. */
static inline int matrix(PyObject *o, int is_bfloat16, assay_matrix *m) {
    if (!PyArray_Check(o)) return 0;
    PyArrayObject *a = (PyArrayObject *)o;
    if (PyArray_NDIM(a) != 2) return 0;
    const npy_intp *dims = PyArray_DIMS(a), *strides = PyArray_STRIDES(a);
    if (is_bfloat16)
        m->dtype = ASSAY_BF16;
    else
        m->dtype = PyArray_ITEMSIZE(a) == 4 ? ASSAY_F32 : ASSAY_F16;
    const int size = m->dtype == ASSAY_F32 ? 4 : 2;
    if (!holds(a, is_bfloat16 ? 'u' : 'f', size) || dims[0] > INT32_MAX || dims[1] > INT32_MAX) return 0;
    m->data = PyArray_DATA(a);
    m->rows = dims[0];
    m->cols = m->ld = dims[1];
    if (PyArray_IS_C_CONTIGUOUS(a)) return 1;
    if (dims[1] > 1 && strides[1] != size) return 0;
    if (dims[0] > 1) {
        if (strides[0] % size || strides[0] < dims[1] * size) return 0;
        m->ld = strides[0] / size;
    }
    return 1;
}

/* An array to write, a new reference: the caller's, or a new one for None. NULL without an exception: the caller's does not fit. */
static inline PyObject *output(PyObject *o, int type, int ndim, const npy_intp *dims) {
    if (o == Py_None) return PyArray_SimpleNew(ndim, (npy_intp *)dims, type);
    if (!PyArray_Check(o)) return NULL;
    PyArrayObject *a = (PyArrayObject *)o;
    if (PyArray_TYPE(a) != type || PyArray_NDIM(a) != ndim || !PyArray_CompareLists(PyArray_DIMS(a), dims, ndim) ||
        !PyArray_ISCARRAY(a))
        return NULL;
    return Py_NewRef(o);
}

/* None, or a tuple of so many arrays to write. */
static inline int is_outputs(PyObject *o, Py_ssize_t count) {
    return o == Py_None || (PyTuple_Check(o) && PyTuple_Size(o) == count);
}

/* The i-th of them. */
static inline PyObject *output_of(PyObject *given, Py_ssize_t i, int type, int ndim, const npy_intp *dims) {
    return output(given == Py_None ? Py_None : PyTuple_GetItem(given, i), type, ndim, dims);
}

/* Memory that an argument takes. */
typedef struct {
    const char *from, *to;
} span;

/* Of an array in C order; nothing's for NULL. */
static inline span span_of(const void *array) {
    PyArrayObject *a = (PyArrayObject *)array;
    if (!a) return (span){NULL, NULL};
    return (span){PyArray_DATA(a), (const char *)PyArray_DATA(a) + PyArray_NBYTES(a)};
}

static inline span span_of_matrix(const assay_matrix *m) {
    const int64_t elements = m->rows && m->cols ? (m->rows - 1) * m->ld + m->cols : 0;
    return (span){m->data, (const char *)m->data + elements * (m->dtype == ASSAY_F32 ? 4 : 2)};
}

/* Whether the first `outputs` of them share nothing with each other and with those behind. */
static inline int apart(const span *of, int outputs, int count) {
    for (int i = 0; i < outputs; i++)
        for (int j = i + 1; j < count; j++)
            if (of[i].from < of[j].to && of[j].from < of[i].to && of[i].from < of[i].to && of[j].from < of[j].to) return 0;
    return 1;
}

/* A named tuple of the class, of `count` items whose references it takes, also when it fails. */
static inline PyObject *named(PyObject *class, PyObject **items, Py_ssize_t count) {
    PyObject *result = NULL;
    if (PyType_Check(class) && PyType_IsSubtype((PyTypeObject *)class, &PyTuple_Type))
        result = PyType_GenericAlloc((PyTypeObject *)class, count);
    else
        PyErr_SetString(PyExc_TypeError, "result: expected a class of named tuples");
    for (Py_ssize_t i = 0; i < count; i++) {
        if (result)
            PyTuple_SetItem(result, i, items[i]);
        else
            Py_XDECREF(items[i]);
    }
    return result;
}

PyObject *assay_call_moe_experts(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *assay_call_moe_route(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *assay_call_tree_build(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *assay_call_verify(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *assay_verify_limits(void);

#endif
