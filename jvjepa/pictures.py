"""Reading still pictures: JPEG, PNG, WebP, BMP and TIFF, told by their content.

Pillow decodes. A picture is upright (its EXIF orientation is applied); colour profiles are not
applied. As with video, what is damaged or cut off is an error and never a half-grey picture. Damage
that leaves a valid file cannot be seen: only PNG has checksums, and a JPEG that ends early is taken
if an end marker follows. Damaged metadata of which Pillow only warns is passed over.
"""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from PIL.ImageFile import ImageFile

from jvjepa.config import ModelConfig
from jvjepa.errors import InputError, VideoError
from jvjepa.video import preprocess, read

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # JPEG includes MPO: it begins with a JPEG
_KINDS = "JPEG, PNG, WebP, BMP or TIFF"
_MODES_16 = {"I;16", "I;16B"}  # grey; colours of 16 bits are cut to 8 by Pillow
_MODES = _MODES_16 | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class Clip(NamedTuple):
    """What an encoder takes, of a video or of a picture.

    Args:
        pixels: float32 [T, crop, crop, 3], ImageNet-normalised; T is 1 for a picture.
        times: float64 [T], seconds; 0 for a picture.
        is_picture: whether it is of a picture.
    """

    pixels: NDArray[np.float32]
    times: NDArray[np.float64]
    is_picture: bool


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a local file is a still picture, told by its content and not by its name.

    Args:
        path: a file; URLs, cameras and what does not exist are no pictures.

    Returns:
        True for JPEG, PNG, WebP, BMP and TIFF, also if damaged or cut off behind the header. False
        for GIF, for HEIF and AVIF, for animated PNG and WebP, and for a TIFF of several pages. Of
        several JPEGs in one file (MPO, a phone's previews, motion JPEG) the first is the picture.
    """
    file = pathlib.Path(path)
    if "://" in os.fspath(path) or not file.is_file():
        return False
    try:
        with _opened(file) as image:
            return not _moves(image)
    except VideoError as error:
        return not isinstance(error.__cause__, UnidentifiedImageError)


def read_picture(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Reads a still picture.

    Grey and palette pictures become RGB, and of 16 bits a channel the upper 8 are kept. A picture
    with transparent pixels is refused: what colour shines through them is the caller's to choose.

    Args:
        path: a JPEG, PNG, WebP, BMP or TIFF file.

    Returns:
        uint8 [1, H, W, 3], RGB, upright.

    Raises:
        VideoError: the file is missing, no picture, damaged, cut off, transparent, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise VideoError(f"{path}: is {'no file' if file.exists() else 'not there'}")
    with _opened(file) as image:
        problem = _problem(image)
        image.load()
        orientation = image.getexif().get(Tag.Orientation)
    with _opened(file) as unread:
        unread.verify()  # the checksums of a PNG, which loading passes over
    if problem:
        raise VideoError(f"{path}: {problem}")
    if image.mode in _MODES_16:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA")
    transparent = np.count_nonzero(np.asarray(image.getchannel("A")) < 255)
    if transparent:
        raise VideoError(
            f"{path}: is transparent in {transparent} of its pixels; put it on a background first"
        )
    # `exif_transpose` writes the metadata anew, which fails if it is damaged: so without the rest.
    image = image.convert("RGB")
    image.info.clear()
    image.getexif()[Tag.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(image))[None]


def picture_clip(
    config: ModelConfig, path: str | os.PathLike[str], *, repeat_frame: bool = False
) -> NDArray[np.float32]:
    """Reads a picture and makes it the clip of one frame that a model takes.

    V-JEPA 2.1 was trained on pictures too, and has a patch embedding for them. V-JEPA 2 was trained
    on video alone; its encoder uses a single frame twice, as a clip in which nothing moves.

    Args:
        config: the model's.
        path: as `read_picture`'s.
        repeat_frame: give the picture to a V-JEPA 2 model all the same.

    Returns:
        float32 [1, crop, crop, 3].

    Raises:
        InputError: the model takes no pictures and `repeat_frame` is False, or it does and
            `repeat_frame` is True.
        VideoError: as `read_picture`.
    """
    _check_taken(config, path, repeat_frame)
    return preprocess(read_picture(path), config)


def _check_taken(config: ModelConfig, path: str | os.PathLike[str], repeat_frame: bool) -> None:
    takes_pictures = config.encoder.image_tokenizer
    if not takes_pictures and not repeat_frame:
        raise InputError(
            f"{path}: is a picture, and this model (V-JEPA 2) was trained on video; "
            "--repeat-frame encodes it as a still clip"
        )
    if takes_pictures and repeat_frame:
        raise InputError(
            f"{path}: is a picture, which this model (V-JEPA 2.1) takes as it is; leave out "
            "--repeat-frame"
        )


def is_still(
    config: ModelConfig,
    source: str | os.PathLike[str],
    *,
    repeat_frame: bool,
    choosing: str,
    chosen: bool,
) -> bool:
    """Whether a source is a picture; it must be one that the model takes, as it was told to.

    Args:
        config: the model's.
        source: a picture's file, or a video.
        repeat_frame: of a picture, see `picture_clip`.
        choosing: the options that choose frames of a video, for messages.
        chosen: whether one of them is given.

    Returns:
        Whether it is a picture.

    Raises:
        InputError: an option does not fit the kind of source, or see `picture_clip`.
    """
    if not is_picture(source):
        if repeat_frame:
            raise InputError(f"{source}: is no picture, and only those need --repeat-frame")
        return False
    if chosen:
        raise InputError(
            f"{source}: is a picture; {choosing} choose frames of a video, leave them out"
        )
    _check_taken(config, source, repeat_frame)
    return True


def read_clip(
    config: ModelConfig,
    source: str,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    repeat_frame: bool = False,
) -> Clip:
    """Reads a picture, or a clip of a video, and preprocesses it for a model.

    Args:
        config: the model's.
        source: a picture's file, or what `jvjepa.video.read` takes.
        num_frames: of a video; None takes as many as the model was trained with.
        fps: of a video, as the three that follow; see `jvjepa.video.read`.
        start: seconds.
        end: seconds.
        repeat_frame: of a picture, see `picture_clip`.

    Returns:
        Pixels and times.

    Raises:
        InputError: an option does not fit the kind of source, or see `picture_clip`.
        VideoError: the source cannot be read.
    """
    still = is_still(
        config,
        source,
        repeat_frame=repeat_frame,
        choosing="--num-frames, --fps, --start and --end",
        chosen=num_frames is not None or fps is not None or bool(start) or end is not None,
    )
    if still:
        return Clip(preprocess(read_picture(source), config), np.zeros(1), is_picture=True)
    count = config.encoder.frames_per_clip if num_frames is None else num_frames
    try:
        frames, times = read(source, num_frames=count, fps=fps, start=start, end=end)
    except VideoError as error:
        short = num_frames is None and f"num_frames = {count}" in str(error)
        hint = "; --num-frames sets another number" if short else ""
        raise VideoError(f"{error}{hint}") from error.__cause__
    return Clip(preprocess(frames, config), times, is_picture=False)


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[ImageFile]:
    """A picture that Pillow has open; what it raises here becomes an error that names the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # A stream: of a name, Pillow maps the file into memory, and spoils TIFFs on their side.
            with open(file, "rb") as stream, Image.open(stream, formats=_FORMATS) as image:
                yield image
        except UnidentifiedImageError as error:
            raise VideoError(f"{file}: is no picture; right is {_KINDS}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise VideoError(
                f"{file}: has more pixels than PIL.Image.MAX_IMAGE_PIXELS, which is "
                f"{Image.MAX_IMAGE_PIXELS}; make the picture smaller"
            ) from error
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            raise VideoError(f"{file}: cannot be read ({error})") from error


def _moves(image: ImageFile) -> bool:
    return image.format != "MPO" and getattr(image, "is_animated", False)


def _problem(image: ImageFile) -> str:
    """Why a picture that is open, but not loaded, cannot be taken; "" if nothing is wrong."""
    if _moves(image):
        return "is no still picture, but several; an animation can be read as a video"
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if Tag.SubIFDs in tags:  # raw files of cameras, whose first picture is a thumbnail
        return "holds several pictures; right is a TIFF of one"
    signed = max(tags.get(Tag.SampleFormat, (1,))) > 1
    layout = (tags.get(Tag.BitsPerSample, (16,)), tags.get(Tag.PhotometricInterpretation, 1))
    if image.mode not in _MODES or signed or (image.mode in _MODES_16 and layout != ((16,), 1)):
        return "has samples that are not read; right are unsigned ones of 8 or 16 bits"
    if "transparency" in image.info and any("16" in str(tile[3]) for tile in image.tile):
        return "has a transparent colour of 16 bits; put it on a background first"
    return ""
