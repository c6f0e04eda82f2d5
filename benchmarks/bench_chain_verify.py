"""Verification of a chain of draft tokens, greedy and by rejection sampling, every draft accepted."""

OPS = ("chain_verify",)


def test_chain_verify(point, time_point):
    time_point(point)
