"""Profiles and models made from known laws: what the cost model has to find again."""

import numpy as np

from assay.model import Attention, Experts, Matrix, ModelSpec
from assay.profile import Machine, Profile, Roof, Sample

DRAM = {1: 12e9, 2: 20e9}
LLC = {1: 40e9, 2: 70e9}
INT8 = {1: 200e9, 2: 390e9}
FP32 = {1: 90e9, 2: 175e9}
SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096), (4096, 14336))
HELD_OUT_SHAPES = ((6144, 2048), (2048, 6144), (8192, 4096))
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 128)


def gemm_seconds(m, n, k, threads, *, group_size=32, symmetric=True, overhead_s=4e-6, memory=0.88, p=5.0):
    """The law behind the synthetic products: utilisation of int8 rises from 15% at M = 1 to 60% at 16 and stays."""
    weight = 0.5 + (2 if symmetric else 3) / (k if group_size < 0 else group_size)
    t_mem = (weight * n * k + 4 * m * (n + k)) / (DRAM[threads] * memory)
    utilisation = np.interp(np.log(m), np.log([1, 16]), np.log([0.15, 0.6]))
    t_cmp = 2.0 * m * n * k / (INT8[threads] * np.exp(utilisation))
    return overhead_s + (t_mem**p + t_cmp**p) ** (1 / p)


def expert_seconds(tokens, top_k, distinct, hidden, width, threads):
    """As a product of the touched experts' weights with the tokens that each of them gets."""
    rows, weights = tokens * top_k / distinct, 3 * distinct * hidden * width
    t_mem = (0.5625 * weights + 8 * tokens * hidden) / (DRAM[threads] * 0.9)
    utilisation = np.interp(np.log(rows), np.log([1, 16]), np.log([0.15, 0.6]))
    t_cmp = 2.0 * rows * weights / (INT8[threads] * np.exp(utilisation))
    return 8e-6 + (t_mem**5 + t_cmp**5) ** (1 / 5)


def route_seconds(tokens, num_experts, top_k, threads):
    return 2e-6 + tokens * (20e-9 + 1.2e-9 * num_experts + 15e-9 * top_k) / threads


def verify_seconds(batch, num_draft, vocab, rule, threads):
    rows = batch * (num_draft + 1)
    sampled = batch * vocab * 2e-9 if rule == "rejection" else 0.0
    return 3e-6 + (rows * vocab * 0.3e-9 + sampled) / threads


