"""``assay report``: everything on one page: verdict, roofs, accuracy with its misses, techniques, claims, the machine."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.profile import Profile
    from assay.report.html import Section

#: From this error on a held-out point is listed as a miss.
MISS = 0.10
MOODS = {"consistent": "good", "inconsistent": "bad"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="page to write (report.html)")
    import_module("assay.commands.plot").add_sources(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the page; exit status 0."""
    from assay import profile
    from assay.commands.plot import answer, techniques
    from assay.report.html import page
    from assay.report.progress import Progress

    source = args.profile or str(profile.default_profile_path())
    args.profile = source
    with Progress(4, "report", show=True) as bar:
        made = profile.load(source)
        sections = [_roofline(made, args.threads), _accuracy(made, args.threads)]
        bar.advance(1, "techniques")
        found = techniques(args)
        sections.append(_techniques(found))
        bar.advance(1, "claims")
        sections.append(_claims(answer("claims", [])))
        bar.advance(1, "page")
        sections.append(_machine(made, source))
        verdict = _verdict(made, found)
        text = page(f"What inference costs on {made.machine.cpu}", verdict, sections, _foot(made))
        path = Path(args.output)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        bar.advance(1, "done")
    print(
        f"{verdict}\n\n{path}: {len(text) / 1024:.0f} KiB, opens anywhere\n\nnext: assay predict {args.model} --profile {source}"
    )
    return 0


def _svg(pictures: dict[str, Any], *kinds: str) -> list[tuple[str, str]]:
    from assay.commands.plot import KINDS
    from assay.report import plot

    return [(plot.svg(pictures[kind]()), KINDS[kind][0].upper() + KINDS[kind][1:] + ".") for kind in kinds]


def _verdict(made: "Profile", found: dict[str, Any]) -> str:
    from assay.report.table import percent

    errors = [f"{op} {percent(row['median_ape'])}" for op, row in made.accuracy.items() if row.get("n")]
    return (
        f"{found['model']['name']}, batch {found['batch']}: {found['verdict']} "
        f"Median error of the kernels' model on points that it never saw: {', '.join(errors) or 'not known'}."
    )


def _roofline(made: "Profile", threads: int | None) -> "Section":
    from assay.commands.plot import profile_pictures
    from assay.measure import summary
    from assay.report.html import Section
    from assay.report.table import Column, percent, roof_value, seconds

    section = Section("Roofs and kernels").pictures(*_svg(profile_pictures(made, threads), "roofline", "widths"))
    section.table(
        summary.roof_rows(made),
        [
            Column("roof", "roof"),
            Column("threads", "threads", align="right"),
            Column(("median", "unit"), "median", roof_value, align="right"),
            Column("spread", "spread", percent, align="right"),
        ],
    )
    columns = [
        Column("op", "op"),
        Column("threads", "threads", align="right"),
        Column("points", "points", align="right"),
        Column("fastest_s", "fastest", seconds, align="right"),
        Column("slowest_s", "slowest", seconds, align="right"),
        Column("roof", "held against"),
        Column("best_of_roof", "best", percent, align="right"),
        Column("median_of_roof", "median", percent, align="right"),
    ]
    return section.table(summary.op_rows(made), columns).command("Measured by", " ".join(made.command))


