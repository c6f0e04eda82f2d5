"""The Numba twins' dot product over lines: each of its forms, not only the one that this CPU picks."""

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed")


@pytest.mark.parametrize(
    ("form", "needs"), [("_dot_vnni", "avx512vnni"), ("_dot_avx2", "avx2"), ("_dot_anywhere", None)]
)
def test_each_form_is_exact(monkeypatch, form, needs):
    from numba import njit

    from assay.jit import _lines

    if needs and needs not in _lines._features():
        pytest.skip(f"Numba does not compile for {needs} here")
    monkeypatch.setattr(_lines, "_dot", lambda: getattr(_lines, form))
    dot_nibbles = _lines.dot_nibbles

    @njit
    def run(packed, at, codes, first, steps, dots):
        dot_nibbles(packed, at, codes, first, steps, dots)

    rng = np.random.default_rng(0)
    steps = 4
    packed = rng.integers(0, 256, 7 + steps * 128, dtype=np.uint8)
    packed[7:71] = 255
    codes = rng.integers(-127, 128, 5 + steps * 8, dtype=np.int8)
    codes[5:13] = -127
    dots = np.empty(32, np.int32)
    run(packed, 7, codes, 5, steps, dots)
    lines = packed[7:].reshape(steps, 2, 16, 4)
    nibbles = np.stack([lines & 15, lines >> 4], axis=3).reshape(steps, 32, 8)  # [step, column, k]
    want = np.einsum("skj,sj->k", nibbles.astype(np.int64), codes[5:].reshape(steps, 8).astype(np.int64))
    np.testing.assert_array_equal(dots, want)


def test_numbas_settings_decide_what_is_used(monkeypatch):
    from numba.core import config

    from assay.jit import _lines

    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2,-avx512vnni")
    assert _lines._features() == {"avx2"}
    assert _lines._dot() is _lines._dot_avx2
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    monkeypatch.setattr(config, "CPU_NAME", "generic")
    assert _lines._dot() is _lines._dot_anywhere
