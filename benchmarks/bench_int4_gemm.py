"""INT4 GEMM, C[M, N] = A[M, K] @ W[N, K].T, on the weight shapes of real models."""

OPS = ("w4a8_gemm", "w4a16_gemm")


def test_int4_gemm(point, time_point):
    time_point(point)
