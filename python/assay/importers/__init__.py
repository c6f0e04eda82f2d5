"""Foreign benchmark files to `assay.tables.KernelTable`: one module a format, told apart by content.

Nothing here predicts. Every importer is defensive: a broken file is a `FormatError` that names the file and the column.
"""

import os
from pathlib import Path

from ..errors import FormatError
from ..tables import KernelTable

__all__ = ["read_tables"]


def read_tables(path: str | os.PathLike[str]) -> list[KernelTable]:
    """The points of a file, whatever of the known formats it is in.

    Parquet is read as AIConfigurator's; JSON as our profile, pytest-benchmark's or llama-bench's; other text as
    llama-bench's (csv, md, sql, jsonl) or test-backend-ops's.

    Raises
    ------
    FormatError
        Not readable, in no known format, or with broken values.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise FormatError(f"{file}: expected a file, got {'a folder' if file.is_dir() else 'nothing there'}")
        with file.open("rb") as handle:
            head = handle.read(4096)
    except OSError as exc:
        raise FormatError(f"{file}: cannot be read: {exc.strerror}") from exc
    if head[:4] == b"PAR1":
        from .aiconfigurator import read_parquet

        return read_parquet(file)
    from .text import read_text

    return read_text(file)
