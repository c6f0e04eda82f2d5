"""The clock, on a fake one: what is timed, how often, in which order."""

import gc

import pytest

from assay.measure.clock import SAMPLE_NS, Timer, quiet


class FakeTime:
    """Nanoseconds that pass only when a call spends them."""

    def __init__(self):
        self.now, self.made = 0, []

    def __call__(self):
        return self.now

    def call(self, name, cost_ns):
        def spend():
            self.now += cost_ns
            self.made.append(name)

        return spend


def test_a_sample_is_the_exact_time_of_one_call():
    fake = FakeTime()
    timer = Timer([fake.call("a", 2_000_000)], fake)
    timer.visit(0, min_samples=4, max_samples=9)
    assert timer.samples == [0.002] * 4
    assert len(fake.made) == 6, "one call warms up, one is timed to learn how long a call lasts"


@pytest.mark.parametrize(("cost_ns", "calls"), [(1_000, 100), (30_000, 3), (SAMPLE_NS, 1), (10**9, 1)])
def test_short_calls_share_a_sample_that_lasts(cost_ns, calls):
    fake = FakeTime()
    timer = Timer([fake.call("a", cost_ns)], fake)
    took = timer.visit(0, min_samples=2, max_samples=2)
    assert len(fake.made) == 2 + 2 * calls
    assert timer.samples == pytest.approx([1e-9 * cost_ns] * 2)
    assert took == pytest.approx(1e-9 * cost_ns * (2 + 2 * calls))
    assert timer.calibrate() == (calls, pytest.approx(1e-9 * cost_ns * calls))


def test_the_mean_over_unequal_copies():
    fake = FakeTime()
    timer = Timer([fake.call("fast", 20_000), fake.call("slow", 60_000)], fake)
    timer.visit(0, min_samples=1, max_samples=1)
    # Learned from the second call (60 us): two calls a sample, one of each copy.
    assert timer.samples == pytest.approx([40e-6])


def test_rotation_goes_on_from_visit_to_visit():
    fake = FakeTime()
    timer = Timer([fake.call(i, 1_000_000) for i in range(5)], fake)
    timer.visit(0, min_samples=2, max_samples=2)
    timer.visit(0, min_samples=2, max_samples=2)
    timer.call()
    assert fake.made == [i % 5 for i in range(len(fake.made))], "no copy is skipped or used twice in a row"
    assert len(fake.made) == 4 + 3 + 1, "a later visit warms up with one call and learns nothing anew"


def test_a_visit_keeps_to_its_budget_and_its_bounds():
    fake = FakeTime()
    timer = Timer([fake.call("a", 1_000_000)], fake)
    timer.visit(0.0075, min_samples=1, max_samples=100)
    # Two calls of preparation; then samples begin while at most 7.5 ms have passed.
    assert len(timer.samples) == 6
    before = len(timer.samples)
    timer.visit(10, min_samples=1, max_samples=7)
    assert len(timer.samples) == before + 7


def test_a_call_longer_than_the_visit_is_made_once_and_counts():
    fake = FakeTime()
    timer = Timer([fake.call("a", 50_000_000)], fake)
    assert timer.visit(0.02) == pytest.approx(0.05)
    assert timer.samples == [0.05]
    assert len(fake.made) == 1


def test_long_calls_stop_at_three_times_the_budget():
    fake = FakeTime()
    timer = Timer([fake.call("a", 15_000_000)], fake)
    timer.visit(0.02, min_samples=9, max_samples=9)
    # 30 ms of preparation, then samples begin while at most 60 ms have passed.
    assert len(timer.samples) == 3


def test_a_clock_that_stands_still_gives_no_zero_times():
    fake = FakeTime()
    timer = Timer([fake.call("a", 0)], fake)
    timer.visit(0, min_samples=1, max_samples=1)
    assert timer.samples[0] > 0


def test_an_error_of_a_call_is_not_swallowed():
    def broken():
        raise RuntimeError("kernel refused")

    with pytest.raises(RuntimeError, match="kernel refused"):
        Timer([broken]).visit(0)
    assert gc.isenabled()


def test_no_calls():
    with pytest.raises(ValueError, match="calls: expected at least one"):
        Timer([])


def test_quiet_puts_collection_back_as_it_was():
    seen = []
    with quiet():
        seen.append(gc.isenabled())
    seen.append(gc.isenabled())
    gc.disable()
    try:
        with quiet():
            pass
        seen.append(gc.isenabled())
    finally:
        gc.enable()
    assert seen == [False, True, False]


def test_calls_are_made_without_collection():
    seen = []
    Timer([lambda: seen.append(gc.isenabled())]).visit(0, min_samples=1, max_samples=1)
    assert seen
    assert not any(seen)
