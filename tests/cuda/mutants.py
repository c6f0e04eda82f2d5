"""Seeded bugs in the CUDA kernels, each of which a test must catch.

Usage: python tests/cuda/mutants.py [--only TEXT] [--jobs N] [--report docs/cuda-mutants.md]

A mutant is an edit of one kernel file in a copy of csrc. Its tests are run on the emulator plainly, then with ThreadSanitizer, then
with AddressSanitizer and UBSan; the first that fails has caught it, if the same tests pass there on the code as it is. Exit status 1
when one is caught by none, or when they do not. Writes the list, with the catcher and what it said, to the report.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mutations
import mutations_moe
import mutations_verify
from test_sanitized import SANITIZERS, sanitized_command

ALL = mutations.MUTATIONS + mutations_moe.MUTATIONS + mutations_verify.MUTATIONS
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PLAIN = "emulator"


@dataclass
class Outcome:
    caught_by: str
    said: str


def run(test: mutations.Test, root: Path, sanitizer: str | None) -> subprocess.CompletedProcess:
    env = os.environ | {"ASSAY_EMULATOR_ROOT": str(root / "cuda"), "ASSAY_EMULATOR_KERNELS": test.kernels}
    if sanitizer:
        command, more = sanitized_command(sanitizer, test.file, test.selection)
    else:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            str(HERE / test.file),
            "-k",
            test.selection,
        ]
        more = {"ASSAY_EMULATOR_FLAGS": "-O1"}
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env | more, timeout=240)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "ran for more than 240 s")


def said(done: subprocess.CompletedProcess) -> str:
    """One line of a failed run that tells what was wrong."""
    text = done.stdout + done.stderr
    for pattern in (
        r"SUMMARY: (?:Thread|Address)Sanitizer: (.*)",
        r"(?:^|\s)(\S+:\d+:\d+: runtime error: .*)",
        r"^E\s+emulator\.EmulationError: (.*)",
        r"^E\s+(AssertionError.*|assert .*)",
        r"^(FAILED .*)",
    ):
        if found := re.search(pattern, text, re.M):
            return re.sub(r"/\S*/csrc/", "", found[1]).strip()[:160]
    return f"ended with status {done.returncode}"


def judge(
    mutation: mutations.Mutation | None, test: mutations.Test, sanitizers: tuple[str | None, ...]
) -> Outcome | None:
    """Who caught it; None when nobody did."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "csrc"
        shutil.copytree(ROOT / "csrc", root)
        if mutation:
            path = root / "cuda" / mutation.file
            text = path.read_text()
            for old, new in mutation.edits:
                if text.count(old) != mutation.times:
                    raise SystemExit(
                        f"{mutation.name}: {mutation.file} has {old!r} {text.count(old)} times, not {mutation.times}"
                    )
                text = text.replace(old, new)
            path.write_text(text)
        for sanitizer in sanitizers:
            done = run(test, root, sanitizer)
            if done.returncode:
                return Outcome(sanitizer or PLAIN, said(done))
            if " passed" not in done.stdout:
                raise SystemExit(f"{test}: no test ran\n{done.stdout}{done.stderr}")
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="mutants whose name or file has this text")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "cuda-mutants.md")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    options = parser.parse_args()
    chosen = [m for m in ALL if options.only in m.name or options.only in m.file]
    everything = (None, *SANITIZERS)
    escaped = 0
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for m, outcome in zip(chosen, pool.map(lambda m: judge(m, m.test, everything), chosen), strict=True):
            escaped += outcome is None
            rows.append((m, outcome))
            print(f"{m.file}: {m.name}: {outcome or 'NOT CAUGHT'}", flush=True)
        # A failure shows a bug only where the tests pass without it.
        used = {(m.test, None if o.caught_by == PLAIN else o.caught_by) for m, o in rows if o}
        baselines = sorted(used, key=repr)
        found = pool.map(lambda pair: judge(None, pair[0], (pair[1],)), baselines)
        for (test, _), outcome in zip(baselines, found, strict=True):
            if outcome:
                print(f"UNMUTATED {test}: {outcome}", flush=True)
                escaped += 1
    if not options.only:
        options.report.write_text(report(rows))
    print(f"{len(rows)} mutants, {escaped} problems")
    return 1 if escaped else 0


def report(rows: list) -> str:
    lines = [
        "# Seeded bugs in the CUDA kernels",
        "",
        "Each is put into a copy of the sources and must make a test fail; the first of the emulator, ThreadSanitizer and",
        "AddressSanitizer with UBSan that does is named. Made by `python tests/cuda/mutants.py`, which fails when one escapes; the edits are in",
        "`tests/cuda/mutations.py`, `mutations_moe.py` and `mutations_verify.py`.",
        "",
        f"{len(rows)} bugs, {sum(outcome is not None for _, outcome in rows)} caught.",
        "",
        "| file | bug | caught by | what it said |",
        "| --- | --- | --- | --- |",
    ]
    for m, outcome in rows:
        words = (outcome.said if outcome else "").replace("|", "\\|")
        lines.append(f"| {m.file} | {m.name} | {outcome.caught_by if outcome else 'nobody'} | {words} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
