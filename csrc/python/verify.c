/* Verification, the call from Python. */
#include "calls.h"

#include <math.h>
#include <string.h>

/* What a request may have of its own, as one number for all or an array of one for each: the field of assay_verify_args, the
 * kind and size of its elements, and its limits (the least itself may be outside). At `off` it is off for all; where it has
 * none, least > most and any value that its type holds will do. Python takes the limits from here. */
typedef struct {
    const char *name;
    size_t offset;
    char kind, size;
    double off, least, most;
    int above_least;
} parameter;
#define FIELD(name) #name, offsetof(assay_verify_args, name)
#define GREATEST 3.4e38
static const parameter parameters[] = {
    {FIELD(temperature), 'f', 4, NAN, 1, 0, 0}, /* limits: the kernel's own */
    {FIELD(top_k), 'i', 4, 0, 0, INT32_MAX, 0},
    {FIELD(top_p), 'f', 4, 1, 0, 1, 1},
    {FIELD(min_p), 'f', 4, 0, 0, 1, 0},
    {FIELD(typical_p), 'f', 4, 1, 0, 1, 1},
    {FIELD(repetition_penalty), 'f', 4, 1, 0, GREATEST, 1},
    {FIELD(frequency_penalty), 'f', 4, 0, -GREATEST, GREATEST, 0},
    {FIELD(presence_penalty), 'f', 4, 0, -GREATEST, GREATEST, 0},
    {FIELD(max_emit), 'i', 4, NAN, 0, INT32_MAX, 0}, /* None: no limit */
    {FIELD(seed), 'u', 8, NAN, 1, 0, 0},
    {FIELD(position), 'i', 8, NAN, 1, 0, 0},
};
enum { PARAMETERS = sizeof parameters / sizeof *parameters, MAX_EMIT = 8, SEED = 9 };

static int within(const parameter *p, double value) {
    const int is_float = p->kind == 'f'; /* limits are those of the elements' type */
    const double least = is_float ? (float)p->least : p->least, most = is_float ? (float)p->most : p->most;
    return p->least > p->most || ((p->above_least ? value > least : value >= least) && value <= most);
}

/* One number as the `batch` elements at `room`. 1, 0 when it is none or outside its limits, -1 where it is off. */
static int fill(const parameter *p, PyObject *o, int64_t batch, void *room) {
    int64_t i = 0;
    double d;
    if (p->kind == 'f') {
        if (!number(o, &d)) return 0;
    } else if (p->kind == 'u' && PyLong_CheckExact(o)) {
        i = (int64_t)PyLong_AsUnsignedLongLong(o);
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return 0;
        }
        d = 0;
    } else {
        if (!whole(o, p->size == 4 ? INT32_MIN : INT64_MIN, p->size == 4 ? INT32_MAX : INT64_MAX, &i)) return 0;
        d = (double)i;
    }
    if (d == p->off) return -1;
    const float f = (float)d;
    const int32_t narrow = (int32_t)i;
    if (!within(p, p->kind == 'f' ? f : d)) return 0;
    const void *element = p->kind == 'f' ? (const void *)&f : p->size == 4 ? (const void *)&narrow : (const void *)&i;
    for (int64_t b = 0; b < batch; b++) memcpy((char *)room + b * p->size, element, (size_t)p->size);
    return 1;
}

/* Points a field at its parameter's elements. 0 when the argument is not in a form that is taken here. */
static int set_parameter(assay_verify_args *a, const parameter *p, PyObject *o, void *room) {
    const void *at = room;
    if (!PyArray_Check(o)) {
        const int filled = fill(p, o, a->batch, room);
        if (!filled) return 0;
        if (filled < 0) return 1;
    } else {
        PyArrayObject *array = plain(o, p->kind, p->size, 1);
        if (!array && p->kind == 'u') array = plain(o, 'i', p->size, 1); /* seeds keep their bits */
        if (!array || PyArray_DIMS(array)[0] != a->batch) return 0;
        at = PyArray_DATA(array);
        for (int64_t b = 0; b < a->batch && p->size == 4; b++)
            if (!within(p, p->kind == 'f' ? ((const float *)at)[b] : ((const int32_t *)at)[b])) return 0;
    }
    memcpy((char *)a + p->offset, &at, sizeof at);
    return 1;
}

