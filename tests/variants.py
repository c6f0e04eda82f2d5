"""Which kernel variants run here."""


def runnable_variants(op: str) -> list[str]:
    """ISA tiers of an op that this build has and this CPU runs, scalar first."""
    from assay.ops import info

    found = [v["isa"] for v in info.variants() if v["op"] == op and v["compiled"] and v["supported"]]
    return sorted(found, key=lambda isa: isa != "scalar")
