"""What others took of the processors, from counters that are given."""

import pytest

from assay.measure import device
from assay.measure.contention import Contention

HEAD = "cpu  1 1 1 1 1 1 1 1 0 0\n"


def stat(*rows):
    return HEAD + "".join(f"cpu{i} {' '.join(map(str, row))}\n" for i, row in enumerate(rows)) + "intr 7 0\n"


def counted(before, after, own, wall=10.0, cpus=(0, 1)):
    texts, owns, clocks = iter([before, after]), iter([3.0, 3.0 + own]), iter([1.0, 1.0 + wall])
    return Contention(lambda: next(texts), lambda: next(owns), lambda: next(clocks), set(cpus), 100)


#      user nice system idle iowait irq softirq steal guest guest_nice
ZERO = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("row", "own", "share"),
    [
        ((500, 0, 0, 500, 0, 0, 0, 0, 0, 0), 5.0, 0.0),  # all the work is ours
        ((500, 0, 0, 500, 0, 0, 0, 0, 0, 0), 1.0, 0.2),  # four seconds of two processors' twenty are not
        ((0, 0, 0, 300, 400, 0, 0, 300, 0, 0), 0.0, 0.15),  # stolen; waiting for a disk is not work
        ((100, 100, 100, 0, 0, 100, 100, 100, 900, 900), 0.0, 0.3),  # guests are in user already
        ((0, 0, 0, 1000, 0, 0, 0, 0, 0, 0), 0.01, 0.0),  # a tick less than the clock of this process
    ],
)
def test_share_of_others(row, own, share):
    assert counted(stat(ZERO, ZERO), stat(row, ZERO), own).share() == pytest.approx(share)


def test_processors_that_are_not_ours_do_not_count():
    busy = (1000, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert counted(stat(ZERO, ZERO), stat(ZERO, busy), 0.0, cpus=(0,)).share() == 0.0
    assert counted(stat(ZERO, ZERO), stat(busy, ZERO), 0.0, cpus=(0,)).share() == pytest.approx(1.0)


def test_a_system_that_does_not_say():
    assert Contention(lambda: None, cpus={0}).share() is None


def test_here_it_is_a_share_or_unknown():
    found = Contention().share()
    assert found is None or 0.0 <= found <= 1.0


@pytest.mark.parametrize(("share", "warned"), [(None, False), (0.02, False), (0.2, True)])
def test_a_disturbed_calibration_says_so(share, warned):
    host = device.Host([1], 0)
    host._contention = type("Known", (), {"share": lambda self: share})()
    notes = host.notes({})
    assert [("others kept 20% of the processors busy" in note) for note in notes] == [True] * warned
