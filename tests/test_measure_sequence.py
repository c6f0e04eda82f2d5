"""A stack of layers and its calls alone, timed in turns: on a clock that knows what every call takes, and for real."""

from itertools import count

import pytest

from assay import machine
from assay.measure.arena import Arena
from assay.measure.points import STACKS, Point, grid, packed_bytes, stack_point
from assay.measure.sequence import ALONE_CALLS, SequenceTimer
from assay.measure.workloads import Workloads

MICROSECOND = 1000


class World:
    """Calls of named shapes; one that comes after another shape takes longer."""

    def __init__(self, takes, extra):
        self.now, self.takes, self.extra, self.last, self.made = 0, takes, extra, None, []

    def rotation(self, shape):
        def call():
            self.now += self.takes[shape] + (self.extra if self.last not in (None, shape) else 0)
            self.last = shape
            self.made.append(shape)

        return (call for _ in count())

    def clock(self):
        return self.now


def test_alone_is_without_what_calls_cost_each_other():
    world = World({"a": 10 * MICROSECOND, "b": 30 * MICROSECOND}, extra=2 * MICROSECOND)
    a, b = world.rotation("a"), world.rotation("b")
    timer = SequenceTimer([a, b, a, b], world.clock)
    timer.visit(0.0, 3, 3)
    assert timer.conditions == {"alone_s": pytest.approx(80e-6)}
    assert timer.samples == [pytest.approx(88e-6)] * 3, (
        "the last call alone was of b: every call of the stack is after another"
    )


def test_many_calls_of_a_shape_are_told_from_a_few():
    world = World({"a": 10 * MICROSECOND}, extra=0)
    timer = SequenceTimer([world.rotation("a")] * 1, world.clock)
    timer.visit(0.0, 1, 1)
    assert world.made == ["a"] * 3, "one that is not timed, one alone, one in the stack"
    world = World({"a": 10 * MICROSECOND}, extra=0)
    rotation = world.rotation("a")
    timer = SequenceTimer([rotation] * 20, world.clock)
    timer.visit(0.0, 1, 1)
    assert len(world.made) == 1 + ALONE_CALLS + 20
    assert timer.conditions["alone_s"] == pytest.approx(200e-6)


def test_visits_add_up_and_keep_to_their_time():
    world = World({"a": 100 * MICROSECOND}, extra=0)
    timer = SequenceTimer([world.rotation("a")], world.clock)
    spent = timer.visit(0.002)
    first = len(timer.samples)
    assert 3 <= first <= 8
    assert spent == pytest.approx(1e-9 * world.now)
    timer.visit(0.0)
    assert len(timer.samples) == first + 3


def test_nothing_to_time():
    with pytest.raises(ValueError, match="order: expected at least one call"):
        SequenceTimer([])


@pytest.mark.parametrize("op", ["w4a8_gemm", "w8a8_gemm"])
def test_a_stack_runs_every_product_of_its_layers_on_weights_of_its_own(op):
    arena = Arena(machine.describe(), 0, 8 << 20)
    params = {"of": op, "m": 2, "hidden_size": 64, "kv_size": 32, "intermediate_size": 96, "layers": 2}
    _, order = Workloads(arena, 0).stack(Point("sequence", 1, params))
    calls = [next(rotation) for rotation in order]
    assert [(c.args[1].n, c.args[1].k) for c in calls] == 2 * [
        (64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96),
    ]  # fmt: skip
    places = {c.args[1].data.__array_interface__["data"][0] for c in calls}
    assert len(places) == len(calls)
    for call in calls:
        call()


def test_bytes_and_operations_of_a_stack_are_those_of_its_products():
    point = stack_point("w8a8_gemm", "qwen2.5-0.5b", 3, 2)
    shapes = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]
    layers = STACKS["qwen2.5-0.5b"][3]
    assert point.ops == layers * sum(2.0 * 3 * n * k for n, k in shapes)
    assert point.bytes == layers * sum(packed_bytes(n, k, 32, True, 8) + 12.0 * (n + k) for n, k in shapes)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_every_calibration_has_stacks_of_two_models_at_every_thread_count(mode):
    found = [p for p in grid(mode, [1, 2]) if p.op == "sequence"]
    for threads in (1, 2):
        mine = [p for p in found if p.threads == threads]
        assert len({p.params["hidden_size"] for p in mine}) == 2
        assert {p.params["of"] for p in mine} >= {"w4a8_gemm", "w8a8_gemm"}
