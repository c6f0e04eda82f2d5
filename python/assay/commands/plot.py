"""``assay plot``: one picture of a profile, or of what techniques bring, as SVG, PNG or PDF."""

import argparse
import io
import json
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from assay.profile import Profile

KINDS = {
    "roofline": "every measured kernel under the measured roofs",
    "accuracy": "predicted over measured time, with a band of 10%",
    "errors": "signed error of every held-out point",
    "widths": "time over rows of the INT4 product, measured and predicted",
    "speedups": "what techniques bring, alone and together",
    "interactions": "how far the gains of pairs multiply",
}
OF_TECHNIQUES = ("speedups", "interactions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = "kinds:\n" + "\n".join(f"  {kind:13} {what}" for kind, what in KINDS.items())
    parser.add_argument("kind", metavar="KIND", choices=tuple(KINDS), help=", ".join(KINDS))
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write: .svg, .png or .pdf (KIND.svg)")
    add_sources(parser)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """What the pictures are of."""
    parser.add_argument("--profile", metavar="FILE", help="profile (default: where calibrate writes)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the roofline and the widths (default: the most)")
    parser.add_argument("--model", default="mixtral-8x7b", help="of the techniques (mixtral-8x7b)")
    parser.add_argument("--with", dest="techniques", metavar="T,...", help="techniques, as `assay techniques --with`")
    parser.add_argument(
        "--hardware", metavar="NAME", help="a device of the catalog for the techniques, not the profile"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="of the techniques (1)")


def run(args: argparse.Namespace) -> int:
    """Writes the picture; exit status 0."""
    from assay import profile
    from assay.report import plot

    path = Path(args.output or f"{args.kind}.svg")
    if args.kind in OF_TECHNIQUES:
        figure = technique_pictures(techniques(args))[args.kind]()
    else:
        source = args.profile or profile.default_profile_path()
        figure = profile_pictures(profile.load(source), args.threads)[args.kind]()
    plot.save(figure, path)
    print(f"{KINDS[args.kind]}: {path}")
    return 0


def answer(command: str, words: list[str]) -> dict[str, Any]:
    """What another command says in JSON: pictures and pages show the same as its table does."""
    module = import_module(f"assay.commands.{command}")
    parser = argparse.ArgumentParser(prog=f"assay {command}")
    module.add_arguments(parser)
    said = io.StringIO()
    with redirect_stdout(said):
        module.run(parser.parse_args([*words, "-o", "json"]))
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def technique_words(args: argparse.Namespace) -> list[str]:
    """The arguments of `assay techniques` that ask what `args` ask."""
    words = [args.model, "--batch", str(args.batch)]
    for option in ("techniques", "hardware"):
        if value := getattr(args, option):
            words += [{"techniques": "--with"}.get(option, f"--{option}"), value]
    if args.profile and not args.hardware:
        words += ["--profile", args.profile]
    return words


def techniques(args: argparse.Namespace) -> dict[str, Any]:
    """The answer of `assay techniques`, with the ``command`` that gives it."""
    words = technique_words(args)
    return answer("techniques", words) | {"command": shlex.join(["assay", "techniques", *words])}


def technique_pictures(found: dict[str, Any]) -> "dict[str, Callable[[], Figure]]":
    """Pictures of an answer of `assay techniques`."""
    from assay.report import plot

    return {
        "speedups": lambda: plot.speedups(found["rows"]),
        "interactions": lambda: plot.interactions(found["rows"]),
    }


def profile_pictures(made: "Profile", threads: int | None) -> "dict[str, Callable[[], Figure]]":
    """Pictures of a profile.

    Raises
    ------
    ValueError
        No point was measured at so many threads.
    """
    from assay.measure import summary
    from assay.report import plot

    counts = sorted({sample.threads for sample in made.samples})
    if not counts:
        raise ValueError("profile: expected measured points, got none")
    count = counts[-1] if threads is None else threads
    if count not in counts:
        raise ValueError(f"--threads: expected one of {', '.join(map(str, counts))}, got {threads}")
    points = [row for row in summary.point_rows(made) if row["predicted_s"] is not None]
    here = [row for row in points if row["threads"] == count]
    products = [
        {**row, "m": row["params"]["m"], "shape": f"{row['params']['n']} x {row['params']['k']}"}
        for row in here
        if row["op"] == "w4a8_gemm" and (row["params"]["group_size"], row["params"]["symmetric"]) == (32, True)
    ]
    roofs = [row for row in summary.roof_rows(made) if row["threads"] == count]
    return {
        "roofline": lambda: plot.roofline(roofs, here),
        "accuracy": lambda: plot.accuracy(points),
        "errors": lambda: plot.errors(points),
        "widths": lambda: plot.widths(products),
    }