def _accuracy(made: "Profile", threads: int | None) -> "Section":
    from assay.commands.plot import profile_pictures
    from assay.measure import summary
    from assay.report.html import Section
    from assay.report.table import Column, percent, seconds, signed_percent, yes_no

    section = Section("How wrong it may be").pictures(*_svg(profile_pictures(made, threads), "accuracy", "errors"))
    rows = [{"op": op, **row} for op, row in made.accuracy.items()]
    section.table(
        rows,
        [
            Column("op", "op"),
            Column("n", "held out", align="right"),
            Column("median_ape", "median error", percent, align="right"),
            Column("p90_ape", "90th percentile", percent, align="right"),
            Column("bias", "bias", signed_percent, align="right"),
            Column("coverage", "in 90% interval", percent, align="right"),
            Column("repeat_spread", "repeat to repeat", percent, align="right"),
        ],
    )
    held_out = [row for row in summary.point_rows(made) if row["held_out"] and row["error"] is not None]
    missed = sorted((row for row in held_out if abs(row["error"]) > MISS), key=lambda row: -abs(row["error"]))
    section.text(
        f"{len(missed)} of {len(held_out)} held-out points are missed by more than {percent(MISS)}, worst first:"
    )
    columns = [
        Column("op", "op"),
        Column("label", "point"),
        Column("measured_s", "measured", seconds, align="right"),
        Column("predicted_s", "predicted", seconds, align="right"),
        Column("error", "error", signed_percent, align="right"),
        Column("inside", "in 90% interval", yes_no),
        Column("spread", "spread of its repeats", percent, align="right"),
    ]
    moods = {i: "good" if row["inside"] else "bad" for i, row in enumerate(missed)}
    return section.table(missed, columns, moods)


def _techniques(found: dict[str, Any]) -> "Section":
    from assay.commands.plot import technique_pictures
    from assay.report.html import Section
    from assay.report.table import Column, number, yes_no

    def three(stem: str) -> tuple[str, str, str]:
        return stem, f"{stem}_low", f"{stem}_high"

    columns = [
        Column("techniques", "techniques", lambda names: " + ".join(names) or "none"),
        Column(three("tokens_per_s"), "tokens/s", number),
        Column(three("speedup"), "speed-up", number),
        Column("product", "product", number, align="right"),
        Column(three("interaction"), "I", number),
        Column(("bound_before", "bound_after"), "bound by", lambda a, b: a if a == b else f"{a} -> {b}"),
        Column("fits", "fits", yes_no),
        Column("why", "because"),
    ]
    section = Section("Do the gains multiply?")
    section.text(f"{found['model']['name']} on {found['machine']}, batch {found['batch']}: {found['verdict']}")
    section.pictures(*_svg(technique_pictures(found), "speedups", "interactions")).table(found["rows"], columns)
    for note in found["notes"]:
        section.text(note, soft=True)
    return section.command("The same in a terminal:", found["command"])


def _claims(found: dict[str, Any]) -> "Section":
    from assay.report.html import Section
    from assay.report.table import Column

    columns = [
        Column("id", "id"),
        Column("claim", "claim"),
        Column("recomputed", "recomputed"),
        Column("verdict", "verdict"),
        Column("depends_on", "depends on"),
        Column("arithmetic", "arithmetic"),
    ]
    moods = {i: MOODS[row["verdict"]] for i, row in enumerate(found["rows"]) if row["verdict"] in MOODS}
    section = Section("Claims, recomputed").text(found["verdict"])
    return section.table(found["rows"], columns, moods).command("The same in a terminal:", "assay claims")


def _machine(made: "Profile", source: str) -> "Section":
    from assay.report.html import Section
    from assay.report.table import Column, size

    m = made.machine
    caches = ", ".join(f"{name[:-6].upper()} {size(value)}" for name, value in m.caches.items() if value)
    rows = [
        {"what": "processor", "is": f"{m.cpu}, {m.cores} cores"},
        {"what": "instruction sets", "is": ", ".join(m.isa)},
        {"what": "caches", "is": caches or "not known"},
        {"what": "memory", "is": size(m.memory_bytes) if m.memory_bytes else "not known"},
        {"what": "system", "is": f"{m.os}, Python {m.python}, numpy {m.numpy}"},
        {"what": "kernels", "is": ", ".join(f"{op} {isa}" for op, isa in made.package.get("kernels", {}).items())},
        {"what": "fingerprint", "is": m.fingerprint},
        {"what": "profile", "is": f"{source}, {made.created_utc}"},
        *({"what": "warning", "is": note} for note in made.settings.get("notes", [])),
    ]
    return Section("The machine").table(rows, [Column("what", "what"), Column("is", "is")])


def _foot(made: "Profile") -> str:
    version = made.package.get("assay", "")
    return (
        f"assay {version}. Intervals are 90%. Times of kernels are medians of repeats on the machine named above;"
        " speeds of catalog devices come from data sheets and judged utilisations."
    )
