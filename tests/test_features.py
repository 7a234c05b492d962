"""Dense features, their colours, and the files that show them."""

import dataclasses
import errno
import io
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import official
import pytest
from commandline import listing, load_npz
from models import random_params, random_video, relative_error, tiny_config
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from videofiles import moving_frames, write_video

import jvjepa
from jvjepa import ModelConfig, cli, video
from jvjepa.errors import InputError
from jvjepa.features import PcaImage, features, features_command, pca_colours
from jvjepa.pictures import picture_clip, read_picture

Paths = dict[str, Path]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def build(config: ModelConfig, params: jvjepa.typing.Params | None = None) -> jvjepa.Model:
    encoder = jvjepa.Encoder(config.encoder)
    params = random_params(encoder) if params is None else params
    return jvjepa.Model(config=config, encoder=encoder, params={"encoder": params}, source=None)


V2 = ModelConfig(encoder=dataclasses.replace(tiny_config(num_layers=2), frames_per_clip=8))
TWO_LAYERS = dataclasses.replace(official.TEACHER.encoder, num_layers=2, levels=(0, 1))
V2_1 = ModelConfig(encoder=TWO_LAYERS)


def apply(model: jvjepa.Model, clip: NDArray[np.float32]) -> NDArray[np.float32]:
    encode = jax.jit(model.encoder.apply)
    return np.asarray(encode({"params": model.params["encoder"]}, clip[None])[0])


# Features


@pytest.mark.parametrize("config", [V2, V2_1], ids=["2.0", "2.1"])
def test_features_are_the_tokens_in_their_places(config: ModelConfig) -> None:
    model, clip = build(config), random_video(6, 48, 80)
    tokens = apply(model, clip)

    grid = features(model, clip)

    assert grid.dtype == np.float32
    assert grid.shape == (3, 3, 5, config.encoder.hidden_size)
    expected = [
        [[tokens[15 * t + 5 * h + w] for w in range(5)] for h in range(3)] for t in range(3)
    ]
    assert relative_error(grid, np.array(expected)) <= 1e-5


def test_features_of_a_picture_are_metas() -> None:
    data = official.data("vjepa2_1_tiny_teacher")
    params = official.encoder(official.weights("vjepa2_1_tiny_teacher.pt", "target_encoder"))
    model = build(ModelConfig(encoder=official.TEACHER.encoder), params)
    for image, tokens in zip(official.video(data["in.image"]), data["out.image"], strict=True):
        grid = features(model, image)
        assert grid.shape == (1, 4, 4, 32)
        assert relative_error(grid.reshape(16, 32), tokens) <= 1e-5


def test_features_compile_once(compilations: Any) -> None:
    model, clip = build(V2), random_video(10, 64, 64)
    features(model, clip)
    before = compilations()
    features(model, 2 * clip)
    assert compilations() == before


def test_features_refuse_what_cannot_be_encoded() -> None:
    with pytest.raises(InputError, match="T = 3 frames"):
        features(build(V2), random_video(3, 32, 32))


# Colours


