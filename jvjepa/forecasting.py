"""What happens next in a video file: the clip before a moment, and what comes some time after it.

Reference: `evals/action_anticipation_frozen/epickitchens.py` of Meta's V-JEPA 2, which takes the
same number of frames up to the moment. It takes every n-th frame, n the whole number at or below
the video's rate over the clip's, so that a clip of it may be shorter, and repeats the first frame
of a video that is too short. Here frames are taken by time, and a short video is an error.
"""

import dataclasses
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa import video
from jvjepa.anticipation import FARTHEST, anticipate
from jvjepa.decoding import Source, index_file, is_live, locate
from jvjepa.errors import InputError, VideoError
from jvjepa.pictures import is_picture
from jvjepa.recording import check_output, save_json
from jvjepa.weights import Model, read_record

if TYPE_CHECKING:
    from rich.console import Console

    from jvjepa import cli

_ROUNDING = 0.002  # seconds that timestamps and a file's end may be wrong by; Matroska has ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is likely to happen.

    Args:
        probabilities: float32 [classes] by kind: verbs, nouns and actions, or actions alone.
        labels: the names of the classes by kind.
        times: float64 [T], the seconds at which the file first shows each frame of the clip.
        at: the second at which the clip ends.
        ahead: seconds from there to what is anticipated.
    """

    probabilities: dict[str, NDArray[np.float32]]
    labels: dict[str, tuple[str, ...]]
    times: NDArray[np.float64]
    at: float
    ahead: float

    def top(self, k: int = 5) -> dict[str, list[tuple[str, float]]]:
        """Returns the most probable classes of each kind and their probabilities, best first.

        Args:
            k: how many, 1 or more; a kind of fewer classes gives all.

        Raises:
            InputError: `k` is below 1.
        """
        if k < 1:
            raise InputError(f"top = {k}; it must be 1 or more")
        best = {}
        for kind, values in self.probabilities.items():
            order = np.argsort(-values, kind="stable")[:k]
            best[kind] = [(self.labels[kind][i], float(values[i])) for i in order]
        return best


def forecast(
    model: Model, source: Source, *, at: float | None = None, ahead: float = 1.0
) -> Forecast:
    """Says what will happen after a moment of a video file.

    Args:
        model: with an anticipator; its configuration says which clip it sees, of Meta's probes 32
            frames at 8 a second: those shown 4, 3.875, .. and 0.125 seconds before the moment.
        source: a path, or the URL of a file.
        at: the moment, in seconds since the first frame; None is the end of the file.
        ahead: how long after it, in seconds, 0 to 60; see `jvjepa.anticipation.anticipate`.

    Returns:
        The probabilities, a softmax over the classes of each kind.

    Raises:
        InputError: the model has no anticipator, a number is impossible, or the source is a
            picture.
        VideoError: the video is missing, damaged or live, or too short before `at`.
    """
    _require_anticipator(model.anticipator, "the model")
    if is_picture(source):
        raise InputError(f"{source}: is a picture, and anticipating needs a video; give one")
    if not 0 <= ahead <= FARTHEST:
        raise InputError(f"ahead = {ahead:g}; it must be 0 to {FARTHEST:g} seconds")
    config = model.config.anticipator
    rate, span = config.frames_per_second, config.frames_per_clip / config.frames_per_second
    place = locate(source, video.Reconnect().timeout)
    name = place.name
    if is_live(place):
        raise VideoError(f"{name}: is live and has no end; give a file")
    length = index_file(place).seconds
    end = length if at is None else at
    if not end <= length + _ROUNDING:
        raise VideoError(f"{name}: at = {end:g}, but it lasts {length:.3f} s")
    if end < span - _ROUNDING:
        raise VideoError(
            f"{name}: lasts {length:.3f} s, and at = {end:.3f} s; before that there must be "
            f"{span:g} s, {config.frames_per_clip} frames at {rate} a second"
        )
    start = max(0.0, end - span)
    frames, times = video.read(source, num_frames=config.frames_per_clip, fps=rate, start=start)
    pixels = jnp.asarray(video.preprocess(frames, model.config)[None])
    parts = (model.encoder, model.predictor, model.anticipator)
    logits = anticipate(*parts, model.params, pixels, ahead)
    probabilities = {
        kind: np.asarray(jax.nn.softmax(getattr(logits, kind)[0].astype(jnp.float32)))
        for kind in config.heads
    }
    labels = {kind: getattr(config, kind) for kind in config.heads}
    return Forecast(probabilities=probabilities, labels=labels, times=times, at=end, ahead=ahead)


def anticipate_command(options: "cli.Anticipate", console: "Console") -> int:
    """`jvjepa anticipate`."""
    if options.top < 1:
        raise InputError(f"top = {options.top}; it must be 1 or more")
    if options.json is not None:
        sources = (options.model, options.lora, options.video)
        check_output(options.json, suffix=".json", force=options.force, sources=sources)
    _require_anticipator(read_record(options.model)[0].anticipator, str(options.model))
    model = options.load()
    begin = time.perf_counter()
    found = forecast(model, options.video, at=options.at, ahead=options.ahead)
    seconds = time.perf_counter() - begin
    best = found.top(options.top)
    for kind, classes in best.items():
        console.print(f"{kind}:")
        for label, probability in classes:
            console.print(f"{probability:7.2%}  {label}")
    console.print(
        f"{found.ahead:g} s after {found.at:.2f} s, seen {len(found.times)} frames from "
        f"{found.times[0]:.2f} to {found.times[-1]:.2f} s, {seconds:.1f} s with compilation"
    )
    if options.json is not None:
        record = {
            "video": options.video,
            "at": found.at,
            "ahead": found.ahead,
            **{
                kind: {
                    "labels": [label for label, _ in classes],
                    "probabilities": [probability for _, probability in classes],
                }
                for kind, classes in best.items()
            },
            "model": str(options.model),
        }
        save_json(options.json, record)
        console.print(f"wrote {options.json}")
    return 0


def _require_anticipator(anticipator: object, name: str) -> None:
    if anticipator is None:
        raise InputError(
            f"{name} has no anticipator; attach a probe to an encoder with its predictor: "
            "jvjepa convert --probe ek100-vitl-256.pt --encoder MODEL OUT --labels FILE"
        )
