"""Which frames a clip is made of, and which squares of them a view is."""

import itertools
import types

import numpy as np
import pytest
from evaluation import reference_indices, torch_crops

from jvjepa import video
from jvjepa.classification import clip_indices
from jvjepa.errors import InputError
from jvjepa.preprocessing import crops

CROP = 32

# --- Clips --------------------------------------------------------------------------------------


def test_clip_indices_of_many_sizes() -> None:
    for total, num_frames, clips, step in itertools.product(
        (1, 2, 3, 5, 11, 12, 13, 47, 48, 64, 65, 128, 129, 130, 300, 1001),
        (1, 2, 4, 16, 32),
        (1, 2, 3, 4, 8),
        (1, 2, 3, 4),
    ):
        chosen = clip_indices(total, num_frames, clips, step)
        case = f"{total} frames, {clips} clips of {num_frames}, step {step}"
        assert chosen.shape == (clips, num_frames), case
        assert chosen.dtype == np.int64, case
        assert chosen.tolist() == reference_indices(total, num_frames, clips, step), case
        assert chosen.min() >= 0, case
        assert chosen.max() < total, case
        assert (np.diff(chosen, axis=1) >= 0).all(), case
        assert (np.diff(chosen, axis=0) >= 0).all(), case


@pytest.mark.parametrize(
    ("total", "num_frames", "clips", "step", "expected"),
    [
        # In the middle of each half; the last frame is the last of 8 and not the ninth.
        (100, 4, 2, 2, [[21, 23, 26, 28], [71, 73, 76, 78]]),
        # Overlapping; one frame in two, the rest repeats the last but one of 8.
        (20, 4, 3, 2, [[0, 3, 6, 6], [6, 9, 12, 12], [12, 15, 18, 18]]),
        # Too short for one clip: all clips are the same, the end is repeated.
        (9, 6, 2, 2, [[0, 2, 5, 7, 7, 7]] * 2),
        (1, 4, 2, 3, [[0, 0, 0, 0]] * 2),
        (2, 4, 1, 3, [[0, 0, 0, 0]]),
        (50, 1, 2, 4, [[10], [35]]),
    ],
)
def test_clip_indices_by_hand(
    total: int, num_frames: int, clips: int, step: int, expected: list[list[int]]
) -> None:
    assert clip_indices(total, num_frames, clips, step).tolist() == expected


@pytest.mark.parametrize("name", ["total_frames", "num_frames", "clips", "frame_step"])
def test_clip_indices_refuses_numbers_below_one(name: str) -> None:
    numbers = {"total_frames": 9, "num_frames": 4, "clips": 2, "frame_step": 2, name: 0}
    with pytest.raises(InputError, match=f"{name} = 0; it must be 1 or more"):
        clip_indices(**numbers)


# --- Views --------------------------------------------------------------------------------------

SIZES = [(48, 80), (80, 48), (40, 40), (101, 100), (32, 57), (240, 320), (33, 500), (2, 5)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_crops_are_torchs_pixel_for_pixel(size: tuple[int, int], views: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    config = types.SimpleNamespace(crop_size=CROP)
    before = frames.copy()

    pixels = crops(frames, config, views)

    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, torch_crops(frames, CROP, views))
    np.testing.assert_array_equal(frames, before)
    if views == 1:
        np.testing.assert_array_equal(pixels[0], video.preprocess(frames, config))


def test_three_views_are_left_centre_and_right() -> None:
    frames = np.zeros((1, 32, 96, 3), np.uint8)
    frames[:, :, 32:64], frames[:, :, 64:] = 100, 200
    pixels = crops(frames, types.SimpleNamespace(crop_size=32), 3)
    table = crops(np.full((1, 32, 32, 3), 100, np.uint8), types.SimpleNamespace(crop_size=32), 3)
    assert table.shape[0] == 1  # a square has one
    for view, value in enumerate((0, 100, 200)):
        expected = (value / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
        wanted = np.broadcast_to(expected, (32, 32, 3))
        np.testing.assert_allclose(pixels[view, 0], wanted, rtol=1e-5, atol=1e-6)
    tall = crops(frames.swapaxes(1, 2), types.SimpleNamespace(crop_size=32), 3)
    np.testing.assert_array_equal(tall, pixels.swapaxes(2, 3))


def test_crops_refuses_bad_frames_and_numbers() -> None:
    config = types.SimpleNamespace(crop_size=32)
    for views in (1, 3):
        with pytest.raises(InputError, match="frames are float32; right is uint8"):
            crops(np.zeros((1, 40, 50, 3), np.float32), config, views)
    with pytest.raises(InputError, match="views = 0; it must be 1 or more"):
        crops(np.zeros((1, 40, 50, 3), np.uint8), config, 0)
