"""Which input the PyTorch port takes, and which it refuses."""

from collections.abc import Callable

import numpy as np
import official
import pytest
from models import random_video
from official import frames, model, random_tokens

from jvjepa.convert.official import Official
from jvjepa.errors import InputError

V2, TEACHER = "vjepa2_tiny", "vjepa2_1_tiny_teacher"


def bad_prediction(**changes: object) -> None:
    tokens, ids = random_tokens(1, 2, 32), np.array([[0, 1]])
    good = {"context": tokens, "context_ids": ids, "target_ids": ids + 2, "grid": (1, 2, 2)}
    model(V2).predict(**{**good, **changes})


def bad_actions(**changes: object) -> None:
    tokens, actions, states = frames(2, 2, 2)
    good = {"tokens": tokens, "actions": actions, "states": states, "grid": (2, 2)}
    model(V2).next_tokens(**{**good, **changes})


def test_the_good_ones_are_good() -> None:
    bad_prediction()
    bad_actions()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Official(official.V2, {}, rounding="int8"), "rounding = 'int8'"),
        (lambda: model(V2).tokens(random_video(1, 2, 64, 64)[0]), r"video is float32 \[2, 64"),
        (lambda: model(V2).tokens(np.zeros((1, 2, 16, 16, 3))), "video is float64"),
        (lambda: model(V2).tokens(np.zeros((1, 3, 2, 16, 16), np.float32)), r"any, 3\]"),
        (lambda: model(V2).tokens(random_video(1, 3, 16, 16)), "video has T = 3;"),
        (lambda: model(V2).tokens(random_video(1, 0, 16, 16)), "video has T = 0;"),
        (lambda: model(V2).layers(random_video(1, 2, 20, 16)), "video has H = 20;"),
        (lambda: model(TEACHER).levels(random_video(1, 1, 16, 17)), "video has W = 17;"),
        (lambda: model(V2).masked(random_video(1, 2, 16, 16), np.array([[1]])), "from 1 to 1"),
        (lambda: model(V2).masked(random_video(1, 2, 16, 16), np.array([[-1]])), "from -1 to"),
        (lambda: model(V2).masked(random_video(1, 2, 16, 16), np.array([0])), r"keep is int64"),
        (lambda: model(V2).masked(random_video(1, 2, 16, 16), np.array([[0.0]])), "be int"),
        (lambda: bad_prediction(context=random_tokens(1, 2, 33)), r"any, 32\]"),
        (lambda: bad_prediction(context=random_tokens(1, 3, 32)), "context_ids is int64"),
        (lambda: bad_prediction(context_ids=np.array([[0, 4]])), "context_ids holds ids from 0"),
        (lambda: bad_prediction(target_ids=np.array([[0], [1]])), r"must be int \[1, any\]"),
        (lambda: bad_prediction(target_ids=np.array([[4]])), "this clip has tokens 0 to 3"),
        (lambda: bad_prediction(mask_index=10), "no weight 'mask_tokens.10'"),
        (lambda: bad_prediction(modality="sound"), "modality = 'sound'"),
        (lambda: model(V2).classify(random_tokens(1, 2, 31)), "tokens is float32"),
        (lambda: bad_actions(tokens=random_tokens(2, 7, 32)), r"must be float32 \[2, 8, 32\]"),
        (lambda: bad_actions(actions=random_tokens(2, 2, 6)), r"must be float32 \[any, any, 7\]"),
        (lambda: bad_actions(states=random_tokens(2, 1, 7)), r"states is float32 \[2, 1, 7\]"),
    ],
)
def test_bad_input_is_refused(run: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run()


def test_read_only_and_reversed_arrays_are_taken() -> None:
    clip = random_video(1, 2, 32, 32)
    flipped = np.ascontiguousarray(clip[:, ::-1])
    expected = model(V2).tokens(flipped)
    clip.flags.writeable = False
    assert np.array_equal(model(V2).tokens(clip[:, ::-1]), expected)
