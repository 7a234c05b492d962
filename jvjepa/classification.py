"""Classifying a video as Meta's evaluation does: clips over time, crops over space, one answer.

Reference: `src/datasets/video_dataset.py` (clips) and `evals/video_classification_frozen` (how the
answers to them are combined) of Meta's V-JEPA 2. Meta's evaluation draws the places of clips at
random; here they are fixed, so that the same video gives the same answer.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from jvjepa.clips import read_views, shown_at, with_index
from jvjepa.decoding import Index, Source
from jvjepa.encoder import Encoder
from jvjepa.errors import InputError
from jvjepa.heads import Classifier
from jvjepa.pictures import is_picture, is_still, read_picture
from jvjepa.preprocessing import crops
from jvjepa.recording import check_output, save_json
from jvjepa.typing import Array, Params
from jvjepa.weights import Model, read_record

if TYPE_CHECKING:
    from rich.console import Console

    from jvjepa import cli

Combine = Literal["tokens", "probabilities"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """What a video shows.

    Args:
        probabilities: float32 [labels].
        labels: their names.
        views: how many crops of each clip were seen; 1 where the video is too square for others to
            differ.
        times: float64 [clips, T], the seconds at which the file first shows each frame; 0 for a
            picture, which is one clip of one frame.
    """

    probabilities: NDArray[np.float32]
    labels: tuple[str, ...]
    views: int
    times: NDArray[np.float64]

    @property
    def clips(self) -> int:
        """How many clips were seen; 1 where the video is too short for others to differ."""
        return len(self.times)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Returns the k most probable labels and their probabilities, the most probable first.

        Args:
            k: 1 to the number of labels.

        Raises:
            InputError: `k` is not in that range.
        """
        if not 1 <= k <= len(self.labels):
            raise InputError(f"top = {k}; there are {len(self.labels)} labels, take 1 to that many")
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]


