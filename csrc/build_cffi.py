"""Writes the C source of the extension module from the declarations in assay.h.

Usage: build_cffi.py assay.h out.c
"""

import re
import sys
from pathlib import Path

from cffi import FFI


def declarations(header: str) -> str:
    """The text between assay.h's cdef markers, which is plain C that cffi reads."""
    found = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", header, re.S)
    if not found:
        raise SystemExit("assay.h: no text between 'cdef begin' and 'cdef end'")
    return found.group(1)


if __name__ == "__main__":
    ffi = FFI()
    ffi.cdef(declarations(Path(sys.argv[1]).read_text()))
    ffi.set_source("assay._assay", '#include "assay.h"', py_limited_api=True)
    ffi.emit_c_code(sys.argv[2])