def spread(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    """Features whose variance differs from direction to direction."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * np.geomspace(3, 0.1, shape[-1]) + rng.normal(size=shape[-1])


def scene(
    rows: slice, columns: slice, *, distance: float = 8, noise: float = 1, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A grid [2, 8, 10, 16] with an object of other features, and where that is."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((2, 8, 10), np.bool_)
    mask[:, rows, columns] = True
    direction = rng.normal(size=16)
    grid = rng.normal(size=(*mask.shape, 16)) * noise + 5 * rng.normal(size=16)
    grid[mask] += distance * direction / np.linalg.norm(direction)
    return grid.astype(np.float32), mask


def colours_by_svd(tokens: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the definition says: colours [N, 3] from 0 to 255, and shares of the variance."""
    centred = tokens - tokens.mean(0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    colours = []
    for scores in (left * lengths).T[:3]:
        scores = scores * np.sign(scores[np.abs(scores).argmax()])
        low, high = np.quantile(scores, [0.01, 0.99])
        colours.append(255 * np.clip((scores - low) / (high - low), 0, 1))
    return np.stack(colours, -1), (lengths**2 / (lengths**2).sum())[:3]


@pytest.mark.parametrize("shape", [(3, 4, 5, 12), (1, 5, 7, 40), (2, 9, 8, 3)])
def test_colours_are_the_principal_components(shape: tuple[int, ...]) -> None:
    grid = spread(*shape).astype(np.float32)
    expected, shares = colours_by_svd(grid.reshape(-1, shape[-1]).astype(np.float64))

    image = pca_colours(grid, foreground=False)

    assert image.colours.dtype == np.uint8
    assert image.colours.shape == (*shape[:3], 3)
    assert image.foreground.all()
    np.testing.assert_allclose(image.colours.reshape(-1, 3), expected, rtol=0, atol=0.5 + 1e-6)
    np.testing.assert_allclose(image.explained, shares, rtol=1e-9)
    assert image.explained[0] > image.explained[1] > image.explained[2] > 0


def test_colours_of_the_foreground_are_its_own_components() -> None:
    grid, mask = scene(slice(2, 7), slice(3, 8))
    expected, shares = colours_by_svd(grid[mask].astype(np.float64))

    image = pca_colours(grid)

    np.testing.assert_array_equal(image.foreground, mask)
    np.testing.assert_allclose(image.colours[mask], expected, rtol=0, atol=0.5 + 1e-6)
    np.testing.assert_allclose(image.explained, shares, rtol=1e-9)
    assert not image.colours[~mask].any()


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(3, 5), slice(4, 6)),  # small
        (slice(1, 7), slice(1, 9)),  # more than half of all
        (slice(0, 6), slice(3, 8)),  # at the border
        (slice(3, 4), slice(2, 8)),  # a line
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_foreground_is_the_object(rows: slice, columns: slice, seed: int) -> None:
    grid, mask = scene(rows, columns, distance=30, seed=seed)
    np.testing.assert_array_equal(pca_colours(grid).foreground, mask)
    np.testing.assert_array_equal(pca_colours(-grid).foreground, mask)
    np.testing.assert_array_equal(pca_colours(grid[:, ::-1]).foreground, mask[:, ::-1])


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_separates_best(seed: int) -> None:
    """With one channel the scores are the features: every split is tried here."""
    rng = np.random.default_rng(seed)
    values = np.round(rng.gamma(1.0, size=(2, 5, 6)) * 5) / 5  # with ties
    splits = np.unique(values)[:-1]
    within = [
        sum(np.sum((side - side.mean()) ** 2) for side in (values[values <= s], values[values > s]))
        for s in splits
    ]
    above = values > splits[int(np.argmin(within))]
    border = np.ones(values.shape, np.bool_)
    border[:, 1:-1, 1:-1] = False

    mask = pca_colours(values[..., None]).foreground

    assert np.array_equal(mask, above) or np.array_equal(mask, ~above)
    assert (mask & border).sum() <= (~mask & border).sum()


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_of_the_features_changes_nothing(foreground: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid, _ = scene(slice(2, 6), slice(3, 8), seed=seed)
    grid = grid.astype(np.float64)
    rotation, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    image = pca_colours(grid, foreground=foreground)
    for other in (grid @ rotation, 3 * grid @ rotation + rng.normal(size=16)):
        turned = pca_colours(other, foreground=foreground)
        np.testing.assert_array_equal(turned.foreground, image.foreground)
        np.testing.assert_allclose(turned.explained, image.explained, rtol=1e-9)
        assert np.abs(turned.colours.astype(int) - image.colours.astype(int)).max() <= 1


# Colours of what has none


def grey(image: PcaImage) -> None:
    assert (image.colours[image.foreground] == 128).all()
    assert not image.colours[~image.foreground].any()
    assert image.explained.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e8, 1e-8])
def test_equal_features_are_grey(foreground: bool, value: float) -> None:
    grid = np.full((2, 3, 4, 8), value, np.float32)
    image = pca_colours(grid, foreground=foreground)
    assert image.foreground.all()
    grey(image)
    rounding = np.random.default_rng(0).integers(-1, 2, grid.shape) * np.float32(1e-7 * abs(value))
    grey(pca_colours(grid + rounding.astype(np.float32), foreground=foreground))