def synthetic_profile(
    noise=0.02,
    seed=0,
    *,
    drift=0.0,
    held_out=True,
    threads=(1, 2),
    groups=(32,),
    repeats=5,
    memory_gib=16,
    experts=False,
):
    """A calibration of an invented machine; ``drift`` is the sd of the machine's speed between samples, in log."""
    rng = np.random.default_rng(seed)

    def times(true, speed=1.0):
        middle = true / speed * np.exp(rng.normal(0, noise))
        return middle * np.exp(rng.normal(0, noise / 2 + 1e-6, repeats))

    roofs = [
        Roof.of(name, t, values[t] * np.exp(rng.normal(0, 0.005, 7)))
        for name, values in (("dram_read", DRAM), ("llc_read", LLC), ("int8_peak", INT8), ("fp32_peak", FP32))
        for t in threads
    ]
    samples = []
    for t in threads:
        for shapes, held in ((SHAPES, False), (HELD_OUT_SHAPES if held_out else (), True)):
            for n, k in shapes:
                for group in groups:
                    for m in WIDTHS:
                        speed = np.exp(rng.normal(0, drift))
                        weight = 0.5 + 2 / (k if group < 0 else group)
                        samples.append(
                            Sample.of(
                                "w4a8_gemm",
                                "avx2",
                                t,
                                {"m": m, "n": n, "k": k, "group_size": group, "symmetric": True},
                                moved_bytes=weight * n * k + 4 * m * (n + k),
                                ops=2 * m * n * k,
                                time_s=times(gemm_seconds(m, n, k, t, group_size=group), speed),
                                roof_near={"dram_read": DRAM[t] * speed, "int8_peak": INT8[t] * speed}
                                if drift
                                else None,
                                held_out=held,
                            )
                        )
        for layer_experts, top_k, hidden, width, held in (
            ((64, 8, 2048, 1024, False), (8, 2, 4096, 14336, False), (128, 8, 2048, 768, held_out)) if experts else ()
        ):
            for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
                distinct = round(layer_experts * (1 - (1 - top_k / layer_experts) ** tokens))
                sizes = (tokens, top_k, distinct, hidden, width)
                names = ("tokens", "top_k", "distinct_experts", "hidden_size", "intermediate_size")
                samples.append(
                    Sample.of(
                        "moe_experts",
                        "avx2",
                        t,
                        dict(zip(names, sizes, strict=True)) | {"group_size": 32, "symmetric": True},
                        moved_bytes=0.5625 * 3 * distinct * hidden * width + 8 * tokens * hidden,
                        ops=6 * tokens * top_k * hidden * width,
                        time_s=times(expert_seconds(*sizes, t)),
                        held_out=held,
                    )
                )
        for tokens in (1, 8, 64, 512):
            for num_experts, top_k in ((8, 2), (64, 8), (128, 8), (32, 4)):
                samples.append(
                    Sample.of(
                        "moe_route",
                        "avx2",
                        t,
                        {"tokens": tokens, "num_experts": num_experts, "top_k": top_k},
                        moved_bytes=4 * tokens * num_experts,
                        ops=tokens * num_experts,
                        time_s=times(route_seconds(tokens, num_experts, top_k, t)),
                        held_out=held_out and num_experts == 32,
                    )
                )
        for rule in ("greedy", "rejection"):
            for batch in (1, 4, 16):
                for drafts in (0, 3, 7):
                    for vocab in (32000, 128256, 65536):
                        samples.append(
                            Sample.of(
                                "chain_verify",
                                "avx2",
                                t,
                                {"batch": batch, "num_draft": drafts, "vocab": vocab, "rule": rule},
                                moved_bytes=4 * batch * (drafts + 1) * vocab,
                                ops=batch * (drafts + 1) * vocab,
                                time_s=times(verify_seconds(batch, drafts, vocab, rule, t)),
                                held_out=held_out and vocab == 65536,
                            )
                        )
    return Profile(
        created_utc="2026-11-23T00:00:00+00:00",
        command=["assay", "calibrate", "--quick"],
        seed=seed,
        package={"assay": "0.1.0", "kernels": {"int4_gemm": "avx2", "moe_route": "avx2"}, "compiler": "none"},
        machine=Machine(
            fingerprint="synthetic",
            cpu="Invented 2-core",
            isa=("scalar", "avx2"),
            cores=2,
            memory_bytes=memory_gib * 2**30,
            caches={"l1d_bytes": 32768, "l2_bytes": 524288, "l3_bytes": 2**25},
            os="none",
            numpy=np.__version__,
            python="3.11",
        ),
        settings={"mode": "full", "threads": list(threads)},
        roofs=roofs,
        samples=samples,
        complete=True,
    )


def hand_made_model(*, num_experts=0, tied=True, vocab=32000, stored_bits=None):
    """Two layers of Llama-3-8B's width with an ungated feed-forward, dense or with top-2 of ``num_experts``."""

    def matrix(name, n, k, count, role):
        copies = count * (num_experts if role == "expert" else 1)
        stored = None if stored_bits is None else round(n * k * copies * stored_bits / 8)
        return Matrix(name, n, k, count, role, None if stored is None else {"any": copies}, stored)

    role, prefix = ("expert", "expert") if num_experts else ("ffn", "ffn")
    matrices = [
        matrix("attn_q", 4096, 4096, 2, "attention"),
        matrix("attn_kv", 2048, 4096, 2, "attention"),
        matrix("attn_output", 4096, 4096, 2, "attention"),
        matrix(f"{prefix}_up", 14336, 4096, 2, role),
        matrix(f"{prefix}_down", 4096, 14336, 2, role),
        matrix("lm_head", vocab, 4096, 1, "lm_head"),
    ]
    if num_experts:
        matrices.append(matrix("router", num_experts, 4096, 2, "router"))
    if not tied:
        matrices.append(matrix("embedding", vocab, 4096, 1, "embedding"))
    return ModelSpec(
        name="hand-made",
        source="tests",
        num_layers=2,
        hidden_size=4096,
        vocab_size=vocab,
        matrices=tuple(matrices),
        attention=(Attention(2, 32, 8, 128, 128, None, 2048, "gqa"),),
        experts=Experts(num_experts, 2, 2, 0, 4096, 14336) if num_experts else None,
        tied_embedding=tied,
        max_context=4096,
        vector_bytes=None if stored_bits is None else 0,
    ).validate()
