"""A wheel's smoke test: run by itself, away from the source tree, with nothing but the wheel's own dependencies."""

import numpy as np

import assay

rng = np.random.default_rng(0)
weights = rng.standard_normal((100, 256)).astype(np.float32)
qweight, scales, zeros = assay.quantize_int4(weights, group_size=64, symmetric=False)
packed = assay.pack(qweight, scales, zeros)
a = rng.standard_normal((7, 256)).astype(np.float32)
exact = a @ packed.dequantize().T
for gemm, tolerance in ((assay.w4a8_gemm, 2e-2), (assay.w4a16_gemm, 1e-5)):
    assert np.abs(gemm(a, packed) - exact).max() < tolerance * np.abs(exact).max(), gemm
    assert np.array_equal(gemm(a[3:4], packed), gemm(a, packed)[3:4]), gemm

route = assay.moe_route(rng.standard_normal((5, 8)).astype(np.float32), 2)
assert route.topk_ids.shape == (5, 2)
assert np.allclose(route.topk_weights.sum(1), 1)

logits = rng.standard_normal((4, 1000)).astype(np.float32)
draft = logits.argmax(1).astype(np.int32)[:3]
result = assay.verify_chain(logits, draft, np.array([0, 3], np.int32), rule="greedy")
assert result.num_accepted.tolist() == [3]
print("smoke test passed: assay", assay.__version__)
