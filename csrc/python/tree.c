/* The entry of assay_tree_build: calls.h says what an entry takes and answers. */
#include "calls.h"

/* What the paths to the leaves need: how many leaves there are, and how deep the deepest. Nothing where a parent is none: of such
 * a tree there are no paths. */
static void measure(const int32_t *parents, int64_t nodes, int32_t *depth, npy_intp *leaves, npy_intp *deepest) {
    *leaves = *deepest = depth[0] = 0;
    for (int64_t i = 0; i < nodes; i++) {
        if (parents[i] < -1 || parents[i] >= i) return;
        depth[i + 1] = depth[parents[i] + 1] + 1;
        if (depth[i + 1] > *deepest) *deepest = depth[i + 1];
    }
    /* A row that is nobody's parent: each is counted, and taken back when its first child comes. */
    *leaves = nodes + 1;
    for (int64_t i = nodes; i > 0; i--) {
        int32_t *up = &depth[parents[i - 1] + 1];
        *leaves -= *up >= 0;
        *up = -1;
    }
}

/* tree_build(result, parents, tokens, position, max_depth): a `result` of reference.tree.TreeLayout's items. */
PyObject *assay_call_tree_build(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    enum { ARGUMENTS = 5, ITEMS = 9 };
    if (count != ARGUMENTS) return PyErr_Format(PyExc_TypeError, "tree_build: %zd arguments", count);
    PyArrayObject *parents = plain(args[1], 'i', 4, 1), *tokens = args[2] == Py_None ? NULL : plain(args[2], 'i', 4, 1);
    const int64_t n = parents ? PyArray_DIMS(parents)[0] : -1;
    assay_tree_args a = {.nodes = n, .max_depth = n};
    if (n < 0 || n > ASSAY_TREE_MOST_NODES || (args[2] != Py_None && (!tokens || PyArray_DIMS(tokens)[0] != n)) ||
        !whole(args[3], 0, ((int64_t)1 << 62) - 1, &a.position) ||
        (args[4] != Py_None && !whole(args[4], 0, INT64_MAX, &a.max_depth)))
        return refused(ASSAY_EINVAL);
    if (a.max_depth > n) a.max_depth = n;

    int32_t info[4];
    npy_intp rows = (npy_intp)n + 1, words = (rows + 63) / 64, paths[2] = {0};
    PyObject *items[ITEMS] = {NULL};
    items[2] = PyArray_SimpleNew(1, &rows, NPY_INT32);
    if (items[2]) measure(PyArray_DATA(parents), n, PyArray_DATA((PyArrayObject *)items[2]), &paths[0], &paths[1]);
    paths[1]++;
    items[3] = PyArray_SimpleNew(1, &rows, NPY_INT64);
    items[4] = PyArray_SimpleNew(1, &rows, NPY_INT32);
    items[5] = PyArray_SimpleNew(1, &rows, NPY_INT32);
    items[6] = PyArray_SimpleNew(2, ((npy_intp[]){rows, rows}), NPY_UINT8);
    items[7] = PyArray_SimpleNew(2, ((npy_intp[]){rows, words}), NPY_UINT64);
    items[8] = items[2] ? PyArray_SimpleNew(2, paths, NPY_INT32) : NULL;
    int status = ASSAY_EINVAL, made = 1;
    for (int i = 2; i < ITEMS; i++) made &= items[i] != NULL;
    if (made) {
        void *at[ITEMS];
        for (int i = 2; i < ITEMS; i++) at[i] = PyArray_DATA((PyArrayObject *)items[i]);
        a.parents = PyArray_DATA(parents);
        a.tokens = tokens ? PyArray_DATA(tokens) : NULL;
        a.depth = at[2];
        a.positions = at[3];
        a.first_child = at[4];
        a.next_sibling = at[5];
        a.mask = at[6];
        a.mask_words = at[7];
        a.retrieve = paths[0] ? at[8] : NULL;
        a.info = info;
        status = assay_tree_build(&a);
    }
    if (status == ASSAY_OK) {
        if (info[0] != ASSAY_TREE_OK) { /* of a bad tree the arrays are empty */
            static const int types[ITEMS] = {0, 0, NPY_INT32, NPY_INT64, NPY_INT32, NPY_INT32, NPY_UINT8, NPY_UINT64, NPY_INT32};
            for (int i = 2; i < ITEMS; i++) {
                Py_DECREF(items[i]);
                items[i] = PyArray_SimpleNew(i < 6 ? 1 : 2, ((npy_intp[]){0, 0}), types[i]);
            }
        }
        items[0] = PyLong_FromLong(info[0]);
        items[1] = PyLong_FromLong(info[1]);
        made = 1;
        for (int i = 0; i < ITEMS; i++) made &= items[i] != NULL;
        if (made) return named(args[0], items, ITEMS);
    }
    for (int i = 0; i < ITEMS; i++) Py_XDECREF(items[i]);
    return PyErr_Occurred() ? NULL : refused(status);
}
