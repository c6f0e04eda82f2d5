// The counter-based generator of every random decision: csrc/philox.h itself, so a seed's bits are the CPU's.
#ifndef ASSAY_CUDA_PHILOX_CUH
#define ASSAY_CUDA_PHILOX_CUH

#include "ptx.cuh"

#include "../philox.h"

namespace assay {

struct Philox {
    uint32_t x[4];
};

// The four words of a key: what assay_uniform and the race draw from.
ASSAY_DEVICE Philox philox_words(uint64_t seed, uint64_t position, uint32_t domain, uint32_t node) {
    Philox p = {{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), domain, node}};
    assay_philox4x32(p.x, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return p;
}

// assay_uniform.
ASSAY_DEVICE double philox_uniform(uint64_t seed, uint64_t position, uint32_t domain, uint32_t node) {
    const Philox p = philox_words(seed, position, domain, node);
    return assay_unit_interval(p.x[0], p.x[1]);
}

}  // namespace assay

#endif
