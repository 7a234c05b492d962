"""What the speed table holds: every row, and who competes in it."""

import dataclasses
import math
from typing import NamedTuple

from peers.work import Work


class Competitor(NamedTuple):
    """A column.

    Args:
        worker: its script in `peers/`, without `_worker.py`.
        variant: what the worker is asked for.
    """

    worker: str
    variant: str

    @property
    def areas(self) -> int:
        """Into how many areas it cuts a clip."""
        splits = self.variant.split("x")
        return math.prod(map(int, splits)) if self.worker == "jvjepa" and len(splits) == 2 else 1


BASELINE = "jvjepa"
COMPETITORS = {
    BASELINE: Competitor("jvjepa", "full"),
    "areas 2x2": Competitor("jvjepa", "2x2"),
    "areas 4x2": Competitor("jvjepa", "4x2"),
    "transformers eager": Competitor("transformers", "eager"),
    "transformers SDPA": Competitor("transformers", "sdpa"),
    "torch.compile": Competitor("transformers", "compile"),
    "saccadic": Competitor("saccadic", "lora"),
    "saccadic without LoRA": Competitor("saccadic", "bare"),
}
ALONE = (BASELINE,)
AREAS = (BASELINE, "areas 2x2", "areas 4x2")
TRANSFORMERS = (BASELINE, "transformers eager", "transformers SDPA")
COMPILED = (*TRANSFORMERS, "torch.compile")
SACCADIC = (BASELINE, "saccadic", "saccadic without LoRA")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row.

    Args:
        key: its name for `--rows` and in the JSON.
        title: what the work is.
        work: the work on a CPU, in float32. Layers are fewer than the model's where all of them
            take too long there; time per layer is what scales.
        competitors: who does it; the first is the one that others are compared with.
        gpu_layers: layers on a GPU, where the dtype is `gpu_dtype`.
        gpu_dtype: float32 or bfloat16.
        rounds: how often everybody has a turn.
        quick: whether `--quick` runs it.
    """

    key: str
    title: str
    work: Work
    competitors: tuple[str, ...]
    gpu_layers: int = 24
    gpu_dtype: str = "bfloat16"
    rounds: int = 5
    quick: bool = False

    def on(self, platform: str) -> "Row":
        """This row on "cpu" or "gpu"."""
        if platform == "cpu":
            return self
        return self._with(platform=platform, layers=self.gpu_layers, dtype=self.gpu_dtype)

    def with_layers(self, layers: int) -> "Row":
        """This row with another number of layers."""
        return self._with(layers=layers)

    def tiny(self) -> "Row":
        """This row with sizes of which everything takes a moment, and nothing means anything."""
        row = self._with(
            hidden=64,
            heads=4,
            layers=2,
            frames=8,
            resolution=64,
            batch=min(2, self.work.batch),
            window=min(3, self.work.window),
        )
        return dataclasses.replace(row, title=f"tiny, not really: {self.title}", rounds=1)

    def _with(self, **sizes: int | str) -> "Row":
        return dataclasses.replace(self, work=dataclasses.replace(self.work, **sizes))


# Tokens: (frames, pixels of a side). Rows and tubelets come out even, whatever the areas.
CLIPS = {512: (16, 128), 1152: (16, 192), 2048: (16, 256), 4608: (16, 384), 18432: (64, 384)}


def _area_row(tokens: int, *, train: bool, masked: bool) -> Row:
    frames, resolution = CLIPS[tokens]
    long = tokens > 4608
    batch = 2 if masked and not long else 1
    passes, seen = ("train", "training step") if train else ("forward", "forward")
    what = ", a quarter visible" if masked else ""
    return Row(
        key=f"areas/{tokens}/{passes}/{'masked' if masked else 'dense'}",
        title=f"encoder, {seen}, {tokens:,} tokens{what}",
        work=Work(
            kind="train" if train else "clip",
            layers=4,
            frames=frames,
            resolution=resolution,
            batch=batch,
            visible=0.25 if masked else 1.0,
        ),
        competitors=AREAS,
        rounds=(1 if train and not masked else 2) if long else 3,
        quick=tokens == 512,
    )


ROWS = (
    Row(
        key="clip/16f-256",
        title="clip, 16 frames, 256 px (2,048 tokens)",
        work=Work(kind="clip", layers=6),
        competitors=COMPILED,
        quick=True,
    ),
    Row(
        key="clip/16f-256/whole",
        title="clip, 16 frames, 256 px (2,048 tokens), whole ViT-L",
        work=Work(kind="clip", layers=24),
        competitors=(BASELINE, "transformers SDPA"),
        rounds=3,
    ),
    Row(
        key="clip/16f-256/whole/unrolled",
        title="clip, 16 frames, 256 px (2,048 tokens), whole ViT-L, layers unrolled",
        work=Work(kind="clip", layers=24, unrolled=True),
        competitors=(BASELINE, "transformers SDPA"),
        rounds=3,
    ),
    Row(
        key="clip/64f-256",
        title="clip, 64 frames, 256 px (8,192 tokens)",
        work=Work(kind="clip", layers=2, frames=64),
        competitors=COMPILED,
        rounds=3,
    ),
    Row(
        key="clip/64f-384",
        title="clip, 64 frames, 384 px (18,432 tokens)",
        work=Work(kind="clip", layers=1, frames=64, resolution=384),
        competitors=COMPILED,
        rounds=2,
    ),
    *(
        _area_row(tokens, train=train, masked=masked)
        for train in (False, True)
        for masked in (False, True)
        for tokens in CLIPS
    ),
    Row(
        key="step/window-8",
        title="streaming step, window 8, 1 stream",
        work=Work(kind="step", layers=6),
        competitors=SACCADIC,
        quick=True,
    ),
    Row(
        key="step/window-8/unrolled",
        title="streaming step, window 8, 1 stream, layers unrolled",
        work=Work(kind="step", layers=6, unrolled=True),
        competitors=ALONE,
    ),
    Row(
        key="step/window-32",
        title="streaming step, window 32, 1 stream",
        work=Work(kind="step", layers=6, window=32, frames=64),
        competitors=SACCADIC,
        rounds=3,
    ),
    Row(
        key="step/window-32/unrolled",
        title="streaming step, window 32, 1 stream, layers unrolled",
        work=Work(kind="step", layers=6, window=32, frames=64, unrolled=True),
        competitors=SACCADIC,
        rounds=3,
    ),
    Row(
        key="skip/window-8",
        title="skipped step, window 8, 1 stream",
        work=Work(kind="skip", layers=6),
        competitors=ALONE,
        quick=True,
    ),
    Row(
        key="step/streams-8",
        title="streaming step, window 8, 8 streams",
        work=Work(kind="step", layers=6, batch=8),
        competitors=ALONE,
        quick=True,
    ),
    Row(
        key="step/streams-32",
        title="streaming step, window 8, 32 streams",
        work=Work(kind="step", layers=6, batch=32),
        competitors=ALONE,
        rounds=3,
    ),
    Row(
        key="predictor/quarter",
        title="predictor, a quarter of 2,048 tokens seen, the rest predicted",
        work=Work(kind="predictor", layers=12, visible=0.25),
        competitors=TRANSFORMERS,
        gpu_layers=12,
        quick=True,
    ),
    Row(
        key="predictor/all",
        title="predictor, all of 2,048 tokens seen and predicted",
        work=Work(kind="predictor", layers=12),
        competitors=TRANSFORMERS,
        gpu_layers=12,
    ),
    Row(
        key="classifier",
        title="pooler and classifier, 2,048 tokens",
        work=Work(kind="classifier", layers=3),
        competitors=TRANSFORMERS,
        gpu_layers=3,
        quick=True,
    ),
)
