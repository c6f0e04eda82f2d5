"""MoE routing: softmax over the experts, top-k, renormalised."""

OPS = ("moe_route",)


def test_moe_route(point, time_point):
    time_point(point)
