"""`jvjepa mos`: scores of a video, or of all videos of a folder or a list.

`jvjepa mos evaluate`, which compares with scores that people gave, is a command of `jvjepa.train`:
`jvjepa.cli.main` hands it on, so a model in a folder of that name is ./evaluate here.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from jvjepa.adapters import weights_sha256
from jvjepa.attention import Backend
from jvjepa.errors import InputError, VideoError
from jvjepa.options import DType
from jvjepa.quality import (
    SCORES,
    QualityConfig,
    QualityModel,
    load_quality,
    read_pixels,
    read_quality_record,
    score,
    score_embedded,
    text_features,
)
from jvjepa.recording import check_output, save_json
from jvjepa.score_file import Request, ScoreFile, folder_requests, read_requests

_Positional = tyro.conf.Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mos:
    """Score the quality of generated videos, and how well they show what they should.

    Five scores: traditional quality, alignment with the prompt, aesthetics, temporal quality, and
    overall. `jvjepa mos evaluate --help`: compare with scores that people gave.
    """

    model: _Positional[Path]
    """A converted folder of a video-quality model."""
    source: _Positional[str]
    """A video, a file or a URL of one; a folder of videos; or a .csv with columns video_name and
    Prompt."""
    prompt: str | None = None
    """What the video, or every video of the folder, should show."""
    videos: Path | None = None
    """The folder of the videos of a .csv; by default the one that it is in."""
    out: Path | None = None
    """For a folder or a .csv: the .csv to which every scored video is added. If it is there, its
    videos are not scored again."""
    json: Path | None = None
    """A .json to write the result into."""
    dtype: DType | None = None
    """Dtype of the computation; by default that of the weights."""
    attention: Backend = "auto"
    """Attention backend."""
    force: bool = False
    """Replace the files."""


def mos_command(options: Mos, console: Console) -> int:
    """`jvjepa mos`."""
    source = Path(options.source)
    many = source.is_dir() or source.suffix.lower() == ".csv"
    requests = _requests(options, source) if many else []
    if options.json is not None:
        sources = (options.model, None if source.is_dir() else source)
        check_output(options.json, suffix=".json", force=options.force, sources=sources)
    read_quality_record(options.model)  # says at once what is wrong with it
    if many:
        return _score_many(options, requests, console)
    _require_prompt(options)
    for name in ("videos", "out"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for a folder or a .csv, and {options.source} is neither")
    model = load_quality(options.model, dtype=options.dtype, attention=options.attention)
    begin = time.perf_counter()
    scores = score(model, read_pixels(options.source, model.config), options.prompt)
    for name, value in zip(SCORES, scores, strict=True):
        console.print(f"{name:12} {value:6.3f}")
    seconds = time.perf_counter() - begin
    frames = model.config.num_frames
    console.print(f"from {frames} frames of {options.source}, {seconds:.1f} s with compilation")
    if options.json is not None:
        record = {
            "video": options.source,
            "prompt": options.prompt,
            "scores": _named(scores),
            "model": str(options.model),
        }
        save_json(options.json, record)
        console.print(f"wrote {options.json}")
    return 0


def _requests(options: Mos, source: Path) -> list[Request]:
    """The videos to score; raises InputError where options do not belong together."""
    if options.out is None:
        raise InputError(f"{source} is not one video; name a file for the scores: --out")
    sources = () if source.is_dir() else (source,)
    check_output(options.out, suffix=".csv", force=True, sources=sources)  # it may be added to
    if source.is_dir():
        _require_prompt(options)
        if options.videos is not None:
            raise InputError(f"--videos is for a .csv, and {source} is a folder")
        return folder_requests(source, options.prompt.strip())
    if options.prompt is not None:
        raise InputError(f"--prompt is for videos, and {source} has prompts of its own")
    return read_requests(source, options.videos)


def _require_prompt(options: Mos) -> None:
    if options.prompt is None or not options.prompt.strip():
        problem = "is empty" if options.prompt is not None else "is missing"
        raise InputError(f"--prompt {problem}; say what {options.source} should show")


def _score_many(options: Mos, requests: list[Request], console: Console) -> int:
    model = load_quality(options.model, dtype=options.dtype, attention=options.attention)
    digest = weights_sha256(model.params)
    failed: dict[str, str] = {}
    with ScoreFile(options.out, digest, force=options.force) as file:
        due = [request for request in requests if not file.has(request)]
        if len(due) < len(requests):
            there = len(requests) - len(due)
            console.print(f"{there} of {len(requests)} videos are scored in {options.out} already")
        for i, (request, found) in enumerate(_score_each(model, due), 1):
            if isinstance(found, VideoError):
                failed[request.name] = str(found)
                text = "cannot be read"
            else:
                file.add(request, found)
                text = "  ".join(f"{value:6.3f}" for value in found)
            console.print(f"{i:{len(str(len(due)))}}/{len(due)}  {text}  {request.name}")
        scored = {
            request: file.scores[request.name, request.prompt]
            for request in requests
            if file.has(request)
        }
    _summarise(scored, failed, options, console)
    return 1 if failed else 0


def _score_each(
    model: QualityModel, requests: list[Request]
) -> Iterator[tuple[Request, NDArray[np.float32] | VideoError]]:
    """Yields the scores of each video, or why it cannot be read."""
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    if not prompts:
        return
    features = dict(zip(prompts, text_features(model, prompts), strict=True))
    for request, pixels in _read_ahead(requests, model.config):
        if isinstance(pixels, VideoError):
            yield request, pixels
        else:
            yield request, score_embedded(model, pixels, features[request.prompt][None])


def _read_ahead(
    requests: Iterable[Request], config: QualityConfig
) -> Iterator[tuple[Request, NDArray[np.float32] | VideoError]]:
    """Yields what the model sees of each video; the next one is read meanwhile."""

    def read(request: Request) -> NDArray[np.float32] | VideoError:
        try:
            return read_pixels(request.path, config)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        before = None
        for request in requests:
            reading = (request, pool.submit(read, request))
            if before is not None:
                yield before[0], before[1].result()
            before = reading
        if before is not None:
            yield before[0], before[1].result()


def _summarise(
    scored: dict[Request, NDArray[np.float32]],
    failed: dict[str, str],
    options: Mos,
    console: Console,
) -> None:
    if scored:
        mean = np.mean(list(scored.values()), axis=0)
        console.print(f"mean of {len(scored)} videos in {options.out}:")
        for name, value in zip(SCORES, mean, strict=True):
            console.print(f"{name:12} {value:6.3f}")
    for problem in failed.values():
        console.print(f"excluded: {problem}")
    if options.json is not None:
        record = {
            "videos": [
                {"video": request.name, "prompt": request.prompt, "scores": _named(scores)}
                for request, scores in scored.items()
            ],
            "excluded": failed,
            "model": str(options.model),
        }
        save_json(options.json, record)
        console.print(f"wrote {options.json}")


def _named(scores: NDArray[np.float32]) -> dict[str, float]:
    """By name, with the digits that a float32 has."""
    return {name: float(str(value)) for name, value in zip(SCORES, scores, strict=True)}
