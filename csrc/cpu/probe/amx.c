/* Probes for AMX-INT8. int8: tdpbssd into four tiles of sums, 32768 operations each, one in 16 cycles. Its operands are as the
 * INT4 GEMM's: codes of -8..7 and activations of all sizes, since the clock falls with what is multiplied (zeros run half as fast
 * again). All else is AVX-512's. */
#include "../../kernels.h"

#include <immintrin.h>

extern const assay_probe_kernel assay_probe_avx512vnni;

static void configure(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

static double int8(int64_t iterations) {
    enum { TILE = 16 * 64 };
    _Alignas(64) int8_t a[2 * TILE], w[2 * TILE];
    _Alignas(64) int32_t sums[16][16];
    uint32_t state = 1;
    for (int i = 0; i < 2 * TILE; i++) {
        state = state * 1664525 + 1013904223;
        a[i] = (int8_t)((int)(state >> 24) % 255 - 127);
        w[i] = (int8_t)((int)(state >> 12 & 15) - 8);
    }
    configure();
    __asm__ volatile("" ::"r"(a), "r"(w) : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + TILE, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + TILE, 64);
    for (int64_t n = 0; n < iterations; n++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    __asm__ volatile("" ::"r"(sums) : "memory");
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 64 * (double)iterations;
}

static uint64_t read_all(const void *buffer, size_t bytes, size_t ahead) {
    return assay_probe_avx512vnni.read(buffer, bytes, ahead);
}
static double fp32(int64_t iterations) { return assay_probe_avx512vnni.fp32(iterations); }
static double exponentials(int64_t iterations) { return assay_probe_avx512vnni.exponentials(iterations); }

const assay_probe_kernel assay_probe_amx = {read_all, int8, fp32, exponentials};
