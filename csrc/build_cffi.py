"""Writes the C source of the extension module from the declarations in the headers.

Usage: build_cffi.py out.c assay.h cuda/assay_cuda.h
"""

import re
import sys
from pathlib import Path

from cffi import FFI

#: What Python gives the launcher to call (assay.cuda): where compiled kernels come from.
CALLBACKS = """
extern "Python" int assay_python_cuda_source(const char *unit, const assay_cuda_device *device, const void **image,
                                             size_t *bytes);
"""


def declarations(header: str) -> str:
    """The text between the cdef markers of a header, which is plain C that cffi reads."""
    found = re.findall(r"/\* cdef begin \*/(.*?)/\* cdef end \*/", header, re.S)
    if not found:
        raise SystemExit("a header without text between 'cdef begin' and 'cdef end'")
    return "".join(found)


if __name__ == "__main__":
    ffi = FFI()
    for path in sys.argv[2:]:
        ffi.cdef(declarations(Path(path).read_text()))
    ffi.cdef(CALLBACKS)
    ffi.set_source("assay._assay", '#include "cuda/assay_cuda.h"', py_limited_api=True)
    ffi.emit_c_code(sys.argv[1])
