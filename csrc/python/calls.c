/* assay._calls: the ops of which a call takes about as long as its arguments take to check in Python. calls.h says what an
 * entry takes and answers. The module lies in the same binary as cffi's (_ffi.py opens it), with which it shares the kernels,
 * the threads and what ASSAY_ISA allows. */
#define ASSAY_PYTHON_MODULE
#include "calls.h"

static int start(PyObject *module) {
    if (PyArray_ImportNumPyAPI()) return -1;
    PyObject *found = assay_verify_limits();
    const int status = found ? PyModule_AddObjectRef(module, "LIMITS", found) : -1;
    Py_XDECREF(found);
    return status;
}

static PyMethodDef entries[] = {
    {"moe_experts", (PyCFunction)(void (*)(void))assay_call_moe_experts, METH_FASTCALL, NULL},
    {"moe_route", (PyCFunction)(void (*)(void))assay_call_moe_route, METH_FASTCALL, NULL},
    {"tree_build", (PyCFunction)(void (*)(void))assay_call_tree_build, METH_FASTCALL, NULL},
    {"verify", (PyCFunction)(void (*)(void))assay_call_verify, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};
static PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "assay._calls", .m_methods = entries,
                                 .m_slots = slots};

PyMODINIT_FUNC PyInit__calls(void) { return PyModuleDef_Init(&definition); }
