"""Accepted lengths by number of drafts, as InferenceX publishes them (``golden_al_distribution/*.yaml``)."""

import re
from pathlib import Path

from ..errors import FormatError

_MAX_BYTES = 1 << 20


def read_accepted_lengths(path: str | Path) -> dict[str, dict[int, float]]:
    """Mean tokens a step (the bonus token in) at 1, 2, ... drafts, by model and mode ("model thinking_on").

    Two levels of names over ``drafts: length``, which is all of YAML that these files use.

    Raises
    ------
    FormatError
        A line that is neither, a length below 1 or above drafts + 1, or no lengths at all.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise FormatError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(raw) > _MAX_BYTES:
        raise FormatError(f"{path}: expected at most {_MAX_BYTES} bytes, got {len(raw)}")
    found: dict[str, dict[int, float]] = {}
    model = mode = ""
    for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
        text = line.split("#", 1)[0].rstrip()
        if not text:
            continue
        if match := re.fullmatch(r"(\S[^:]*):", text):
            model = match[1]
        elif match := re.fullmatch(r"\s+(\w+):", text):
            mode = match[1]
        elif match := re.fullmatch(r"\s+(\d{1,3}): (\d+(?:\.\d+)?)", text):
            drafts, length = int(match[1]), float(match[2])
            if not 1 <= length <= drafts + 1:
                raise FormatError(
                    f"{path}: line {number}: expected 1 to {drafts + 1} tokens at {drafts} drafts, got {length}"
                )
            found.setdefault(f"{model} {mode}".strip(), {})[drafts] = length
        else:
            raise FormatError(f"{path}: line {number}: expected a name or drafts: length, got {text[:60]!r}")
    if not found:
        raise FormatError(f"{path}: expected accepted lengths, got none")
    return found
