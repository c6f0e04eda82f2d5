"""Exceptions that assay raises on purpose. Bad arguments are plain ``ValueError`` or ``TypeError``."""


class AssayError(Exception):
    """Base of every error that assay raises itself."""


class UnsupportedError(AssayError):
    """This machine lacks what was asked for by name (an instruction set, a GPU, an optional library)."""


class RowError(AssayError, ValueError):
    """A request's data are bad, and the caller asked for an exception instead of a status."""


class FormatError(AssayError, ValueError):
    """A file is truncated, malformed or not what it says it is."""


class ProfileError(AssayError, ValueError):
    """A calibration profile is corrupt, from a newer version, or lacks what was asked of it."""