/* The data of an array of these elements, [length] or with width >= 0 [length, width], or NULL for None. 0 for any other. */
static int set_array(void *field, PyObject *o, char kind, int size, int64_t length, int64_t width) {
    if (o == Py_None) return 1;
    PyArrayObject *a = plain(o, kind, size, width < 0 ? 1 : 2);
    if (!a || PyArray_DIMS(a)[0] != length || (width >= 0 && PyArray_DIMS(a)[1] != width)) return 0;
    const void *at = PyArray_DATA(a);
    memcpy(field, &at, sizeof at);
    return 1;
}

/* How long a dimension of an array is; 0 for None and what has no such dimension. */
static int64_t extent(PyObject *o, int axis) {
    if (!PyArray_Check(o) || PyArray_NDIM((PyArrayObject *)o) <= axis) return 0;
    return PyArray_DIMS((PyArrayObject *)o)[axis];
}

/* The arguments of verify. Those from VARIANT on may all be missing. */
enum {
    RESULT, TARGET_LOGITS, DRAFT_TOKEN_IDS, CU_NUM_DRAFT_TOKENS, DRAFT_PROBS, RULE, PARENTS, NUM_THREADS, RETURN_LOGPROBS,
    FIRST_PARAMETER, OUT = FIRST_PARAMETER + PARAMETERS, COMMON, VARIANT = COMMON, IS_BFLOAT16, UNIFORMS,
    DRAFT_PROB_IDS, DRAFT_PROB_VALUES, CU_EDITS, EDIT_TOKEN_IDS, EDIT_BIAS, EDIT_IN_PROMPT, EDIT_COUNT, BITMASK,
    BITMASK_PER_ROW, STOP_TOKEN_IDS, CU_STOP, POSTERIOR_THRESHOLD, POSTERIOR_ALPHA, THRESHOLD_SINGLE, THRESHOLD_ACC, ALL
};

/* Offsets as assay.h wants them, of this many rows. The greatest number of drafts in *most. */
static int offsets_are_right(const int32_t *cu, int64_t batch, int64_t rows, int32_t *most) {
    *most = 0;
    if (cu[0]) return 0;
    for (int64_t b = 0; b < batch; b++) {
        if (cu[b + 1] < cu[b]) return 0;
        if (cu[b + 1] - cu[b] > *most) *most = cu[b + 1] - cu[b];
    }
    return cu[batch] + batch == rows;
}

/* What comes after VARIANT. */
static int set_rest(assay_verify_args *a, PyObject *const *args, int64_t drafts) {
    int32_t most;
    PyObject *ids = args[DRAFT_PROB_IDS], *mask = args[BITMASK];
    const int64_t edits = extent(args[EDIT_TOKEN_IDS], 0);
    a->draft_prob_width = extent(ids, 1);
    a->bitmask_ld = extent(mask, 1);
    a->bitmask_per_row = args[BITMASK_PER_ROW] == Py_True;
    a->num_stop = extent(args[STOP_TOKEN_IDS], 0);
    const int raced = a->rule == ASSAY_GUMBEL; /* a uniform for every token of a row */
    return set_array(&a->uniforms, args[UNIFORMS], 'f', 8, drafts + (raced ? 1 : 2) * a->batch, raced ? a->vocab : -1) &&
           set_array(&a->draft_prob_ids, ids, 'i', 4, drafts, a->draft_prob_width) &&
           set_array(&a->draft_prob_values, args[DRAFT_PROB_VALUES], 'f', 4, drafts, a->draft_prob_width) &&
           set_array(&a->cu_edits, args[CU_EDITS], 'i', 4, a->batch + 1, -1) &&
           set_array(&a->edit_token_ids, args[EDIT_TOKEN_IDS], 'i', 4, edits, -1) &&
           set_array(&a->edit_bias, args[EDIT_BIAS], 'f', 4, edits, -1) &&
           set_array(&a->edit_in_prompt, args[EDIT_IN_PROMPT], 'i', 4, edits, -1) &&
           set_array(&a->edit_count, args[EDIT_COUNT], 'i', 4, edits, -1) &&
           (!a->cu_edits || a->cu_edits[a->batch] == edits) &&
           set_array(&a->bitmask, mask, 'u', 4, a->bitmask_per_row ? drafts + a->batch : a->batch, a->bitmask_ld) &&
           set_array(&a->stop_token_ids, args[STOP_TOKEN_IDS], 'i', 4, a->num_stop, -1) &&
           set_array(&a->cu_stop, args[CU_STOP], 'i', 4, a->batch + 1, -1) &&
           (!a->cu_stop || offsets_are_right(a->cu_stop, a->batch, a->num_stop + a->batch, &most)) &&
           number(args[POSTERIOR_THRESHOLD], &a->posterior_threshold) && number(args[POSTERIOR_ALPHA], &a->posterior_alpha) &&
           number(args[THRESHOLD_SINGLE], &a->threshold_single) && number(args[THRESHOLD_ACC], &a->threshold_acc);
}

