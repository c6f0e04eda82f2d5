"""Which uncertain inputs move a predicted step most."""

from assay.cost.calls import StepEstimate
from assay.cost.draws import Influence


def step_influences(step: StepEstimate) -> list[Influence]:
    """Each op's error alone, the one that moves the step's time most first: calls of one op are off together."""
    ends: dict[str, list[float]] = {}
    for call in step.calls:
        low_high = ends.setdefault(call.op, [step.time_s, step.time_s])
        low_high[0] += call.low_s - call.time_s
        low_high[1] += call.high_s - call.time_s
    found = [Influence(op, low, high) for op, (low, high) in ends.items()]
    return sorted(found, key=lambda i: -i.swing)
