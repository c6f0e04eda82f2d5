"""The Numba twin of chain verification for GPUs, in Numba's simulator: C's tokens. A process of its own, for Numba reads
NUMBA_ENABLE_CUDASIM when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import assay
import test_spec_verify as chains

pytest.importorskip("numba", reason="the twin is Numba's")

TESTS = Path(__file__).resolve().parents[1]


def check(rule, dtype, dense, vocab):
    """In the simulator: the twin against C."""
    from assay.jit import cuda_verify

    args = chains.case(
        6 if vocab < 100 else 2, vocab, 3, dense=dense, seed=vocab, dtype="float16" if dtype == 1 else "float32"
    )
    logits, ids, cu = args["target_logits"], args["draft_token_ids"].copy(), args["cu_num_draft_tokens"]
    given = logits
    if dtype == 1:
        given = logits.view(np.uint16)
    elif dtype == 2:
        given = (logits.view(np.uint32) >> 16).astype(np.uint16)
        logits = (given.astype(np.uint32) << 16).view(np.float32)
    batch = len(cu) - 1
    if vocab < 100:  # some of what can be wrong
        logits[2, 5], logits[-1] = (np.nan, -np.inf) if dtype != 2 else (logits[2, 5], logits[-1])
        ids[-1] = vocab + 3
        ids[cu[2] : cu[2] + 1] = -1
        ids[cu[4] : cu[4] + 1] = -5
    temperature = np.array([1, 0, 0.6, 2.5, 1, 1], np.float32)[:batch]
    want = assay.verify(**args | {"target_logits": logits, "draft_token_ids": ids}, rule=rule, temperature=temperature)
    out, path = np.full_like(want.output_token_ids, 9), np.full_like(want.accept_index, 9)
    accepted, emitted, status = (np.full(batch, 9, np.int32) for _ in range(3))
    if dtype == 2:  # bfloat16 has no numpy type: C was given its values
        given = np.ascontiguousarray(given)
    cuda_verify.verify(given, dtype, ids, cu, args["draft_probs"], rule, temperature, args["seed"], args["position"], out,
                       accepted, emitted, status, path)  # fmt: skip
    for got, name in ((status, "status"), (accepted, "num_accepted"), (emitted, "num_emitted"), (out, "output_token_ids"),
                      (path, "accept_index")):  # fmt: skip
        np.testing.assert_array_equal(got, getattr(want, name), err_msg=f"{name} {rule} {dtype} {dense} {vocab}")


def simulated():
    for rule, dtype, dense, vocab in [("greedy", 0, False, 37), ("sampled", 0, False, 37), ("rejection", 0, True, 37),
                                      ("rejection", 0, False, 37), ("rejection", 1, True, 37), ("rejection", 2, False, 37),
                                      ("rejection", 0, True, 2060), ("sampled", 0, False, 2060)]:  # fmt: skip
        check(rule, dtype, dense, vocab)
    from assay.jit import cuda_verify

    with pytest.raises(assay.UnsupportedError, match="greedy, sampled, rejection, got 'kseq'"):
        cuda_verify.verify(np.zeros((1, 3), np.float32), 0, None, np.zeros(2), None, "kseq", *[None] * 8)


def test_the_simulated_twin_emits_the_tokens_of_c():
    code = "import test_verify_numba; test_verify_numba.simulated()"
    path = os.pathsep.join([str(Path(__file__).parent), str(TESTS)])
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