enum { TOKENS, ACCEPTED, EMITTED, STATUS, PATH, LOGPROBS, LOSSLESS, COUNTERS, RESULTS };

/* The arrays to write into `made`, and their addresses into the arguments. 0 with what was made so far in it, else NULL. */
static int make_outputs(assay_verify_args *a, PyObject *out, int logprobs, PyObject **made) {
    const npy_intp tokens[2] = {a->batch, a->max_out}, path[2] = {a->batch, a->max_out - 1},
                   counters[2] = {a->batch, ASSAY_COUNTERS};
    const struct { int at, type, ndim; const npy_intp *dims; void *field; } arrays[] = {
        {TOKENS, NPY_INT32, 2, tokens, &a->output_token_ids}, {ACCEPTED, NPY_INT32, 1, tokens, &a->num_accepted},
        {EMITTED, NPY_INT32, 1, tokens, &a->num_emitted}, {STATUS, NPY_INT32, 1, tokens, &a->status},
        {PATH, NPY_INT32, 2, path, &a->accept_index}, {COUNTERS, NPY_INT32, 2, counters, &a->counters},
        {LOGPROBS, NPY_FLOAT32, 2, tokens, &a->logprobs},
    };
    for (int i = 0; i < 6 + logprobs; i++) {
        PyObject *array = output_of(out, i, arrays[i].type, arrays[i].ndim, arrays[i].dims);
        if (!array) return 0;
        made[arrays[i].at] = array;
        void *data = PyArray_DATA((PyArrayObject *)array);
        memcpy(arrays[i].field, &data, sizeof data);
    }
    return 1;
}

/* verify(...) with the arguments of the list above: a `result` of VerifyResult's fields. Arrays are in the form that assay.h
 * describes. */
