"""INT4 and int8 GEMM, C[M, N] = A[M, K] @ W[N, K].T, on the weight shapes of real models."""

OPS = ("w4a8_gemm", "w4a16_gemm", "w8a8_gemm")


def test_gemm(point, time_point):
    time_point(point)
