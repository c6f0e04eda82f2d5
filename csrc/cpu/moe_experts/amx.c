/* What lies between the GEMMs of an expert layer: the loops of loops.h, vectorised by the compiler for this tier. */
#include "loops.h"

const assay_moe_experts_kernel assay_moe_experts_amx = {gather, activate, combine};