def test_a_foreground_of_one_patch_is_grey() -> None:
    grid = np.zeros((1, 5, 5, 8), np.float32)
    grid[0, 2, 2] = 1.0
    image = pca_colours(grid)
    assert np.argwhere(image.foreground).tolist() == [[0, 2, 2]]
    grey(image)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8), (1, 1, 2, 8), (1, 3, 1, 8), (3, 1, 1, 1), (1, 2, 2, 2)]
)
@pytest.mark.parametrize("foreground", [True, False])
def test_few_patches_and_few_channels(shape: tuple[int, ...], foreground: bool) -> None:
    image = pca_colours(spread(*shape), foreground=foreground)
    assert image.foreground.any()
    rank = min(image.foreground.sum() - 1, shape[-1], 3)
    assert (image.explained[:rank] > 0).all()
    assert (image.explained[rank:] == 0).all()
    assert (image.colours[image.foreground][:, rank:] == 128).all()
    if rank:
        assert image.explained.sum() <= 1 + 1e-9
        assert {0, 255} <= set(image.colours[image.foreground][:, 0].tolist())


def test_outliers_do_not_take_the_range() -> None:
    grid = np.linspace(0, 1, 400).reshape(1, 20, 20, 1)
    plain = pca_colours(grid, foreground=False).colours
    grid[0, 7, 7] = 1e4
    wild = pca_colours(grid, foreground=False).colours
    assert wild[0, 7, 7].tolist() == [255, 128, 128]
    assert np.delete(wild[..., 0], 147).std() > 0.9 * plain[..., 0].std()
    few = np.zeros((1, 20, 20, 1))
    few[0, 7, 7] = 1.0  # all percentiles are equal
    colours = pca_colours(few, foreground=False).colours
    assert colours[0, 7, 7].tolist() == [255, 128, 128]
    assert (np.delete(colours[..., 0], 147) == 0).all()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (np.zeros((2, 3, 4), np.float32), r"grid is float32 \[2, 3, 4\]; it must be float \[t, h"),
        (np.zeros((1, 3, 3, 4), np.int64), "grid is int64"),
        (np.zeros((0, 3, 3, 4), np.float32), r"\[0, 3, 3, 4\]"),
        (np.full((1, 3, 3, 4), np.nan, np.float32), "grid holds NaN or infinite values"),
        (np.full((1, 3, 3, 4), np.inf, np.float32), "grid holds NaN or infinite values"),
    ],
)
def test_grids_that_are_refused(grid: NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pca_colours(grid)


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("2.0", V2), ("2.1", V2_1)):
        jvjepa.save(folder / name, build(config))
    return {name: folder / name for name in ("2.0", "2.1")}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "picture.png"
    path.parent.mkdir()
    Image.fromarray(moving_frames(1)[0]).save(path)
    return path


def run(model: Path, source: Path, **options: Any) -> str:
    """What the command prints."""
    text = io.StringIO()
    console = Console(file=text, soft_wrap=True, highlight=False, markup=False, emoji=False)
    command = cli.Features(model=model, source=str(source), **options)
    assert features_command(command, console) == 0
    return text.getvalue()