def classify(
    model: Model,
    source: Source,
    *,
    clips: int = 1,
    views: int = 1,
    num_frames: int | None = None,
    frame_step: int | None = None,
    combine: Combine = "tokens",
    repeat_frame: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Classification:
    """Classifies a video file, or a picture.

    Meta's numbers (clips x views of frames) are 2 x 3 of 16 or 64 for Something-Something v2 and
    4 x 3 of 32 for Diving48. Clips are decoded and encoded one at a time.

    Args:
        model: with a classifier; its `config.classifier.layers` says which layers it sees.
        source: a path, or the URL of a file; for V-JEPA 2.1 also a picture.
        clips: clips, spread over the video as `clip_indices` says.
        views: crops of each clip, spread along its long side, see `jvjepa.preprocessing.crops`.
        num_frames: frames of a clip; None takes as many as the classifier was trained with.
        frame_step: frames of the video for each frame of a clip, as in `clip_indices`; None takes
            Meta's numbers: 4 for 16 frames, 2 for 32 or 64, 64 / num_frames for fewer than 16.
        combine: what becomes one answer. "tokens": the classifier sees the tokens of all clips of
            one view together, and the probabilities of the views are averaged, as in Meta's
            evaluation. "probabilities": it sees every view of every clip alone, and all their
            probabilities are averaged.
        repeat_frame: give a picture to a V-JEPA 2 model all the same, see
            `jvjepa.pictures.picture_clip`.
        progress: told what runs now.

    Returns:
        Probabilities of the labels, and what they were computed from.

    Raises:
        InputError: the model has no classifier, a number is impossible, or the model takes no
            pictures.
        VideoError: the video or picture is missing or damaged, or the video is live.
    """
    require_classifier(model.classifier, "the model")
    encoder = model.config.encoder
    still = is_still(
        model.config,
        source,
        repeat_frame=repeat_frame,
        choosing="--clips, --num-frames and --frame-step",
        chosen=clips != 1 or num_frames is not None or frame_step is not None,
    )
    num_frames = model.config.classifier_frames if num_frames is None else num_frames
    _check_counts(clips=clips, views=views, num_frames=num_frames)
    frame_step = max(2, 64 // num_frames) if frame_step is None else frame_step
    _check_counts(frame_step=frame_step)
    if num_frames != 1 and num_frames % encoder.tubelet_size:
        right = f"1, or a multiple of {encoder.tubelet_size}"
        raise InputError(f"num_frames = {num_frames}; it must be {right}")
    if combine not in get_args(Combine):
        raise InputError(f"combine = {combine!r}; it must be one of {get_args(Combine)}")
    if still:
        clip = crops(read_picture(source), model.config, views)
        return _classify(model, [clip], np.zeros((1, 1)), combine, progress)

    def run(index: Index) -> Classification:
        # In a short video all clips are the same one.
        chosen = clip_indices(len(index.ticks), num_frames, clips, frame_step)
        chosen = np.unique(chosen, axis=0)
        times = shown_at(index, chosen)
        seen = read_views(source, times, model.config, views)
        return _classify(model, seen, times, combine, progress)

    return with_index(source, run)


def clip_indices(
    total_frames: int, num_frames: int, clips: int, frame_step: int
) -> NDArray[np.int64]:
    """Chooses the frames of clips that are spread over a video, as Meta's evaluation does.

    A clip spans `num_frames * frame_step` frames, and the video is cut into as many equal segments
    as there are clips. Where a segment is longer than a clip, the clip lies in its middle (Meta's
    evaluation draws the place) and its frames are `linspace(start, start + span, num_frames)`, so
    that they are a little more than `frame_step` apart and the last one is the span's last.

    Where a segment is not longer, clips overlap: they begin at equal distances, the first with the
    video and the last so that it ends with it. Then a clip's frames are spread over its span, or
    over the whole video where that is shorter, one for each `frame_step`; those that are missing at
    the end repeat the last. (The last but one frame of the span, to be exact: the original never
    gives the very last.)

    Args:
        total_frames: frames of the video.
        num_frames: frames of a clip.
        clips: how many clips.
        frame_step: frames of the video for each frame of a clip.

    Returns:
        int64 [clips, num_frames], from 0; they never go back within a clip.

    Raises:
        InputError: a number is below 1.
    """
    _check_counts(
        total_frames=total_frames, num_frames=num_frames, clips=clips, frame_step=frame_step
    )
    span, segment = num_frames * frame_step, total_frames // clips
    if segment > span:
        start, stride = (segment - span) // 2, segment
        frames = np.linspace(start, start + span, num_frames)
        frames = np.minimum(frames, start + span - 1)
    else:
        span = min(span, total_frames)
        stride = (total_frames - span) // max(1, clips - 1)
        spread = np.linspace(0, span - 1, (span - 1) // frame_step)
        frames = np.pad(spread, (0, num_frames - len(spread)), constant_values=span - 1)
        frames = np.minimum(frames, max(0, span - 2))
    return frames.astype(np.int64) + stride * np.arange(clips)[:, None]


def require_classifier(classifier: object, name: str) -> None:
    """Raises InputError, which calls the model `name`, where its classifier is None."""
    if classifier is None:
        raise InputError(
            f"{name} has no classifier; convert a classification checkpoint, or attach a probe: "
            "jvjepa convert --probe FILE.pt --encoder MODEL OUT --labels FILE"
        )


def classify_command(options: "cli.Classify", console: "Console") -> int:
    """`jvjepa classify`."""
    if options.top < 1:
        raise InputError(f"top = {options.top}; it must be 1 or more")
    if options.json is not None:
        sources = (options.model, options.lora, options.video)
        check_output(options.json, suffix=".json", force=options.force, sources=sources)
    require_classifier(read_record(options.model)[0].classifier, str(options.model))
    model = options.load()
    begin = time.perf_counter()
    with console.status("") as status:
        found = classify(
            model,
            options.video,
            clips=options.clips,
            views=options.views,
            num_frames=options.num_frames,
            frame_step=options.frame_step,
            combine=options.combine,
            repeat_frame=options.repeat_frame,
            progress=lambda text: status.update(text),
        )
    seconds = time.perf_counter() - begin
    best = found.top(min(options.top, len(found.labels)))
    for label, probability in best:
        console.print(f"{probability:7.2%}  {label}")
    what = (
        f"{found.clips} x {found.views} (clips x views) of {found.times.shape[1]} frames from "
        f"{found.times.min():.2f} to {found.times.max():.2f} s"
    )
    if is_picture(options.video):
        what = f"a picture, {found.views} view{'s' * (found.views > 1)}"
    console.print(f"{what}, {seconds:.1f} s with compilation")
    if options.json is not None:
        record = {
            "video": options.video,
            "labels": [label for label, _ in best],
            "probabilities": [probability for _, probability in best],
            "clips": found.clips,
            "views": found.views,
            "model": str(options.model),
        }
        save_json(options.json, record)
        console.print(f"wrote {options.json}")
    return 0


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} = {count}; it must be 1 or more")


def _classify(
    model: Model,
    clips: Iterable[NDArray[np.float32]],
    times: NDArray[np.float64],
    combine: Combine,
    progress: Callable[[str], None],
) -> Classification:
    """Classifies clips, each [views, T, H, W, 3], whose frames are first shown at `times`."""
    encode = functools.partial(_encode, model.encoder, model.params["encoder"])
    answer = functools.partial(_probabilities, model.classifier, model.params["classifier"])
    config = model.config.classifier
    tokens: list[list[Array]] = []  # of every view of every clip
    answers: list[Array] = []
    views = 0
    for i, clip in enumerate(clips):
        progress(f"clip {i + 1} of {len(times)}")
        encoded = [encode(view[None], config.layers) for view in clip]
        views = len(encoded)
        if combine == "tokens":
            tokens.append(encoded)
        else:
            answers += [answer([view]) for view in encoded]
    answers += [answer(list(together)) for together in zip(*tokens, strict=True)]
    return Classification(
        probabilities=np.mean(jax.device_get(answers), axis=0, dtype=np.float32),
        labels=config.labels,
        views=views,
        times=times,
    )


@functools.partial(jax.jit, static_argnames=("encoder", "layers"))
def _encode(encoder: Encoder, params: Params, clip: Array, layers: tuple[int, ...]) -> Array:
    """The tokens [1, n·N, D] of a clip: of the last layer, or of `layers` one after the other."""
    if not layers:
        return encoder.apply({"params": params}, clip)
    levels = encoder.apply({"params": params}, clip, method="levels", layers=layers)
    return rearrange(levels, "n b t d -> b (n t) d")


@functools.partial(jax.jit, static_argnames="classifier")
def _probabilities(classifier: Classifier, params: Params, clips: list[Array]) -> Array:
    """Float32 [labels], from the tokens of some clips together."""
    logits = classifier.apply({"params": params}, jnp.concatenate(clips, axis=1))[0]
    return jax.nn.softmax(logits.astype(jnp.float32))
