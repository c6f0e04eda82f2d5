/* INT4 weights from the canonical arrays to the GPU's order (w4_layout.h), on the host. */
#include <string.h>

#include "assay_cuda.h"
#include "w4_layout.h"

static int supported(int64_t n, int64_t k, int64_t group_size) {
    if (n < 1 || k < 1 || n >= 1 << 24 || k >= 1 << 24) return 0;
    if (group_size == k) return 1;
    return (group_size == 32 || group_size == 64 || group_size == 128) && k % group_size == 0;
}

static int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

size_t assay_cuda_w4_packed_bytes(int64_t n, int64_t k, int64_t group_size, int symmetric) {
    if (!supported(n, k, group_size)) return 0;
    const int64_t tiles = round_up(n, ASSAY_CUDA_W4_TILE) / ASSAY_CUDA_W4_TILE;
    const int64_t steps = round_up(k, ASSAY_CUDA_W4_PAD) / ASSAY_CUDA_W4_STEP;
    const int64_t group = ASSAY_CUDA_W4_SCALES_BYTES + (symmetric ? 0 : ASSAY_CUDA_W4_ZEROS_BYTES);
    return (size_t)(tiles * (steps * ASSAY_CUDA_W4_STEP_BYTES + k / group_size * group));
}

/* Word j of lane l of a step: eight nibbles of column n0 + 8 j + l / 4. */
static uint32_t word_of(const uint8_t *row, int64_t k, int64_t k0, int lane) {
    uint32_t word = 0;
    for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
            const int64_t at = k0 + 16 * (i / 2) + 8 * (i % 2) + 2 * (lane % 4) + e;
            if (at < k) word |= (uint32_t)(row[at / 2] >> (at % 2 * 4) & 15) << (4 * i + 16 * e);
        }
    return word;
}

int assay_cuda_w4_pack(int64_t n, int64_t k, int64_t group_size, const uint8_t *qweight, const uint16_t *scales,
                       const uint8_t *zeros, void *packed) {
    if (!supported(n, k, group_size) || !qweight || !scales || !packed) return ASSAY_EINVAL;
    const int64_t tiles = round_up(n, ASSAY_CUDA_W4_TILE) / ASSAY_CUDA_W4_TILE;
    const int64_t steps = round_up(k, ASSAY_CUDA_W4_PAD) / ASSAY_CUDA_W4_STEP, groups = k / group_size;
    const int64_t row_bytes = (k + 1) / 2;
    memset(packed, 0, assay_cuda_w4_packed_bytes(n, k, group_size, zeros == NULL));
    uint8_t *const weight_section = packed;
    uint8_t *const scale_section = weight_section + tiles * steps * ASSAY_CUDA_W4_STEP_BYTES;
    uint8_t *const zero_section = scale_section + tiles * groups * ASSAY_CUDA_W4_SCALES_BYTES;
    for (int64_t tile = 0; tile < tiles; tile++) {
        for (int64_t step = 0; step < steps; step++) {
            uint8_t *const to = weight_section + (tile * steps + step) * ASSAY_CUDA_W4_STEP_BYTES;
            for (int lane = 0; lane < 32; lane++)
                for (int j = 0; j < 4; j++) {
                    const int64_t column = ASSAY_CUDA_W4_TILE * tile + 8 * j + lane / 4;
                    if (column >= n) break;
                    const uint32_t word = word_of(qweight + column * row_bytes, k, ASSAY_CUDA_W4_STEP * step, lane);
                    memcpy(to + lane * 16 + j * 4, &word, 4);
                }
        }
        for (int c = 0; c < ASSAY_CUDA_W4_TILE; c++) {
            const int64_t column = ASSAY_CUDA_W4_TILE * tile + c;
            if (column >= n) break;
            const int j = c / 8, r = c % 8;
            for (int64_t g = 0; g < groups; g++) {
                memcpy(scale_section + (tile * groups + g) * ASSAY_CUDA_W4_SCALES_BYTES + (8 * (r / 2) + 2 * j + r % 2) * 2,
                       scales + column * groups + g, 2);
                if (zeros)
                    zero_section[(tile * groups + g) * ASSAY_CUDA_W4_ZEROS_BYTES + 4 * r + j] = zeros[column * groups + g] & 15;
            }
        }
    }
    return ASSAY_OK;
}
