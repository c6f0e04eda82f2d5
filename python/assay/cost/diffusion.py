"""Video by diffusion: steps times a transformer over all latent tokens of the clip, priced on a datasheet's device.

A clip of F frames becomes ``T = ceil((F - 1) / t) + 1`` latent frames (a causal VAE compresses t frames after the first),
each ``(H / s / p) (W / s / p)`` tokens (s the VAE's spatial compression, p the patch). A step attends all tokens to all:
``2 N (weights of a block) L + 4 N^2 d L`` operations; twice that with classifier-free guidance.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.cost.draws import Draws, Part
from assay.cost.formats import WEIGHTS
from assay.cost.machines import Datasheet
from assay.cost.roofline import FloatArray

#: Of the dense peak, what published runs of whole pipelines reach (docs/serving.md holds these to them): attention over tens
#: of thousands of tokens runs below large products, VAE and text encoder come on top.
UTILISATION = (0.28, 0.42, 0.63)


@dataclass(frozen=True)
class VideoModel:
    """A diffusion transformer and the autoencoder around it.

    Attributes
    ----------
    layers, hidden
        Blocks and their width.
    blocks_params
        Weights that every token passes in all blocks.
    text_tokens
        Prompt tokens that are attended with the video's (joint attention); cross attention is left out.
    spatial, temporal, patch, patch_frames
        Compression of the VAE in space and time; tokens are patches of ``patch_frames x patch x patch`` latents.
    guided
        Whether each step runs twice (classifier-free guidance); distilled guidance runs once.
    fps
        Frames a second of what it makes.
    """

    name: str
    layers: int
    hidden: int
    blocks_params: float
    text_tokens: int
    spatial: int
    temporal: int
    patch: int
    patch_frames: int
    guided: bool
    fps: float
    steps: int
    frames: int
    width: int
    height: int

    def __post_init__(self) -> None:
        """Refuses what is no model."""
        for name in (
            "layers",
            "hidden",
            "spatial",
            "temporal",
            "patch",
            "patch_frames",
            "steps",
            "frames",
            "width",
            "height",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise ValueError(f"{self.name}: {name}: expected an integer in 1..{1 << 20}, got {value!r}")
        if not (0 < self.blocks_params < 1e15 and 0 < self.fps <= 1000 and 0 <= self.text_tokens <= 1 << 20):
            raise ValueError(f"{self.name}: expected weights, frames a second and prompt tokens, got impossible ones")

    def tokens(self, frames: int, width: int, height: int) -> int:
        """Tokens of a clip, the prompt's in."""
        side = self.spatial * self.patch
        if frames < 1 or width < side or height < side:
            raise ValueError(
                f"clip: expected at least 1 frame of {side} x {side} pixels, got {frames} of {width} x {height}"
            )
        latent = math.ceil((frames - 1) / self.temporal) + 1
        return math.ceil(latent / self.patch_frames) * (height // side) * (width // side) + self.text_tokens

    def flops_per_step(self, frames: int, width: int, height: int) -> float:
        """Operations of a denoising step, guidance in."""
        n = self.tokens(frames, width, height)
        once = 2.0 * n * self.blocks_params + 4.0 * n * n * self.hidden * self.layers
        return once * (2.0 if self.guided else 1.0)


def video_model(row: Mapping[str, Any]) -> VideoModel:
    """A row of ``videos.json``."""
    fields = VideoModel.__dataclass_fields__
    return VideoModel(**{name: row["title" if name == "name" else name] for name in fields})


@dataclass(frozen=True)
class Clip:
    """A clip priced: seconds of work, of memory and compute in them, and of work that a second of video takes, by draw."""

    frames: int
    seconds_of_video: float
    tokens: int
    flops: float
    time_s: FloatArray
    memory_s: FloatArray
    compute_s: FloatArray
    work_per_second: FloatArray
    watts: FloatArray | None


def clip(
    model: VideoModel,
    machine: Datasheet,
    draws: Draws | None = None,
    *,
    steps: int | None = None,
    frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    weights: str = "bf16",
) -> Clip:
    """Time of one clip on a device; steps, frames and size default to the model's.

    Raises
    ------
    ValueError
        An impossible clip, an unknown weight format, or a model that does not fit.
    """
    draws = draws or Draws()
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    count, shown, across, up = (
        own if asked is None else asked
        for asked, own in ((steps, model.steps), (frames, model.frames), (width, model.width), (height, model.height))
    )
    if not 1 <= count <= 10000:
        raise ValueError(f"steps: expected 1 to 10000, got {count}")
    size = WEIGHTS[weights][0] / 8.0 * model.blocks_params
    if machine.memory_bytes is not None and size > 0.9 * machine.memory_bytes:
        raise ValueError(f"{model.name} on {machine.name}: expected room for {size / 1e9:.3g} GB, got less")
    flops = count * model.flops_per_step(shown, across, up)
    rate = machine.ops_per_s[machine.arithmetic(weights)]
    compute = flops / (rate * draws.between("video compute", *UTILISATION))
    memory = count * (2.0 if model.guided else 1.0) * size / (
        machine.bytes_per_s * draws.between("memory", *machine.memory_utilisation)
    )  # fmt: skip
    time = compute + memory
    length = shown / model.fps
    part = Part(time, memory, compute, 0.0 * time)
    tokens, watts = model.tokens(shown, across, up), machine.power(part, draws)
    return Clip(shown, length, tokens, flops, time, memory, compute, time / length, watts)


def usd_per_second(made: Clip, usd_per_hour: FloatArray) -> FloatArray:
    """Dollars of a second of video at so many dollars an hour of the device, always busy."""
    return np.asarray(made.work_per_second * usd_per_hour / 3600.0)
