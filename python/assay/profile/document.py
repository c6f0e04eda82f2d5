"""The profile as a whole: its parts, and the JSON object of docs/profile-format.md that they make."""

from dataclasses import dataclass, field

from assay.checks import (
    Json,
    check_bool,
    check_finite,
    check_int,
    check_list,
    check_number,
    check_object,
    check_text,
    fail,
)
from assay.errors import ProfileError
from assay.foreign import StoredTable, WholeRun
from assay.profile.parts import Machine, Roof, Sample

SCHEMA = "assay-profile"
SCHEMA_VERSION = 1
MAX_EARLIER = 20  # calibrations whose roofs a profile remembers
MODES = ("quick", "full", "imported", "published")


@dataclass
class Profile:
    """A calibration in memory. ``fits`` and ``accuracy`` are what ``assay.cost.stored.summarise`` returns.

    ``tables`` are points of kernels that others measured on this device, ``runs`` whole models that ran on it.
    """

    created_utc: str
    command: list[str]
    seed: int
    package: dict[str, Json]
    machine: Machine
    settings: dict[str, Json]
    roofs: list[Roof] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    fits: dict[str, Json] = field(default_factory=dict)
    accuracy: dict[str, Json] = field(default_factory=dict)
    complete: bool = False
    tables: list[StoredTable] = field(default_factory=list)
    runs: list[WholeRun] = field(default_factory=list)

    def roof(self, name: str, threads: int) -> Roof | None:
        """The roof of that name and thread count, or None."""
        return next((r for r in self.roofs if r.name == name and r.threads == threads), None)

    def runs_until_now(self) -> list[Json]:
        """The medians of this run's roofs behind those of the runs that it replaced, as ``settings.earlier`` keeps them."""
        now = {"created_utc": self.created_utc, "roofs": {f"{r.name}@{r.threads}": r.median for r in self.roofs}}
        return [*self.settings.get("earlier", []), now][-MAX_EARLIER:]

    def to_json(self) -> dict[str, Json]:
        """The profile as the JSON object described in docs/profile-format.md (not yet validated)."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created_utc": self.created_utc,
            "command": list(self.command),
            "seed": self.seed,
            "package": self.package,
            "machine": self.machine.to_json(),
            "settings": self.settings,
            "roofs": [r.to_json() for r in self.roofs],
            "samples": [s.to_json() for s in self.samples],
            "fits": self.fits,
            "accuracy": self.accuracy,
            "complete": self.complete,
            **({"tables": [t.to_json() for t in self.tables]} if self.tables else {}),
            **({"runs": [r.to_json() for r in self.runs]} if self.runs else {}),
        }

    @classmethod
    def from_json(cls, data: Json) -> "Profile":
        """Check a parsed JSON object strictly and build the profile.

        Raises
        ------
        ProfileError
            Wrong schema, a future version, a missing or unknown key, a value of the wrong kind or range; the
            message names the JSON path, what was got and what was wanted.
        """
        if not isinstance(data, dict):
            raise fail("$", "an object", data)
        if data.get("schema") != SCHEMA:
            raise fail("$.schema", repr(SCHEMA), data.get("schema"))
        version = check_int(data.get("schema_version"), "$.schema_version", 1)
        if version > SCHEMA_VERSION:
            raise ProfileError(
                f"schema_version {version} is newer than this assay understands ({SCHEMA_VERSION}); upgrade assay"
            )
        required = ("created_utc", "command", "seed", "package", "machine", "settings", "roofs", "samples")
        data = check_object(
            data, "$", ("schema", "schema_version", *required, "fits", "accuracy", "complete"), ("tables", "runs")
        )
        package = check_object(data["package"], "$.package", ("assay", "kernels", "compiler"), optional=None)
        settings = check_object(data["settings"], "$.settings", ("mode", "threads"), optional=None)
        if settings["mode"] not in MODES:
            raise fail("$.settings.mode", " or ".join(MODES), settings["mode"])
        for i, threads in enumerate(check_list(settings["threads"], "$.settings.threads")):
            check_int(threads, f"$.settings.threads[{i}]", 1)
        for i, earlier in enumerate(check_list(settings.get("earlier", []), "$.settings.earlier")):
            path = f"$.settings.earlier[{i}]"
            run = check_object(earlier, path, ("created_utc", "roofs"), optional=None)
            for name, median in check_object(run["roofs"], f"{path}.roofs", (), optional=None).items():
                check_number(median, f"{path}.roofs.{name}", positive=True)
        check_text(package["assay"], "$.package.assay")
        check_text(package["compiler"], "$.package.compiler")
        for op, variant in check_object(package["kernels"], "$.package.kernels", (), optional=None).items():
            check_text(variant, f"$.package.kernels.{op}")
        machine = Machine.from_json(data["machine"], "$.machine")
        roofs = [Roof.from_json(v, f"$.roofs[{i}]") for i, v in enumerate(check_list(data["roofs"], "$.roofs"))]
        seen: set[tuple[str, int]] = set()
        for i, roof in enumerate(roofs):
            if (roof.name, roof.threads) in seen:
                raise ProfileError(
                    f"$.roofs[{i}]: expected one roof per name and threads, got {roof.name} x{roof.threads} twice"
                )
            seen.add((roof.name, roof.threads))
        samples = [
            Sample.from_json(v, f"$.samples[{i}]") for i, v in enumerate(check_list(data["samples"], "$.samples"))
        ]
        fits = check_object(data["fits"], "$.fits", (), optional=None)
        accuracy = _accuracy(data["accuracy"], "$.accuracy")
        for path, part in (
            ("$.package", package),
            ("$.machine", dict(machine.extra)),
            ("$.settings", settings),
            ("$.fits", fits),
            ("$.accuracy", accuracy),
        ):
            check_finite(part, path)
        for i, sample in enumerate(samples):
            check_finite(dict(sample.params), f"$.samples[{i}].params")
        return cls(
            created_utc=check_text(data["created_utc"], "$.created_utc"),
            command=[check_text(v, f"$.command[{i}]") for i, v in enumerate(check_list(data["command"], "$.command"))],
            seed=check_int(data["seed"], "$.seed", 0),
            package=package,
            machine=machine,
            settings=settings,
            roofs=roofs,
            samples=samples,
            fits=fits,
            accuracy=accuracy,
            complete=check_bool(data["complete"], "$.complete"),
            tables=[
                StoredTable.from_json(v, f"$.tables[{i}]")
                for i, v in enumerate(check_list(data.get("tables", []), "$.tables"))
            ],
            runs=[
                WholeRun.from_json(v, f"$.runs[{i}]") for i, v in enumerate(check_list(data.get("runs", []), "$.runs"))
            ],
        )


def _accuracy(value: Json, path: str) -> dict[str, Json]:
    table = check_object(value, path, (), optional=None)
    for op, row in table.items():
        data = check_object(row, f"{path}.{op}", ("n", "median_ape", "p90_ape", "bias", "coverage"), optional=None)
        check_int(data["n"], f"{path}.{op}.n", 0)
    return table
