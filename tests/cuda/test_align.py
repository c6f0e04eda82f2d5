"""Sorting slots by expert and combining their rows on the GPU: the kernels' own source, emulated, equals the CPU's ops."""

import numpy as np
import pytest
from emulator import EmulationError, emulate, kernels

import assay
from assay.ops.moe_dispatch import Alignment

WARPS = 8


def round_up(x, to):
    return -(-x // to) * to


def launch(ids, num_experts, block_size=1, expert_map=None, *, path="one", chunk=32, seed=0, resident=0):
    """An Alignment (arrays at their full length) and the counters of the launches. path: one, shared or stored."""
    local = num_experts if expert_map is None else int(max(expert_map.max(), -1)) + 1
    slots = ids.size
    most = (slots + min(slots, local) * (block_size - 1)) // block_size * block_size if local else 0
    if path == "one":
        chunks, chunk = 32, round_up(slots, 1024) // 32
    else:
        chunks = round_up(max(slots, 1), WARPS * chunk) // chunk
    counts, offsets = np.full(local, -7, np.int64), np.full(local + 1, -7, np.int32)
    ordered, blocks = np.full(most, -7, np.int32), np.full(most // block_size, -7, np.int32)
    position, total = np.full(ids.shape, -7, np.int32), np.full(1, -7, np.int32)
    fields = {
        "topk_ids": ids, "expert_map": expert_map, "slots": slots, "num_experts": num_experts, "num_local": local,
        "block_size": block_size, "most": most, "chunks": chunks, "chunk_slots": chunk,
        "cells": np.zeros(max(local * chunks, 1), np.uint32), "counts": counts, "offsets": offsets,
        "sorted_token_ids": ordered, "expert_ids": blocks, "position": position, "num_tokens_post_padded": total,
    }  # fmt: skip
    width = local | 1
    if path == "one":
        steps = [("one", 1, 4 * (32 * width + local + 32))]
    else:
        stored, cells = ("", 4 * WARPS * width) if path == "shared" else ("_stored", 0)
        steps = [(f"count{stored}", chunks // WARPS, cells), ("scan", -(-local // WARPS), 0),
                 (f"scatter{stored}", chunks // WARPS, cells + 4 * WARPS)]  # fmt: skip
    counted = [
        emulate(f"assay_moe_align_{name}", grid, fields, smem=smem, seed=seed, resident=resident)
        for name, grid, smem in steps if grid
    ]  # fmt: skip
    assert offsets[-1] == total[0]
    assert (ordered[total[0] :] == slots).all()
    assert (blocks[total[0] // block_size :] == -1).all()
    return Alignment(ordered[: total[0]], blocks[: total[0] // block_size], int(total[0]), position, counts), counted


def assert_same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def random_ids(tokens, top_k, experts, seed=0):
    """Skewed, with empty slots and ids of nobody."""
    rng = np.random.default_rng([tokens, top_k, experts, seed])
    ids = np.minimum(rng.geometric(min(1, 4 / experts), (tokens, top_k)) - 1, experts - 1).astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[rng.random(ids.shape) < 0.05] = experts + 3
    return ids


SHAPES = [(0, 2, 8), (1, 1, 1), (1, 8, 8), (5, 3, 17), (33, 2, 7), (64, 8, 64), (100, 6, 160), (300, 8, 257), (40, 4, 1500)]  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("path", ["one", "shared", "stored"])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), SHAPES)
def test_equals_the_cpu(tokens, top_k, experts, path, block_size):
    if path == "one" and 4 * (33 * experts + 64) > kernels()["assay_moe_align_one"].smem_bytes:
        path = "shared"
    ids = random_ids(tokens, top_k, experts)
    got, _ = launch(ids, experts, block_size, path=path, seed=block_size)
    assert_same(got, assay.moe_align(ids, experts, block_size))


@pytest.mark.parametrize("path", ["one", "shared", "stored"])
def test_expert_map_and_ids_of_other_ranks(path):
    ids = random_ids(90, 4, 32, seed=1)
    table = np.full(32, -1, np.int32)
    table[[3, 0, 9, 17, 1]] = [4, 0, 2, 1, 3]
    got, _ = launch(ids, 32, 16, table, path=path)
    assert_same(got, assay.moe_align(ids, 32, 16, table))
    got, _ = launch(ids, 32, 16, np.full(32, -1, np.int32), path=path)
    assert got.num_tokens_post_padded == 0
    assert (got.position == -1).all()


@pytest.mark.parametrize("path", ["one", "shared", "stored"])
def test_one_expert_takes_all_and_every_slot_is_empty(path):
    for value in (0, 6, -1):
        ids = np.full((77, 5), value, np.int32)
        got, _ = launch(ids, 7, 32, path=path, chunk=64)
        assert_same(got, assay.moe_align(ids, 7, 32))


@pytest.mark.parametrize("path", ["one", "shared", "stored"])
def test_the_order_does_not_depend_on_the_schedule(path):
    ids = random_ids(200, 8, 24, seed=2)
    want = assay.moe_align(ids, 24, 16)
    for seed, chunk, resident in ((1, 32, 1), (2, 64, 3), (3, 96, 0), (4, 1024, 0)):
        got, counted = launch(ids, 24, 16, path=path, chunk=chunk, seed=seed, resident=resident)
        assert_same(got, want)
        assert sum(c.atomics for c in counted) == 0


def test_a_warp_that_takes_a_column_of_cells_meets_no_bank_twice():
    for experts in (8, 64, 256):
        ids = random_ids(16, 8, experts, seed=3)
        _, (counted,) = launch(ids, experts, 16)
        assert counted.shared_wavefronts <= 1.3 * counted.shared_accesses


@pytest.mark.parametrize(("n", "width"), [(4, 4), (512, 4), (516, 4), (1, 1), (129, 1), (250, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_has_the_bits_of_the_cpu(n, width, weighted):
    rng = np.random.default_rng(n)
    ids = random_ids(9, 4, 6, seed=4)
    ids[3] = -1
    alignment = assay.moe_align(ids, 6, 16)
    y = rng.standard_normal((alignment.num_tokens_post_padded, n)).astype(np.float32)
    weights = rng.standard_normal(ids.shape).astype(np.float32)
    bias = rng.standard_normal((6, n)).astype(np.float32)
    for given in (None, bias):
        out = np.full((9, n), 7, np.float32)
        counted = emulate(f"assay_moe_combine_{width}", (9, -(-n // width // 128)), {
            "y": y, "ldy": n, "n": n, "position": alignment.position, "topk_weights": weights if weighted else None,
            "bias": given, "expert_ids": alignment.expert_ids, "block_size": 16, "tokens": 9, "top_k": 4, "out": out, "ldo": n,
        })  # fmt: skip
        rows = y if given is None else y + bias[np.repeat(alignment.expert_ids, 16)]
        want = assay.moe_unpermute(rows, alignment, weights if weighted else np.ones_like(weights))
        np.testing.assert_array_equal(out, want)
        assert counted.st_bytes == out.nbytes


def test_a_stray_position_is_caught():
    position = np.array([[1]], np.int32)
    fields = {"y": np.zeros((1, 128), np.float32), "ldy": 128, "n": 128, "position": position, "tokens": 1, "top_k": 1,
              "out": np.zeros((1, 128), np.float32), "ldo": 128}  # fmt: skip
    with pytest.raises(EmulationError):
        emulate("assay_moe_combine_4", 1, fields)