PyObject *assay_call_verify(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count != COMMON && count != ALL) return PyErr_Format(PyExc_TypeError, "verify: %zd arguments", count);
    const int all = count == ALL;
    PyObject *out = args[OUT];
    assay_matrix x;
    int64_t rule, variant = -1;
    int num_threads;
    int32_t most;
    PyArrayObject *cu = plain(args[CU_NUM_DRAFT_TOKENS], 'i', 4, 1);
    const int64_t batch = cu ? PyArray_DIMS(cu)[0] - 1 : -1;
    if (batch < 0 || !matrix(args[TARGET_LOGITS], all && args[IS_BFLOAT16] == Py_True, &x) || x.cols < 1 ||
        !offsets_are_right(PyArray_DATA(cu), batch, x.rows, &most) || !whole(args[RULE], 0, INT32_MAX, &rule) ||
        !threads(args[NUM_THREADS], &num_threads) || !PyBool_Check(args[RETURN_LOGPROBS]) ||
        (all && !whole(args[VARIANT], -1, INT32_MAX, &variant)))
        return refused(ASSAY_EINVAL);
    const int logprobs = args[RETURN_LOGPROBS] == Py_True;
    if (!is_outputs(out, 6 + logprobs)) return refused(ASSAY_EINVAL);
    const int64_t drafts = x.rows - batch;
    assay_verify_args a = {
        .target_logits = x.data, .dtype = x.dtype, .ld = x.ld, .batch = batch, .vocab = x.cols,
        .cu_num_draft_tokens = PyArray_DATA(cu), .rule = (int32_t)rule, .max_out = (int64_t)most + 1,
    };
    if (args[DRAFT_TOKEN_IDS] == Py_None || !set_array(&a.draft_token_ids, args[DRAFT_TOKEN_IDS], 'i', 4, drafts, -1) ||
        !set_array(&a.parents, args[PARENTS], 'i', 4, drafts, -1) ||
        !set_array(&a.draft_probs, args[DRAFT_PROBS], 'f', 4, drafts, x.cols) || (all && !set_rest(&a, args, drafts)))
        return refused(ASSAY_EINVAL);

    /* Room for what is one number for all, then the kernel's workspace. */
    PyObject *made[RESULTS] = {NULL};
    int status = ASSAY_EINVAL, sampled = 0;
    _Alignas(8) char few[PARAMETERS * 8 * 4];
    char *filled = batch <= 4 ? few : PyMem_Malloc((size_t)batch * PARAMETERS * 8);
    void *workspace = NULL;
    if (!filled) return PyErr_NoMemory();
    for (int i = 0; i < PARAMETERS; i++) {
        PyObject *o = args[FIRST_PARAMETER + i];
        if (i == SEED) { /* it and the position, which comes last, matter to those that draw */
            for (int64_t b = 0; b < batch; b++) sampled |= rule != ASSAY_GREEDY && a.temperature[b] > 0;
            if (!sampled || a.uniforms) break;
        }
        if (i == MAX_EMIT && o == Py_None) continue;
        if (!set_parameter(&a, &parameters[i], o, filled + batch * 8 * i)) goto done;
    }
    if (!a.repetition_penalty != !a.frequency_penalty || !a.repetition_penalty != !a.presence_penalty) goto done;
    if (!make_outputs(&a, out, logprobs, made)) goto done;
    const span spans[] = {span_of(made[TOKENS]), span_of(made[ACCEPTED]), span_of(made[EMITTED]), span_of(made[STATUS]),
                          span_of(made[PATH]), span_of(made[COUNTERS]), span_of(made[LOGPROBS]), span_of_matrix(&x), span_of(cu),
                          span_of(args[DRAFT_TOKEN_IDS]), span_of(a.draft_probs ? args[DRAFT_PROBS] : NULL)};
    if (out != Py_None && !apart(spans, 7, sizeof spans / sizeof *spans)) goto done;
    const size_t bytes = assay_verify_workspace(&a);
    if (!bytes) goto done;
    workspace = PyMem_Malloc(bytes);
    if (!workspace) {
        PyErr_NoMemory();
        goto done;
    }
    PyThreadState *released = x.rows * x.cols >= LONG_ELEMENTS ? PyEval_SaveThread() : NULL;
    status = assay_verify(&a, (int)variant, num_threads, workspace, bytes);
    if (released) PyEval_RestoreThread(released);
done:
    PyMem_Free(workspace);
    if (filled != few) PyMem_Free(filled);
    if (status == ASSAY_OK) {
        made[LOSSLESS] = Py_NewRef(Py_True); /* as all rules are that need none of the arguments from VARIANT on */
        if (!logprobs) made[LOGPROBS] = Py_NewRef(Py_None);
        return named(args[RESULT], made, RESULTS);
    }
    for (int i = 0; i < RESULTS; i++) Py_XDECREF(made[i]);
    return PyErr_Occurred() ? NULL : refused(status);
}

/* A limit as messages show it: an int where it is a small one. */
static PyObject *shown(double x) {
    if (x != x) return Py_NewRef(Py_None);
    return fabs(x) <= INT32_MAX && x == floor(x) ? PyLong_FromLong((long)x) : PyFloat_FromDouble(x);
}

/* LIMITS: name -> (off or None, least, most, whether the least itself is outside) of those parameters that have limits here. */
PyObject *assay_verify_limits(void) {
    PyObject *all = PyDict_New();
    for (int i = 0; all && i < PARAMETERS; i++) {
        const parameter *p = &parameters[i];
        if (p->least > p->most) continue;
        PyObject *of = Py_BuildValue("(NNNN)", shown(p->off), shown(p->least), shown(p->most), PyBool_FromLong(p->above_least));
        if (!of || PyDict_SetItemString(all, p->name, of)) Py_CLEAR(all);
        Py_XDECREF(of);
    }
    return all;
}
