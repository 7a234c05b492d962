"""What a task is fed with: clips of a manifest, in batches, from any step on."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax

from jvjepa.train.data import Batches, ClipConfig, batches, evaluation_batches
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


@contextlib.contextmanager
def reading(batches: grain.MapDataset) -> Iterator[grain.DatasetIterator]:
    """Reads batches of what lies in memory or in maps of files, two ahead, until it is closed."""
    # grain's own numbers are for small elements.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    with contextlib.closing(iter(batches.to_iter_dataset(ahead))) as iterator:
        yield iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a manifest becomes batches; values are checked where they are used.

    Args:
        clip: how clips are taken out of videos.
        batch_size: clips of a batch, over all processes.
        seed: of which clips a batch has, and of what is random in them.
        workers: processes that read ahead, for each process that trains; 0 reads in a thread.
        max_bad: the share of clips of an epoch that may be unreadable; above it the run stops.
    """

    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    batch_size: int = 8
    seed: int = 0
    workers: int = 0
    max_bad: float = 0.01

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

    def record(self, manifest: Manifest) -> dict[str, Any]:
        """What decides which clips there are; how many workers read them does not."""
        clip = dataclasses.asdict(self.clip)
        return {
            "clips": clip,
            "batch_size": self.batch_size,
            "data_seed": self.seed,
            "manifest": manifest.digest,
        }
