"""Numba twins of the C kernels: the same answers from readable Python. Imported only when asked for."""
