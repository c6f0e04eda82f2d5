"""vLLM's rejection sampling on CPU, from its source: the package for CPUs is not on PyPI, and its kernels need nothing else.

ASSAY_PEER_VLLM=/path/to/vllm (its source distribution, or a checkout). csrc/cpu/spec_decode_utils.cpp is compiled by PyTorch, once,
into PyTorch's own folder of extensions; the functions of vllm/v1/sample/rejection_sampler.py are run as they stand there,
with what vllm/platforms/cpu.py registers for the Triton kernels.
"""

import ast
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLE = "ASSAY_PEER_VLLM"
KERNELS = (
    "rejection_greedy_sample_kernel_impl",
    "rejection_random_sample_kernel_impl",
    "sample_recovered_tokens_kernel_impl",
)
FUNCTIONS = ("rejection_sample", "generate_uniform_probs", "sample_recovered_tokens")
BINDING = """
#include <torch/extension.h>
#include <torch/library.h>
#include "cpu_types.hpp"
namespace cpu_utils {
void rejection_greedy_sample_kernel_impl(torch::Tensor&, const torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                                         const torch::Tensor&, const std::optional<torch::Tensor>&, const int64_t);
void rejection_random_sample_kernel_impl(torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                                         const std::optional<torch::Tensor>&, const torch::Tensor&, const torch::Tensor&,
                                         const torch::Tensor&, const torch::Tensor&, const std::optional<torch::Tensor>&,
                                         const int64_t, const int64_t, const bool);
void sample_recovered_tokens_kernel_impl(torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                                         const std::optional<torch::Tensor>&, const torch::Tensor&, const torch::Tensor&,
                                         const int64_t, const bool);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
""" + "".join(f'  m.def("{name}", &cpu_utils::{name});\n' for name in KERNELS) + "}\n"  # fmt: skip


def load() -> SimpleNamespace:
    """`rejection_sample` of vLLM and its `version`.

    Raises
    ------
    ImportError
        No source is named, or it cannot be built.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ImportError(f"{VARIABLE} does not name vLLM's source")
    source = Path(folder)
    if not (source / "csrc/cpu/spec_decode_utils.cpp").exists():
        raise ImportError(f"{VARIABLE}: expected vLLM's source with csrc/cpu/spec_decode_utils.cpp, got {source}")
    kernels = _kernels(source, _build(source))
    namespace: dict[str, Any] = {"torch": importlib.import_module("torch"), "PLACEHOLDER_TOKEN_ID": -1, "GREEDY_TEMPERATURE": 0,
                                 **kernels}  # fmt: skip
    sampler = source / "vllm/v1/sample/rejection_sampler.py"
    tree = ast.parse(sampler.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS]
    future = ast.parse("from __future__ import annotations").body  # what is annotated is not all here
    exec(compile(ast.Module([*future, *wanted], []), str(sampler), "exec"), namespace)
    found = re.search(r"^Version: (.+)$", _text(source / "PKG-INFO"), re.MULTILINE)
    return SimpleNamespace(rejection_sample=namespace["rejection_sample"], version=found[1] if found else "from source")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _build(source: Path) -> Any:
    from torch.utils import cpp_extension

    build = Path(cpp_extension._get_build_directory("assay_peer_vllm", False))
    binding = build / "binding.cpp"
    if _text(binding) != BINDING:
        binding.write_text(BINDING, encoding="utf-8")
    try:
        return cpp_extension.load(
            "assay_peer_vllm", [str(source / "csrc/cpu/spec_decode_utils.cpp"), str(binding)], build_directory=str(build),
            extra_include_paths=[str(source / "csrc/cpu"), str(source / "csrc")],
            extra_cflags=["-O3", "-march=native", "-fopenmp"], extra_ldflags=["-fopenmp"],
        )  # fmt: skip
    except Exception as exc:
        raise ImportError(f"vLLM's kernels: {exc}") from exc


def _kernels(source: Path, built: Any) -> dict[str, Callable[..., None]]:
    """What rejection_sampler.py calls its kernels by: their CPU implementations, which see `built` as torch.ops._C."""
    import torch

    path = source / "vllm/utils/cpu_triton_utils.py"
    spec = importlib.util.spec_from_file_location("assay_peer_vllm_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = _Torch(torch, built)  # type: ignore[attr-defined]

    def recovered(out: Any, cu: Any, ids: Any, q: Any, p: Any, noise: Any, max_spec_len: int) -> None:
        module._sample_recovered_tokens_kernel_impl(out, cu, ids, q, p, noise, p.shape[-1], NO_DRAFT_PROBS=q is None)

    def random(out: Any, cu: Any, ids: Any, q: Any, p: Any, bonus: Any, token: Any, u: Any, greedy: Any, most: int,
               rates: Any) -> None:  # fmt: skip
        module._rejection_random_sample_kernel_impl(
            out, cu, ids, q, p, bonus, token, u, greedy, most, p.shape[-1], rates, NO_DRAFT_PROBS=q is None
        )

    return {
        "_rejection_greedy_sample": module._rejection_greedy_sample_kernel_impl,
        "_rejection_random_sample": random,
        "_sample_recovered_tokens": recovered,
    }


class _Torch:
    """torch, with the kernels where vLLM's extension would have put them."""

    def __init__(self, torch: Any, built: Any) -> None:
        self._torch, self.ops = torch, SimpleNamespace(_C=built)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)
