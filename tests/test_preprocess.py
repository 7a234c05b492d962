"""The pixels that a model gets are those that Hugging Face's processor would give."""

import types

import numpy as np
import pytest
import torch
from transformers.image_transforms import get_resize_output_image_size

from jvjepa import video
from jvjepa.errors import InputError, VideoError

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
SIZES = [
    *((17, 31), (31, 17), (64, 64), (73, 73), (97, 98), (292, 292), (8, 300), (101, 1003)),
    *((240, 320), (333, 517), (480, 640), (720, 1280), (1280, 720), (1, 1), (2, 5)),
]


def config(crop: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(crop_size=crop)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def reference_crop(frames: np.ndarray, crop: int) -> torch.Tensor:
    """uint8 [T, 3, crop, crop]: what the processor does before it normalises, with torch."""
    height, width = get_resize_output_image_size(
        frames[0], int(crop * 256 / 224), default_to_square=False, input_data_format="channels_last"
    )
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if (height, width) != images.shape[2:]:
        images = torch.nn.functional.interpolate(
            images, (height, width), mode="bilinear", antialias=True, align_corners=False
        )
    top, left = int((height - crop) / 2.0), int((width - crop) / 2.0)
    return images[..., top : top + crop, left : left + crop]


def reference(frames: np.ndarray, crop: int) -> np.ndarray:
    images = reference_crop(frames, crop).to(torch.float32)
    images = (images - (MEAN * 255.0)[:, None, None]) / (STD * 255.0)[:, None, None]
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("crop", [64, 256, 384])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_is_the_processor_pixel_for_pixel(size: tuple[int, int], crop: int) -> None:
    frames = noise(2, *size, 3)

    pixels = video.preprocess(frames, config(crop))

    assert pixels.dtype == np.float32
    assert pixels.shape == (2, crop, crop, 3)
    np.testing.assert_array_equal(pixels, reference(frames, crop))


@pytest.mark.parametrize("crop", [64, 256])
def test_is_the_processor_on_steep_edges(crop: int) -> None:
    """Black and white only, where a rounding of weights that add up to over 1 would wrap."""
    frames = (noise(1, 150, 211, 3) > 127).astype(np.uint8) * 255
    frames[:, 40:90] = 255

    np.testing.assert_array_equal(video.preprocess(frames, config(crop)), reference(frames, crop))


def test_every_value_is_normalised_as_torch_does() -> None:
    ramp = np.arange(256, dtype=np.uint8)
    frames = np.broadcast_to(ramp[:, None, None], (256, 292, 292))[..., None].repeat(3, -1)

    pixels = video.preprocess(frames, config(256))

    expected = (ramp[:, None] / 255.0 - MEAN.numpy()) / STD.numpy()
    np.testing.assert_allclose(pixels[:, 5, 5], expected, rtol=1e-5, atol=1e-6)


def test_the_crop_is_off_centre_where_the_remainder_is_odd() -> None:
    """(519 - 256) / 2 is 131 by Hugging Face's rule; Meta's gives 132."""
    frames = noise(1, 292, 519, 3)
    mean, std = (MEAN * 255.0).numpy(), (STD * 255.0).numpy()

    pixels = video.preprocess(frames, config(256))

    expected = (frames[:, 18:274, 131:387].astype(np.float32) - mean) / std
    np.testing.assert_array_equal(pixels, expected)


def test_frames_do_not_affect_each_other_and_are_not_changed() -> None:
    frames = noise(3, 90, 120, 3)
    before = frames.copy()
    reversed_view = frames[::-1]  # not contiguous

    pixels = video.preprocess(frames, config(64))

    np.testing.assert_array_equal(video.preprocess(reversed_view, config(64)), pixels[::-1])
    np.testing.assert_array_equal(frames, before)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "are float32; right is uint8"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "float32 with NaN"),
        (np.zeros((2, 8, 8, 3), np.int64), "are int64; right is uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\].*image\[None\]"),
        (np.zeros((8, 8), np.uint8), r"shape \[8, 8\]; right is"),
        (np.zeros((2, 3, 8, 8), np.uint8), "channels first.*transpose"),
        (np.zeros((2, 8, 8, 4), np.uint8), "have 4 channels"),
        (np.zeros((2, 8, 8, 1), np.uint8), "have 1 channels"),
        ([[1, 2]], "are a list"),
    ],
)
def test_says_what_is_wrong_with_frames(frames: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        video.preprocess(frames, config(64))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 0, 8, 3)])
def test_refuses_no_frames(shape: tuple[int, ...]) -> None:
    with pytest.raises(VideoError, match="are empty"):
        video.preprocess(np.zeros(shape, np.uint8), config(64))
