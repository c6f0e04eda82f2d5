"""Prices held against what others measured: ``python benchmarks/prices.py [--curves FOLDER] [--servers FILE]``.

Prints the tables of docs/serving.md: servers of 1 to 8 devices (AIConfigurator's CSV of whole servers), accepted lengths
(InferenceX's YAML curves), and what the catalog holds itself: clips as video models' makers timed them, and public runs of
chips that keep weights in SRAM.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from assay.catalog import find_device, list_videos, load_model
from assay.cost.cases import Case, price
from assay.cost.diffusion import clip, video_model
from assay.cost.drafting import conditional_acceptance, extrapolated
from assay.cost.draws import Draws, interval
from assay.cost.machines import datasheet
from assay.cost.serving import mixed_step
from assay.cost.speculation import chain_length, chain_length_iid
from assay.cost.techniques import enough
from assay.importers.inferencex import read_accepted_lengths
from assay.importers.served import read_servers

KNOWN = {
    "openai/gpt-oss-120b": ("gpt-oss-120b", "mxfp4", (("attention", "bf16"), ("lm_head", "bf16"))),
    "meta-llama/Llama-3.1-70B": ("llama-3.1-70b", "fp8", ()),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b", "fp8", ()),
}
SILICON = (
    ("groq-lpu", "mixtral-8x7b", 480, "TechPowerUp, 2024-02"),
    ("groq-lpu", "llama-3.1-70b", 300, "TechPowerUp, 2024-02, of Llama 2"),
    ("groq-lpu", "llama-3.1-8b", 750, "TechPowerUp, 2024-02, of Llama 2 7B"),
    ("cerebras-wse-3", "llama-3.1-70b", 450, "launch of Cerebras Inference, 2024-08; unverified"),
    ("cerebras-wse-3", "llama-3.1-8b", 1800, "launch of Cerebras Inference, 2024-08; unverified"),
)


def server_rows(path, every=1, count=64, **known):
    """(model, backend, devices, log error of time per token, inside the interval, and how far the interval reaches on the
    error's side, in logs) of each server that is known."""
    found = []
    runs = [r for r in read_servers(path) if r.model in KNOWN and r.devices <= 8 and find_device(r.system) is not None]
    for run in runs[::every]:
        name, weights, by_role = KNOWN[run.model]
        machine = replace(datasheet(find_device(run.system), run.devices), **known)
        case = Case(
            load_model(name), machine, weights, batch=run.concurrency, isl=run.isl, osl=run.osl, by_role=by_role
        )
        step, _, tokens = mixed_step(case, float(case.running), Draws(count))
        middle, low, high = interval(step.time_s / tokens)
        error, reach = math.log(middle / run.tpot_s), math.log(high / middle if run.tpot_s > middle else middle / low)
        found.append((name, run.backend, run.devices, error, low <= run.tpot_s <= high, reach))
    return found


def unmodelled_rows(bare):
    """(model hidden, factor of a pass that makes the other models' intervals hold 90%, what the hidden model's then hold).

    ``bare``: `server_rows` without such a factor. The factor is log-normal and independent of the other causes, so
    logs of interval ends add as squares.
    """
    model, error, reach = (np.array([row[i] for row in bare]) for i in (0, 3, 5))
    needed = np.sqrt(np.maximum(error**2 - reach**2, 0.0))
    found = []
    for hidden in (*sorted(set(model)), "none"):
        wide = np.quantile(needed[model != hidden], 0.9, method="higher")
        judged = model == hidden if hidden != "none" else np.ones(len(model), bool)
        found.append((hidden, int(judged.sum()), float(np.exp(wide)), float(np.mean(needed[judged] <= wide))))
    return found


def length_rows(curves, known):
    """(log error, log error of one repeated rate, inside the interval) of accepted lengths beyond ``known`` drafts."""
    found = []
    for curve in curves:
        rates = conditional_acceptance({k: curve[k] for k in range(1, known + 1)})
        for k in range(known + 1, len(curve) + 1):
            low, middle, high = (chain_length([r[i] for r in extrapolated(rates, k)]) for i in range(3))
            repeated = math.log(chain_length_iid(rates[0], k) / curve[k])
            found.append((math.log(middle / curve[k]), repeated, low <= curve[k] <= high))
    return found


def curves_of(folder):
    """All curves of a folder of YAML files."""
    return [curve for path in sorted(Path(folder).glob("*.yaml")) for curve in read_accepted_lengths(path).values()]


def clip_rows():
    """(model, device, seconds with interval, published seconds) of each clip that its makers timed."""
    return [
        (
            row["title"],
            m["device"],
            interval(clip(video_model(row), datasheet(find_device(m["device"]))).time_s),
            m["seconds"],
        )
        for row in list_videos()
        for m in row["measured"]
    ]


def silicon_rows():
    """(chips, model, tokens a second of one user with interval, published ones, where)."""
    found = []
    for chip, model, published, source in SILICON:
        one = Case(load_model(model), datasheet(find_device(chip)), osl=512)
        case = replace(one, machine=enough(one.machine, one))
        found.append((case.machine.name, model, interval(1.0 / price(case).step_s), published, source))
    return found


def main():
    """Prints every table that there is data for."""
    parser = argparse.ArgumentParser(description="Prices held against what others measured.")
    parser.add_argument("--curves", help="folder of InferenceX's accepted lengths")
    parser.add_argument("--servers", help="CSV of AIConfigurator's whole servers")
    args = parser.parse_args()

    def show(rows, head):
        print(tabulate(rows, head, tablefmt="pipe"), end="\n\n")

    if args.servers:
        rows = server_rows(args.servers)
        groups = sorted({row[:3] for row in rows}) + [("all", "", "")]
        table = []
        for group in groups:
            of = [row for row in rows if group[0] == "all" or row[:3] == group]
            e = np.array([row[3] for row in of])
            table.append([*group, len(of), f"{np.median(np.abs(np.expm1(e))):.1%}", f"{np.percentile(np.abs(np.expm1(e)), 90):.1%}",
                          f"{np.expm1(np.median(e)):+.1%}", f"{np.mean([row[4] for row in of]):.0%}"])  # fmt: skip
        show(table, ["model", "software", "devices", "n", "median error", "90th pct.", "bias", "coverage"])
        table = [[name, n, f"{f:.2f}", f"{held:.0%}"]
                 for name, n, f, held in unmodelled_rows(server_rows(args.servers, pass_factor=(1.0, 1.0, 1.0)))]  # fmt: skip
        show(table, ["hidden", "n", "factor of the others", "held by it"])
    if args.curves:
        table = []
        for known in (2, 3, 4):
            rows = length_rows(curves_of(args.curves), known)
            ours, repeated, held = (np.array(column) for column in zip(*rows, strict=True))
            table.append([f"1 to {known}", len(rows), f"{np.mean(np.abs(np.expm1(ours))):.1%}", f"{np.mean(np.expm1(ours)):+.1%}",
                          f"{np.mean(held):.0%}", f"{np.mean(np.abs(np.expm1(repeated))):.1%}"])  # fmt: skip
        show(table, ["drafts known", "n", "mean error", "bias", "coverage", "one rate repeated"])
    show([[n, d, f"{s[0]:.0f} s [{s[1]:.0f}, {s[2]:.0f}]", f"{m:.0f} s"] for n, d, s, m in clip_rows()],
         ["video model", "device", "a clip", "published"])  # fmt: skip
    show([[c, m, f"{s[0]:.0f} [{s[1]:.0f}, {s[2]:.0f}]", p, w] for c, m, s, p, w in silicon_rows()],
         ["chips", "model", "tokens/s of one user", "published", "where"])  # fmt: skip


if __name__ == "__main__":
    main()