def shown(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The frames whose normalised pixels these are."""
    return np.round(255 * (pixels * STD + MEAN)).astype(np.uint8)


def enlarged(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.kron(colours, np.ones((16, 16, 1), np.uint8))


def test_npz_of_a_video(models: Paths, clips: Paths, tmp_path: Path) -> None:
    options = {"num_frames": 10, "fps": 7.0, "start": 0.2, "end": 1.8}
    frames, times = video.read(clips["mp4"], **options)
    model = jvjepa.load(models["2.0"])
    tokens = apply(model, video.preprocess(frames, V2))

    text = run(models["2.0"], clips["mp4"], npz=tmp_path / "f.npz", **options)

    assert text.startswith("10 frames, 5 x 4 x 4 x 48 features, ")
    assert text.endswith(f"wrote {tmp_path / 'f.npz'}\n")
    found = load_npz(tmp_path / "f.npz")
    assert found.keys() == {"features", "times"}
    assert found["features"].dtype == np.float32
    assert found["features"].shape == (5, 4, 4, 48)
    assert relative_error(found["features"].reshape(80, 48), tokens) <= 1e-5
    np.testing.assert_array_equal(found["times"], times)
    assert listing(tmp_path) == ["f.npz"]


def test_a_picture(models: Paths, picture: Path, tmp_path: Path) -> None:
    clip = picture_clip(V2_1, picture)
    tokens = apply(jvjepa.load(models["2.1"]), clip)

    text = run(models["2.1"], picture, npz=tmp_path / "f.npz", pca=tmp_path / "f.png")

    assert text.startswith("a picture, 1 x 4 x 4 x 32 features, ")
    found = load_npz(tmp_path / "f.npz")
    assert found["features"].shape == (1, 4, 4, 32)
    assert relative_error(found["features"].reshape(16, 32), tokens) <= 1e-5
    assert found["times"].tolist() == [0.0]
    image = pca_colours(found["features"])
    sheet = read_picture(tmp_path / "f.png")[0]
    np.testing.assert_array_equal(sheet[:, :64], shown(clip)[0])
    np.testing.assert_array_equal(sheet[:, 64:], enlarged(image.colours[0]))
    shares = ", ".join(f"{share:.1%}" for share in image.explained)
    covered = f"{image.foreground.mean():.1%} of the patches, and of their variance {shares}"
    assert f"colours: {covered}\nwrote {tmp_path / 'f.png'}\n" in text
    assert listing(tmp_path) == ["f.npz", "f.png", "in"]


def test_a_picture_for_a_model_of_videos(models: Paths, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a picture, and this model \(V-JEPA 2\) was trained"):
        run(models["2.0"], picture, npz=tmp_path / "f.npz")
    twice = np.repeat(picture_clip(V2, picture, repeat_frame=True), 2, axis=0)

    run(models["2.0"], picture, npz=tmp_path / "f.npz", repeat_frame=True)

    grid = load_npz(tmp_path / "f.npz")["features"]
    assert grid.shape == (1, 4, 4, 48)
    tokens = apply(jvjepa.load(models["2.0"]), twice)
    assert relative_error(grid.reshape(16, 48), tokens) <= 1e-5


@pytest.mark.parametrize(("count", "columns", "foreground"), [(2, 1, True), (10, 2, False)])
def test_a_sheet_of_a_video(
    models: Paths, clips: Paths, tmp_path: Path, count: int, columns: int, foreground: bool
) -> None:
    frames, _ = video.read(clips["mkv"], num_frames=count)
    pixels = video.preprocess(frames, V2)
    out = {"pca": tmp_path / "f.png", "npz": tmp_path / "f.npz"}

    run(models["2.0"], clips["mkv"], num_frames=count, foreground=foreground, **out)

    colours = pca_colours(load_npz(out["npz"])["features"], foreground=foreground).colours
    sheet = read_picture(out["pca"])[0]
    tubelets = count // 2
    rows = -(-tubelets // columns)
    assert sheet.shape == (64 * rows, 128 * columns, 3)
    for place in range(rows * columns):
        top, left = 64 * (place // columns), 128 * (place % columns)
        cell = sheet[top : top + 64, left : left + 128]
        if place < tubelets:
            np.testing.assert_array_equal(cell[:, :64], shown(pixels)[2 * place])
            np.testing.assert_array_equal(cell[:, 64:], enlarged(colours[place]))
        else:
            assert not cell.any()


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"num_frames": 10}, np.arange(10) * 6 / 30),
        ({"num_frames": 10, "fps": 60.0}, np.arange(10) / 60),  # each frame twice
        ({"num_frames": 10, "fps": 7.0, "start": 0.5}, np.arange(10) / 7),
    ],
)
def test_a_film(
    models: Paths, clips: Paths, tmp_path: Path, options: dict[str, Any], times: NDArray[np.float64]
) -> None:
    frames, _ = video.read(clips["mp4"], **options)
    pixels = video.preprocess(frames, V2)
    out = {"pca": tmp_path / "f.mp4", "npz": tmp_path / "f.npz"}

    run(models["2.0"], clips["mp4"], **out, **options)

    colours = pca_colours(load_npz(out["npz"])["features"]).colours
    film, seconds = video.read(out["pca"])
    assert film.shape == (len(frames), 64, 128, 3)
    np.testing.assert_allclose(seconds, times, rtol=0, atol=1e-4)
    brightness = [0.2126, 0.7152, 0.0722]  # which is not subsampled, as colour is
    print(
        "XX",
        np.abs((film[:, :, :64] - shown(pixels).astype(float)) @ brightness).mean(),
        np.abs((film[:, :, :64] - shown(pixels).astype(float)) @ brightness).max(),
    )
    centres = film[:, 8::16, 72::16].astype(int)
    assert np.abs((film[:, :, :64] - shown(pixels).astype(float)) @ brightness).mean() <= 3
    centres = film[:, 8::16, 72::16].astype(int)
    assert np.abs(centres - np.repeat(colours, 2, axis=0).astype(int)).max() <= 6
    assert listing(tmp_path) == ["f.mp4", "f.npz"]


def test_bfloat16(models: Paths, picture: Path, tmp_path: Path) -> None:
    run(models["2.1"], picture, npz=tmp_path / "a.npz")
    run(models["2.1"], picture, npz=tmp_path / "b.npz", dtype="bfloat16", attention="chunked")
    exact, rounded = (load_npz(tmp_path / name)["features"] for name in ("a.npz", "b.npz"))
    assert rounded.dtype == np.float32
    assert 1e-5 < relative_error(rounded, exact) < 0.1


def test_outputs_that_are_refused(
    models: Paths, picture: Path, clips: Paths, tmp_path: Path
) -> None:
    model = models["2.1"]
    with pytest.raises(InputError, match="nothing to write; give --pca, --npz or both"):
        run(model, picture)
    with pytest.raises(InputError, match="--no-foreground is for --pca; give that too"):
        run(model, picture, npz=tmp_path / "f.npz", foreground=False)
    with pytest.raises(InputError, match=r"f\.jpg must end in \.png or \.mp4"):
        run(model, picture, pca=tmp_path / "f.jpg")
    with pytest.raises(InputError, match=r"f\.npy must end in \.npz"):
        run(model, picture, npz=tmp_path / "f.npy")
    with pytest.raises(
        InputError, match=r"f\.mp4 must end in \.png, because .*picture\.png is a p"
    ):
        run(model, picture, pca=tmp_path / "f.mp4")
    with pytest.raises(InputError, match="is not a folder; make it first"):
        run(model, picture, pca=tmp_path / "gone" / "f.png")
    with pytest.raises(InputError, match="is no picture, and only those need --repeat-frame"):
        run(model, clips["mp4"], pca=tmp_path / "f.png", repeat_frame=True)
    with pytest.raises(InputError, match="--num-frames, --fps, --start and --end choose frames"):
        run(model, picture, pca=tmp_path / "f.png", num_frames=1)
    assert listing(tmp_path) == ["in"]


def test_outputs_are_replaced_only_with_force(models: Paths, picture: Path, tmp_path: Path) -> None:
    for name in ("f.png", "f.npz"):
        (tmp_path / name).write_text("precious")
    out = {"pca": tmp_path / "f.png", "npz": tmp_path / "f.npz"}
    for key, path in out.items():
        with pytest.raises(InputError, match="exists; choose another name or pass --force"):
            run(models["2.1"], picture, **{key: path})
        assert path.read_text() == "precious"
    run(models["2.1"], picture, **out, force=True)
    assert read_picture(out["pca"]).shape == (1, 64, 128, 3)
    assert load_npz(out["npz"])["features"].shape == (1, 4, 4, 32)


def test_a_film_of_a_variable_frame_rate(models: Paths, tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.13, 0.5, 0.9, 0.95, 1.0, 1.8, 2.0, 2.7]
    source = write_video(tmp_path / "v.mp4", moving_frames(10), times=times)

    run(models["2.0"], source, pca=tmp_path / "f.mp4", num_frames=10)

    np.testing.assert_allclose(video.read(tmp_path / "f.mp4")[1], times, rtol=0, atol=1e-4)
    with av.open(str(tmp_path / "f.mp4")) as container:
        track = container.streams.video[0]
        assert float(track.duration * track.time_base) == pytest.approx(2.7 + 0.7, abs=1e-3)


@pytest.mark.parametrize("name", ["f.png", "f.mp4"])
def test_a_full_disk_leaves_nothing(
    models: Paths, clips: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def write_half(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left") as caught:
        run(models["2.0"], clips["mp4"], pca=tmp_path / name, num_frames=10)
    assert caught.value.filename == str(tmp_path / name)
    assert listing(tmp_path) == []
