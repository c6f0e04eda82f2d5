/* AMX-INT8's tile registers in memory, by the pseudo code of Intel's Software Developer's Manual; what the processor answers
 * with an exception aborts. */
#ifndef ASSAY_EMULATED_AMX_H
#define ASSAY_EMULATED_AMX_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { EMU_TILES = 8, EMU_TILE_ROWS = 16, EMU_TILE_BYTES = 64 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} emu_tile_config;

static _Thread_local struct {
    emu_tile_config config; /* palette 0: tiles are not in use */
    uint8_t data[EMU_TILES][EMU_TILE_ROWS][EMU_TILE_BYTES];
} emu_tiles;

static inline void emu_require(int holds) {
    if (!holds) abort();
}
static inline int emu_rows(int t) {
    emu_require(emu_tiles.config.palette == 1 && t >= 0 && t < EMU_TILES && emu_tiles.config.rows[t]);
    return emu_tiles.config.rows[t];
}
static inline int emu_bytes(int t) {
    emu_require(emu_rows(t) && emu_tiles.config.bytes[t]);
    return emu_tiles.config.bytes[t];
}

static inline void emu_tile_loadconfig(const void *at) {
    memset(&emu_tiles, 0, sizeof emu_tiles);
    memcpy(&emu_tiles.config, at, sizeof emu_tiles.config);
    const emu_tile_config *c = &emu_tiles.config;
    emu_require(c->palette == 1 && c->start_row == 0);
    for (int i = 0; i < 14; i++) emu_require(!c->reserved[i]);
    for (int t = 0; t < 16; t++) {
        emu_require(c->rows[t] <= EMU_TILE_ROWS && c->bytes[t] <= EMU_TILE_BYTES && !c->rows[t] == !c->bytes[t]);
        emu_require(t < EMU_TILES || !c->rows[t]);
    }
}
static inline void emu_tile_release(void) { memset(&emu_tiles, 0, sizeof emu_tiles); }
static inline void emu_tile_zero(int t) {
    emu_require(emu_rows(t));
    memset(emu_tiles.data[t], 0, sizeof emu_tiles.data[t]);
}
static inline void emu_tile_loadd(int t, const void *base, int64_t stride) {
    const int rows = emu_rows(t), bytes = emu_bytes(t);
    memset(emu_tiles.data[t], 0, sizeof emu_tiles.data[t]);
    for (int r = 0; r < rows; r++) memcpy(emu_tiles.data[t][r], (const uint8_t *)base + r * stride, (size_t)bytes);
}
static inline void emu_tile_stored(int t, void *base, int64_t stride) {
    const int rows = emu_rows(t), bytes = emu_bytes(t);
    for (int r = 0; r < rows; r++) memcpy((uint8_t *)base + r * stride, emu_tiles.data[t][r], (size_t)bytes);
}
/* Signed bytes of a times bytes of b, signed or not, four to an int32 of c, wrapping. */
static inline void emu_tile_dot(int c, int a, int b, int b_signed) {
    emu_require(c != a && c != b && a != b);
    emu_require(emu_rows(c) == emu_rows(a) && emu_bytes(c) == emu_bytes(b) && emu_bytes(a) == 4 * emu_rows(b));
    for (int m = 0; m < emu_rows(c); m++)
        for (int n = 0; n < emu_bytes(c) / 4; n++) {
            uint32_t sum;
            memcpy(&sum, &emu_tiles.data[c][m][4 * n], 4);
            for (int k = 0; k < emu_bytes(a); k++) {
                const uint8_t byte = emu_tiles.data[b][k / 4][4 * n + k % 4];
                sum += (uint32_t)((int8_t)emu_tiles.data[a][m][k] * (b_signed ? (int8_t)byte : byte));
            }
            memcpy(&emu_tiles.data[c][m][4 * n], &sum, 4);
        }
}
static inline void emu_tile_dpbsud(int c, int a, int b) { emu_tile_dot(c, a, b, 0); }
static inline void emu_tile_dpbssd(int c, int a, int b) { emu_tile_dot(c, a, b, 1); }

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbssd
#define _tile_loadconfig(at) emu_tile_loadconfig(at)
#define _tile_release() emu_tile_release()
#define _tile_zero(t) emu_tile_zero(t)
#define _tile_loadd(t, base, stride) emu_tile_loadd(t, base, stride)
#define _tile_stored(t, base, stride) emu_tile_stored(t, base, stride)
#define _tile_dpbsud(c, a, b) emu_tile_dpbsud(c, a, b)
#define _tile_dpbssd(c, a, b) emu_tile_dpbssd(c, a, b)

#endif
