// ldmatrix and mma.sync on the CPU. Which lane holds which element follows the PTX manual's figures; tests/cuda/test_lanes.py
// checks it against CuTe's published layouts.
#ifndef ASSAY_EMU_MATRIX_H
#define ASSAY_EMU_MATRIX_H

namespace assay {
namespace ptx {

namespace host {

struct LoadMatrix {
    const void *row;
    uint32_t bytes[4];            // the row that this lane's address names, read by this lane
    uint32_t r[4];
};

template <int MATRICES, bool TRANSPOSED>
inline void load_matrices(uint32_t *r, const void *smem) {
    LoadMatrix mine = {};
    mine.row = smem;
    if (lane() < 8 * MATRICES) {
        emu::check_shared("ldmatrix", smem, 16, 16);
        memcpy(mine.bytes, smem, 16);
    }
    emu::collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", ~0u, &mine, [](void *const *lanes, uint32_t) {
        auto row = [&](uint32_t matrix, uint32_t i) { return static_cast<LoadMatrix *>(lanes[8 * matrix + i]); };
        emu::counters->ldmatrix++;
        for (uint32_t m = 0; m < MATRICES; m++) {
            // Eight rows of four banks each: as many wavefronts as the busiest bank has different words.
            uint32_t rows_on[8] = {};
            uint32_t worst = 0;
            for (uint32_t i = 0; i < 8; i++) {
                bool again = false;
                for (uint32_t j = 0; j < i; j++) again |= row(m, j)->row == row(m, i)->row;
                const uint32_t bank = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row(m, i)->row) >> 4) & 7;
                if (!again) worst = ++rows_on[bank] > worst ? rows_on[bank] : worst;
            }
            emu::counters->ldmatrix_wavefronts += worst;
            for (uint32_t l = 0; l < 32; l++) {
                uint32_t &out = static_cast<LoadMatrix *>(lanes[l])->r[m];
                if (!TRANSPOSED) {
                    out = row(m, l / 4)->bytes[l % 4];
                } else {
                    uint16_t half[2];
                    for (uint32_t e = 0; e < 2; e++) {
                        uint16_t halves[8];
                        memcpy(halves, row(m, 2 * (l % 4) + e)->bytes, 16);
                        half[e] = halves[l / 4];
                    }
                    out = pair(half[0], half[1]);
                }
            }
        }
    });
    for (int m = 0; m < MATRICES; m++) r[m] = mine.r[m];
}

template <class C>
struct Mma {
    uint32_t a[4], b[2];
    C c[4];
};

// Row and column of element e (of one register each 32 bits: two halves or four bytes) of lane l.
struct Place {
    uint32_t row, column;
};
// a of m16n8k16 (16-bit) and m16n8k32 (8-bit): registers 0, 1 are rows g and g + 8 of the first half of k, 2, 3 of the second.
template <uint32_t PER_REGISTER>
inline Place place_a(uint32_t l, uint32_t reg, uint32_t e) {
    return {l / 4 + 8 * (reg & 1), PER_REGISTER * (l % 4) + e + 4 * PER_REGISTER * (reg >> 1)};
}
// b: (k, n).
template <uint32_t PER_REGISTER>
inline Place place_b(uint32_t l, uint32_t reg, uint32_t e) {
    return {PER_REGISTER * (l % 4) + e + 4 * PER_REGISTER * reg, l / 4};
}
inline Place place_c(uint32_t l, uint32_t e) { return {l / 4 + 8 * (e >> 1), 2 * (l % 4) + (e & 1)}; }

template <class C, class E, uint32_t PER_REGISTER, class Decode>
inline void multiply(void *const *lanes, Decode decode) {
    constexpr uint32_t K = 8 * PER_REGISTER;
    E a[16][K], b[K][8];
    C c[16][8];
    auto of = [&](uint32_t l) -> Mma<C> & { return *static_cast<Mma<C> *>(lanes[l]); };
    for (uint32_t l = 0; l < 32; l++) {
        for (uint32_t e = 0; e < PER_REGISTER; e++) {
            for (uint32_t reg = 0; reg < 4; reg++) {
                const Place p = place_a<PER_REGISTER>(l, reg, e);
                a[p.row][p.column] = decode(of(l).a[reg], e);
            }
            for (uint32_t reg = 0; reg < 2; reg++) {
                const Place p = place_b<PER_REGISTER>(l, reg, e);
                b[p.row][p.column] = decode(of(l).b[reg], e);
            }
        }
        for (uint32_t e = 0; e < 4; e++) c[place_c(l, e).row][place_c(l, e).column] = of(l).c[e];
    }
    for (uint32_t i = 0; i < 16; i++)
        for (uint32_t k = 0; k < K; k++)
            for (uint32_t j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (uint32_t l = 0; l < 32; l++)
        for (uint32_t e = 0; e < 4; e++) of(l).c[e] = c[place_c(l, e).row][place_c(l, e).column];
    emu::counters->mma++;
}

template <class C>
inline void mma(const char *what, C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emu::Exchange all) {
    Mma<C> mine;
    memcpy(mine.a, a, sizeof(mine.a));
    memcpy(mine.b, b, sizeof(mine.b));
    memcpy(mine.c, c, sizeof(mine.c));
    emu::collective(what, ~0u, &mine, all);
    memcpy(c, mine.c, sizeof(mine.c));
}

}  // namespace host

inline void ldmatrix_x4(uint32_t (&r)[4], const void *smem) { host::load_matrices<4, false>(r, smem); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void *smem) { host::load_matrices<2, false>(r, smem); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *smem) { host::load_matrices<4, true>(r, smem); }

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::mma("mma_f16", c, a, b, [](void *const *lanes, uint32_t) {
        host::multiply<float, float, 2>(lanes, [](uint32_t v, uint32_t e) {
            return emu::half_to_float(static_cast<uint16_t>(v >> (16 * e)));
        });
    });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::mma("mma_bf16", c, a, b, [](void *const *lanes, uint32_t) {
        host::multiply<float, float, 2>(lanes, [](uint32_t v, uint32_t e) {
            return emu::bf16_to_float(static_cast<uint16_t>(v >> (16 * e)));
        });
    });
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::mma("mma_s8", c, a, b, [](void *const *lanes, uint32_t) {
        host::multiply<int32_t, int32_t, 4>(lanes, [](uint32_t v, uint32_t e) {
            return static_cast<int32_t>(static_cast<int8_t>(v >> (8 * e)));
        });
    });
}

}  // namespace ptx
}  // namespace assay

#endif
