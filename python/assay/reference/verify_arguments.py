"""What verification is asked, once it is checked: the arguments that every backend takes."""

from dataclasses import dataclass

import numpy as np

#: Names of the rules, in assay.h's order.
RULES = (
    "greedy", "sampled", "gumbel", "rejection", "block", "specinfer", "specinfer_without_replacement", "target_only",
    "typical", "kseq", "traversal", "traversal_without_replacement",
)  # fmt: skip


@dataclass(slots=True)
class Edits:
    """Tokens that penalties, biases or bans touch: request b's at ``cu[b] : cu[b + 1]``, ids ascending."""

    cu: np.ndarray  # int32 [B + 1]
    ids: np.ndarray  # int32
    bias: np.ndarray  # float32; minus infinity bans
    in_prompt: np.ndarray  # int32, 0 or 1
    count: np.ndarray  # int32: occurrences among the generated tokens


class VerifyArguments:
    """Arrays as assay.h describes them; None where something is off for all. Rows of logits travel apart.

    What is rarely given stays an attribute of the class: no dataclass, which would write all of them at every call.
    """

    parents: np.ndarray | None = None
    draft_probs: np.ndarray | None = None
    sparse_ids: np.ndarray | None = None
    sparse_probs: np.ndarray | None = None
    top_k: np.ndarray | None = None
    top_p: np.ndarray | None = None
    min_p: np.ndarray | None = None
    typical_p: np.ndarray | None = None
    repetition_penalty: np.ndarray | None = None
    frequency_penalty: np.ndarray | None = None
    presence_penalty: np.ndarray | None = None
    edits: Edits | None = None
    bitmask: np.ndarray | None = None
    bitmask_per_row: bool = False
    seed: np.ndarray | None = None
    position: np.ndarray | None = None
    uniforms: np.ndarray | None = None
    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3
    threshold_single: float = 1.0
    threshold_acc: float = 1.0
    stop_ids: np.ndarray | None = None
    cu_stop: np.ndarray | None = None
    max_emit: np.ndarray | None = None
    logprobs: bool = False

    def __init__(
        self, rule: str, batch: int, vocab: int, width: int, ids: np.ndarray, cu: np.ndarray, temperature: np.ndarray
    ) -> None:
        self.rule, self.batch, self.vocab = rule, batch, vocab
        self.width = width  # most tokens that a request can emit
        self.ids, self.cu, self.temperature = ids, cu, temperature


@dataclass(slots=True)
class VerifyOutputs:
    """The arrays that a backend fills; assay.h describes them."""

    output_token_ids: np.ndarray
    num_accepted: np.ndarray
    num_emitted: np.ndarray
    status: np.ndarray
    accept_index: np.ndarray
    logprobs: np.ndarray | None
    counters: np.ndarray
