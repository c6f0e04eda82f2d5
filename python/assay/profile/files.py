"""Profiles as files: where that of this machine lies, reading one strictly, writing one whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from assay.checks import Json
from assay.errors import ProfileError
from assay.profile.document import Profile

MAX_PROFILE_BYTES = 64 * 2**20  # a full calibration is under 2 MiB; more than this is not a profile


def default_profile_path(environ: Mapping[str, str] | None = None, ordinal: int | None = None) -> Path:
    """Where the profile of this machine lives: ``$ASSAY_PROFILE``, else ``assay/profile.json`` in the user's cache.

    Parameters
    ----------
    environ
        The environment to read; that of the process when left out. ``XDG_CACHE_HOME`` counts only if absolute,
        as the XDG base directory specification asks.
    ordinal
        Of a GPU, whose profile is ``assay/profile-cuda-N.json`` there, whatever ``$ASSAY_PROFILE`` is.
    """
    env = os.environ if environ is None else environ
    if env.get("ASSAY_PROFILE") and ordinal is None:
        return Path(env["ASSAY_PROFILE"]).expanduser()
    cache = env.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "assay" / ("profile.json" if ordinal is None else f"profile-cuda-{ordinal}.json")


def read_json(path: str | os.PathLike[str]) -> Json:
    """A JSON file of at most 64 MiB, of finite numbers; ProfileError for any other."""
    name = os.fspath(path)
    try:
        with Path(name).open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{name}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{name}: expected at most {MAX_PROFILE_BYTES} bytes, got more")

    def refuse(constant: str) -> float:
        raise ProfileError(f"{name}: expected finite numbers only, got {constant}")

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ProfileError(f"{name}: expected JSON of moderate depth, got one nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"{name}: expected UTF-8 text, got byte {raw[error.start]:#04x} at {error.start}") from error
    except ProfileError:
        raise
    except ValueError as error:  # JSONDecodeError, and integers with more digits than Python converts
        raise ProfileError(f"{name}: expected JSON, got a syntax error: {error}") from error


def load(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile.

    Raises
    ------
    ProfileError
        The file cannot be read, is larger than 64 MiB, is no JSON, or fails validation.
    """
    data = read_json(path)
    try:
        return Profile.from_json(data)
    except ProfileError as error:
        raise ProfileError(f"{os.fspath(path)}: {error}") from error


def save(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile so that a reader sees either the old file or the whole new one, never a part.

    The text goes to a temporary file beside ``path``, is flushed to the disk, and takes the name by a rename.

    Raises
    ------
    ProfileError
        The profile would not load again (NaN, infinity, negative times, wrong params): nothing is written.
    """
    data = profile.to_json()
    try:
        text = json.dumps(data, allow_nan=False, indent=1) + "\n"
    except ValueError as error:
        raise ProfileError(f"profile: expected finite numbers only, got NaN or infinity ({error})") from error
    except TypeError as error:
        raise ProfileError(f"profile: expected JSON values only: {error}") from error
    Profile.from_json(json.loads(text))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private; a profile is meant to be shared
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink()
        raise


def compatible(profile: Profile, machine_fingerprint: str) -> str | None:
    """A warning when the profile comes from another machine, None when it is this one's.

    Predicting with a profile from elsewhere is allowed, and useful; the reader only has to know it.
    """
    if profile.machine.fingerprint == machine_fingerprint:
        return None
    return (
        f"the profile was measured on another machine ({profile.machine.cpu}, {profile.machine.cores} cores; "
        f"fingerprint {profile.machine.fingerprint}): the prediction is for that machine, not for this one "
        f"({machine_fingerprint})"
    )
