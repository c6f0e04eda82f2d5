"""The calibration profile: one JSON file that carries everything the cost model knows about a machine.

It is the only door between measuring and predicting, so it is checked strictly: every error names the place in
the file, what was found and what was wanted. The format is described in docs/profile-format.md.
"""

from assay.profile.document import MODES, SCHEMA, SCHEMA_VERSION, Profile
from assay.profile.files import MAX_PROFILE_BYTES, compatible, default_profile_path, load, save
from assay.profile.parts import (
    GEMM_OPS,
    GPU_ROOF_UNITS,
    MATRIX_OPS,
    ROOF_UNITS,
    SET_ROOFS,
    VERIFY_RULES,
    Machine,
    Roof,
    Sample,
    spread_of,
)
from assay.profile.pytest_benchmark import from_pytest_benchmark

__all__ = [
    "GEMM_OPS",
    "GPU_ROOF_UNITS",
    "MATRIX_OPS",
    "MAX_PROFILE_BYTES",
    "MODES",
    "ROOF_UNITS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SET_ROOFS",
    "VERIFY_RULES",
    "Machine",
    "Profile",
    "Roof",
    "Sample",
    "compatible",
    "default_profile_path",
    "from_pytest_benchmark",
    "load",
    "save",
    "spread_of",
]
