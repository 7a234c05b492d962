"""What a task is fed with: clips of a manifest, in batches, from any step on."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax

from jvjepa.config import EncoderConfig
from jvjepa.fields import check, check_kinds, check_positive_ints, is_number, is_whole
from jvjepa.train.data import MAX_SEED, Batches, ClipConfig, batches, evaluation_batches
from jvjepa.train.manifest import Manifest
from jvjepa.train.task import Feed


def options(config: Any, *without: str) -> dict[str, Any]:
    """The fields of a configuration that tell a run from others.

    Args:
        config: of a kind of training.
        without: fields that change nothing, or that are recorded in another form.

    Returns:
        The other fields, as JSON knows them.
    """
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in without}


def check_clip(clip: ClipConfig, encoder: EncoderConfig, tubelets: int = 1, why: str = "") -> None:
    """Raises ConfigError unless a clip can be cut into whole tubelets and patches.

    Args:
        clip: gives its frames, and the side of its square.
        encoder: gives the sizes of tubelet and patch.
        tubelets: the fewest that it must have.
        why: what to say of that number.
    """
    size, patch = encoder.tubelet_size, encoder.patch_size
    fits = clip.num_frames % size == 0 and clip.num_frames >= tubelets * size
    right = f"a multiple of {size}, and {tubelets * size} or more{why}"
    check(fits, clip, "num_frames", right)
    right = f"a multiple of the encoder's patch, {patch}"
    check(clip.crop_size % patch == 0, clip, "crop_size", right)


@contextlib.contextmanager
def reading(batches: grain.MapDataset) -> Iterator[grain.DatasetIterator]:
    """Reads batches of what lies in memory or in maps of files, two ahead, until it is closed."""
    # grain's own numbers are for small elements.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    with contextlib.closing(iter(batches.to_iter_dataset(ahead))) as iterator:
        yield iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a manifest becomes batches.

    Args:
        clip: how clips are taken out of videos.
        batch_size: clips of a batch, over all processes.
        seed: of which clips a batch has, and of what is random in them, 0 to 2^32 - 1.
        workers: processes that read ahead, for each process that trains; 0 reads in a thread.
        max_bad: the share of clips of an epoch that may be unreadable; above it the run stops.

    Raises:
        ConfigError: a value is impossible.
    """

    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    batch_size: int = 8
    seed: int = 0
    workers: int = 0
    max_bad: float = 0.01

    def __post_init__(self) -> None:
        """Checks every field; what goes with the number of processes is checked where they are."""
        check_kinds(self, clip=ClipConfig)
        check_positive_ints(self, "batch_size")
        fits = is_whole(self.seed) and self.seed < MAX_SEED
        check(fits, self, "seed", f"a whole number, 0 to {MAX_SEED - 1}")
        check(is_whole(self.workers), self, "workers", "a whole number, 0 or more")
        check(is_number(self.max_bad, 0, 1), self, "max_bad", "a share, 0 to 1")

    def feed(self, manifest: Manifest) -> Feed:
        """The batches of a training run."""

        def start(step: int, process_index: int, process_count: int) -> Batches:
            return batches(
                manifest,
                self.clip,
                batch_size=self.batch_size,
                seed=self.seed,
                step=step,
                process_index=process_index,
                process_count=process_count,
                workers=self.workers,
                max_bad=self.max_bad,
            )

        return start

    def evaluate(self, manifest: Manifest) -> Batches:
        """This process's batches in which every clip is once, its middle, with nothing random."""
        middle = {"temporal": "uniform", "spatial": "centre"}
        return evaluation_batches(
            manifest,
            dataclasses.replace(self.clip, **middle),
            batch_size=self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.workers,
            max_bad=self.max_bad,
        )

    def record(self, manifest: Manifest, validation: Manifest | None = None) -> dict[str, Any]:
        """What decides which clips there are; how many workers read them does not."""
        clip = dataclasses.asdict(self.clip)
        return {
            "clips": clip,
            "batch_size": self.batch_size,
            "data_seed": self.seed,
            "manifest": manifest.digest,
            "validation": None if validation is None else validation.digest,
        }
