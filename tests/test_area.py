import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import compiled, random_params, random_video, relative_error, tiny_config
from numpy.typing import NDArray

from jvjepa import Encoder, EncoderConfig, area, attention, gating, rope, streaming
from jvjepa.area import Tiling, parse_areas
from jvjepa.config import ModelConfig
from jvjepa.encoder import forward_flops
from jvjepa.errors import ConfigError, InputError
from jvjepa.layers import Block, RopeTables
from jvjepa.parameters import unstack_layers
from jvjepa.typing import Params

TOLERANCE = 1e-5
BATCH = 2


def _config(temporal: int = 2, spatial: int = 2, **fields: Any) -> EncoderConfig:
    fields = {"area_layers": (0, 1), **fields}
    splits = {"area_temporal_splits": temporal, "area_spatial_splits": spatial}
    return dataclasses.replace(tiny_config(num_layers=2), **splits, **fields)


def _model(config: EncoderConfig, **how: Any) -> tuple[Encoder, Params]:
    plain = Encoder(dataclasses.replace(config, area_layers=(0, 0)))  # it has the same parameters
    return Encoder(config, **how), random_params(plain)


def _video(t: int, h: int, w: int, batch: int = BATCH) -> NDArray[np.float32]:
    return random_video(batch, 2 * t, 16 * h, 16 * w)


def _areas(grid: tuple[int, int, int], config: EncoderConfig) -> NDArray[np.int64]:
    """The area of each token, token by token."""
    t, h, w = grid
    late, low = config.area_temporal_splits, config.area_spatial_splits
    areas = []
    for tubelet in range(t):
        for row in range(h):
            first = min(tubelet // (t // late), late - 1)
            areas += [first * low + min(row // (h // low), low - 1)] * w
    return np.array(areas)


def _brute_force(
    config: EncoderConfig,
    params: Params,
    video: NDArray[np.float32],
    keep: NDArray[np.int64] | None = None,
    valid: NDArray[np.bool_] | None = None,
    window: int | None = None,
) -> jax.Array:
    """Full attention under a mask, layer by layer; what each layer gives, [L, B, M, D]."""
    grid = (video.shape[1] // 2, video.shape[2] // 16, video.shape[3] // 16)
    every = np.tile(np.arange(math.prod(grid)), (len(video), 1))
    ids = every if keep is None else keep
    age = (ids // (grid[1] * grid[2]))[:, :, None] - (ids // (grid[1] * grid[2]))[:, None, :]
    seen = np.ones(age.shape, bool) if window is None else (age >= 0) & (age < window)
    seen = seen if valid is None else seen & valid[:, None, :]
    area = _areas(grid, config)[ids]
    together = seen & (area[:, :, None] == area[:, None, :])
    return _masked_layers(config, params, video, ids, seen[:, None], together[:, None])


@functools.partial(jax.jit, static_argnums=0)
def _masked_layers(
    config: EncoderConfig,
    params: Params,
    video: jax.Array,
    ids: jax.Array,
    seen: jax.Array,
    together: jax.Array,
) -> jax.Array:
    plain = dataclasses.replace(config, area_layers=(0, 0))
    x = Encoder(plain).apply({"params": params}, video, method="embed_patches")
    x = jnp.take_along_axis(x, ids[..., None], axis=1)
    grid = (side // 16 for side in video.shape[2:4])
    places = rope.positions(ids, rope.layout(plain, *grid))
    tables = RopeTables(*rope.tables(places, config.head_width, config.rope))
    block = Block(config.block, jnp.float32, jnp.float32, "xla")
    layers = []
    for i in range(config.num_layers):
        here = config.area_layers[0] <= i < config.area_layers[1]
        mask = together if here else seen
        layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        if here:  # scaling before a projection is scaling its kernel
            proj = layer["attention"]["proj"]
            kernel = proj["kernel"] * config.area_residual_scale
            layer["attention"]["proj"] = {**proj, "kernel": kernel}
        x, _ = block.apply({"params": layer}, x, None, tables, mask, None)
        layers.append(x)
    return jnp.stack(layers)


def _normed(encoder: Encoder, params: Params, x: jax.Array) -> jax.Array:
    return jax.jit(lambda p, x: encoder.apply({"params": p}, x, method="_last_norm"))(params, x)


GRIDS = [
    ((4, 4, 3), (2, 2)),
    ((5, 3, 2), (2, 2)),  # neither side divides: four sizes
    ((3, 4, 2), (3, 1)),
    ((2, 4, 3), (1, 4)),
]


@pytest.mark.parametrize(("grid", "splits"), GRIDS)
def test_areas_of_a_whole_clip(grid: tuple, splits: tuple) -> None:
    config = _config(*splits)
    encoder, params = _model(config)
    video = _video(*grid)
    expected = _normed(encoder, params, _brute_force(config, params, video)[-1])
    assert relative_error(compiled(encoder, params, video), expected) <= TOLERANCE


@pytest.mark.parametrize(("attention", "scan"), [("xla", True), ("chunked", False)])
def test_every_backend_with_and_without_a_loop_over_layers(attention: str, scan: bool) -> None:
    config = _config(area_layers=(1, 2))
    encoder, params = _model(config, attention=attention, scan=scan)
    video = _video(5, 3, 2)
    expected = _normed(Encoder(config), params, _brute_force(config, params, video)[-1])
    own = params if scan else unstack_layers(params)
    assert relative_error(compiled(encoder, own, video), expected) <= TOLERANCE


@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_comes_back_in_the_order_of_the_clip(scan: bool) -> None:
    config = _config()
    encoder, params = _model(config, scan=scan)
    own, video = params if scan else unstack_layers(params), _video(5, 3, 2)
    outputs = compiled(encoder, own, video, method="layers")
    expected = _brute_force(config, params, video)
    assert relative_error(outputs.layers[1:], expected) <= TOLERANCE
    patches = compiled(encoder, own, video, method="embed_patches")
    assert relative_error(outputs.layers[0], patches) <= TOLERANCE


def _version_2_1(**fields: Any) -> EncoderConfig:
    how = {"rope": "interleaved", "interpolate": True, "image_tokenizer": True, "levels": (0, 1)}
    return _config(**how, **fields)


def test_version_2_1_with_levels() -> None:
    config = _version_2_1()
    encoder, params = _model(config)
    video = _video(4, 5, 3)
    expected = _brute_force(config, params, video)
    found = compiled(encoder, params, video, method="levels")
    for level, layer in enumerate(config.levels):
        norm = encoder.bind({"params": params}).norms
        assert relative_error(found[level], norm(expected[layer], level)) <= TOLERANCE


def test_one_area_is_full_attention() -> None:
    config = _config(1, 1, area_layers=(0, 2))
    encoder, params = _model(config)
    video = _video(3, 3, 2)
    full = Encoder(dataclasses.replace(config, area_layers=(0, 0)))
    np.testing.assert_array_equal(compiled(encoder, params, video), compiled(full, params, video))
    keep = _keep(np.random.default_rng(0), 18, 7)
    error = relative_error(
        compiled(encoder, params, video, keep), compiled(full, params, video, keep)
    )
    assert error <= TOLERANCE


def test_the_scale_is_that_of_the_attention_before_its_projection() -> None:
    config = _config(area_residual_scale=0.5)
    encoder, params = _model(config)
    video = _video(4, 4, 2)
    expected = _normed(encoder, params, _brute_force(config, params, video)[-1])
    assert relative_error(compiled(encoder, params, video), expected) <= TOLERANCE
    unscaled = Encoder(dataclasses.replace(config, area_residual_scale=1.0))
    assert relative_error(compiled(unscaled, params, video), expected) > 1e-2


def test_areas_see_nothing_of_each_other() -> None:
    config = _config(area_layers=(0, 2))
    encoder, params = _model(config)
    video = _video(4, 4, 2)
    changed = video.copy()
    changed[:, 4:, 32:] += 1.0  # the last area
    before, after = (compiled(encoder, params, x) for x in (video, changed))
    last = _areas((4, 4, 2), config) == 3
    np.testing.assert_array_equal(before[:, ~last], after[:, ~last])
    assert np.all(np.any(np.asarray(before != after)[:, last], axis=-1))


def _keep(rng: np.random.Generator, tokens: int, kept: int) -> NDArray[np.int64]:
    return np.stack([rng.permutation(tokens)[:kept] for _ in range(BATCH)])


def _lying(config: EncoderConfig, grid: tuple, shares: list[int]) -> NDArray[np.int64]:
    """Ids of which `shares` lie in each area, shuffled, other ones in each sample."""
    rng, areas = np.random.default_rng(1), _areas(grid, config)
    rows = []
    for _ in range(BATCH):
        parts = [rng.permutation(np.flatnonzero(areas == a))[:n] for a, n in enumerate(shares)]
        rows.append(rng.permutation(np.concatenate(parts)))
    return np.stack(rows)


EVENLY_OR_NOT = [[4, 4, 4, 4], [6, 5, 4, 1], [8, 8, 0, 0], [0, 16, 0, 0]]


@pytest.mark.parametrize("attention", ["xla", "chunked"])
@pytest.mark.parametrize("lyings", [EVENLY_OR_NOT, [[1, 1, 1, 1]], [[16, 16, 16, 16]]])
def test_areas_of_visible_tokens(lyings: list[list[int]], attention: str) -> None:
    grid, config = (4, 4, 4), _config()
    encoder, params = _model(config, attention=attention)
    video = _video(*grid)
    run = jax.jit(lambda p, *x: encoder.apply({"params": p}, *x))
    for shares in lyings:  # one program for all: it takes another branch for each
        keep = _lying(config, grid, shares)
        expected = _normed(encoder, params, _brute_force(config, params, video, keep)[-1])
        assert relative_error(run(params, video, keep), expected) <= TOLERANCE


def test_visible_tokens_are_padded_where_clips_lie_on_several_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(area, "attention_over_spans")
    monkeypatch.setattr(area, "is_one_cpu", lambda: False)
    monkeypatch.setattr(attention, "is_one_cpu", lambda: False)
    grid, config = (4, 4, 4), _config()
    encoder, params = _model(config, attention="chunked")
    video, keep = _video(*grid), _lying(config, grid, [6, 5, 4, 1])
    expected = _normed(encoder, params, _brute_force(config, params, video, keep)[-1])
    found = jax.jit(lambda p, *x: encoder.apply({"params": p}, *x))(params, video, keep)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("attention", "scan"), [("chunked", True), ("xla", False)])
def test_random_masks_with_padding_on_an_uneven_grid(attention: str, scan: bool) -> None:
    grid, config = (5, 5, 3), _config(2, 3, area_layers=(1, 2))
    encoder, params = _model(config, attention=attention, scan=scan)
    own = params if scan else unstack_layers(params)
    video, rng = _video(*grid), np.random.default_rng(2)
    run = jax.jit(lambda p, *x: encoder.apply({"params": p}, *x))
    for kept in range(3):
        keep = _keep(rng, 75, 29)
        valid = rng.random(keep.shape) < (0.9, 0.4, 0.1)[kept]
        valid[:, 0] = True
        expected = _brute_force(config, params, video, keep, valid)[-1]
        expected = _normed(Encoder(config), params, expected)
        found = run(own, video, keep, valid)
        assert np.isfinite(found).all()
        assert relative_error(found[valid], expected[valid]) <= TOLERANCE


@pytest.mark.parametrize(("temporal", "sparse"), [(1, False), (2, False), (2, True)])
def test_areas_under_the_banded_mask(temporal: int, sparse: bool) -> None:
    grid, config = (5, 4, 2), _config(temporal)
    encoder, params = _model(config)
    video = _video(*grid)
    keep = _keep(np.random.default_rng(3), 40, 17) if sparse else None
    expected = _brute_force(config, params, video, keep, window=2)[-1]
    found = compiled(encoder, params, video, keep, window=2)
    assert relative_error(found, _normed(encoder, params, expected)) <= TOLERANCE


@pytest.mark.parametrize(
    ("sparse", "attention"), [(False, "chunked"), (True, "chunked"), (True, "xla")]
)
def test_gradients(sparse: bool, attention: str) -> None:
    grid, config = (4, 5, 2), _config(2, 2)
    encoder, params = _model(config, attention=attention)
    video, rng = jnp.asarray(_video(*grid)), np.random.default_rng(4)
    keep = _keep(rng, 40, 18) if sparse else None
    valid = rng.random(keep.shape) < 0.7 if sparse else None
    weight = rng.normal(size=(BATCH, 18 if sparse else 40, config.hidden_size))
    weight = np.where(True if valid is None else valid[..., None], weight, 0.0)
    weight = jnp.asarray(weight, jnp.float32)

    def loss(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda p, x: jnp.sum(weight * forward(p, x))

    def ours(params: Params, video: jax.Array) -> jax.Array:
        return encoder.apply({"params": params}, video, keep, valid)

    def theirs(params: Params, video: jax.Array) -> jax.Array:
        x = _brute_force(config, params, video, keep, valid)[-1]
        return _normed(encoder, params, x)

    found, expected = (
        jax.jit(jax.grad(loss(forward), argnums=(0, 1)))(params, video)
        for forward in (ours, theirs)
    )
    for (path, value), reference in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        error = np.max(np.abs(value - reference))
        # A softmax does not see what is added to all of its scores, so these are zero but for
        # rounding.
        is_key_bias = "key" in str(path) and "bias" in str(path)
        size = 100.0 if is_key_bias else np.max(np.abs(reference))
        assert error / size <= 5e-5, path


@pytest.mark.slow
def test_bfloat16_is_close_to_float32() -> None:
    config = _config()
    encoder, params = _model(config)
    video, keep = _video(4, 4, 2), _keep(np.random.default_rng(5), 32, 13)
    low = Encoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    low_params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for ids in (None, keep):
        found = compiled(low, low_params, video, ids)
        assert found.dtype == jnp.bfloat16
        found = found.astype(jnp.float32)
        assert relative_error(found, compiled(encoder, params, video, ids)) <= 5e-2


def test_other_masks_do_not_recompile(compilations: Callable[[], int]) -> None:
    grid, config = (4, 4, 4), _config()
    encoder, params = _model(config)
    video = _video(*grid)
    run = jax.jit(lambda p, x, keep: encoder.apply({"params": p}, x, keep))
    run(params, video, _lying(config, grid, [4, 4, 4, 4]))
    before = compilations()
    run(params, video, _lying(config, grid, [16, 0, 0, 0]))
    assert compilations() == before


@pytest.mark.parametrize(("positions", "scan"), [("absolute", True), ("window", False)])
def test_steps_with_row_areas_equal_the_full_forward(scan: bool, positions: str) -> None:
    config = _config(1, 2, rope="interleaved", area_layers=(0, 1))
    encoder, params = _model(config, scan=scan)
    own = params if scan else unstack_layers(params)
    video, window = _video(7, 3, 2), 3
    full = compiled(encoder, own, video, window=window)
    expected = _normed(
        Encoder(config), params, _brute_force(config, params, video, window=window)[-1]
    )
    assert relative_error(full, expected) <= TOLERANCE
    state = streaming.init_state(encoder, BATCH, window, height=48, width=32)
    for i in range(7):
        tubelet = video[:, 2 * i : 2 * i + 2]
        state, out = streaming.step(encoder, own, state, tubelet, positions=positions)
        # With a true rotation only distances count, so both positions are the full forward's.
        assert relative_error(out.tokens, full[:, 6 * i : 6 * i + 6]) <= TOLERANCE


def test_a_gated_stream_with_row_areas_is_the_ungated_one_of_what_it_encoded() -> None:
    config = _config(1, 2)
    encoder, params = _model(config)
    video = np.repeat(_video(3, 2, 2, batch=1), 2, axis=1)  # every tubelet is a still frame
    tubelets = video.reshape(1, 6, 2, 32, 32, 3).swapaxes(0, 1)
    tubelets = np.repeat(tubelets, 2, axis=0)  # and comes twice
    gate = gating.Gate(tau=1e-3)
    state = gating.init_state(encoder, 1, 3, height=32, width=32)
    _, outs = gating.scan(encoder, params, state, tubelets, gate)
    plain = streaming.init_state(encoder, 1, 3, height=32, width=32)
    _, expected = streaming.scan(encoder, params, plain, tubelets[::2])
    np.testing.assert_array_equal(outs.is_new[:, 0], [True, False] * 6)
    assert relative_error(outs.embedding[::2], expected.embedding) <= TOLERANCE


@pytest.mark.parametrize(("grid", "splits"), GRIDS)
def test_the_tiling_holds_every_token_once(grid: tuple, splits: tuple) -> None:
    tiling = Tiling(grid=grid, temporal_splits=splits[0], spatial_splits=splits[1])
    np.testing.assert_array_equal(np.sort(tiling.order), np.arange(np.prod(grid)))
    assert sum(areas for areas, _ in tiling.runs) == splits[0] * splits[1]
    areas = _areas(grid, _config(*splits))[tiling.order]
    start = 0
    for count, size in tiling.runs:
        for _ in range(count):
            assert len(set(areas[start : start + size])) == 1
            start += size


def test_a_config_with_areas_survives_json() -> None:
    config = ModelConfig(encoder=_config(1, 4, area_residual_scale=0.25))
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"area_layers": (0, 4)}, r"area_layers = \(0, 4\).*<= 3, the number of layers"),
        ({"area_layers": (2, 1)}, r"area_layers = \(2, 1\)"),
        ({"area_layers": (-1, 1)}, r"area_layers = \(-1, 1\)"),
        ({"area_layers": 2}, r"area_layers = 2"),
        ({"area_temporal_splits": 0}, r"area_temporal_splits = 0"),
        ({"area_spatial_splits": 1.5}, r"area_spatial_splits = 1.5"),
        ({"area_residual_scale": float("nan")}, r"area_residual_scale = nan.*finite"),
    ],
)
def test_impossible_areas_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny_config(), **fields)


@pytest.mark.parametrize(
    ("splits", "grid", "message"),
    [
        ((5, 2), (4, 4, 4), "area_temporal_splits = 5; this video has 4 tubelets, so take 1 to 4"),
        ((2, 3), (4, 2, 4), "area_spatial_splits = 3; this video has 2 rows of tokens"),
    ],
)
def test_more_splits_than_the_grid_has_are_refused(
    splits: tuple, grid: tuple, message: str
) -> None:
    encoder, params = _model(_config(*splits))
    with pytest.raises(InputError, match=message):
        encoder.apply({"params": params}, _video(*grid))


def test_an_image_has_no_areas_over_time() -> None:
    encoder, params = _model(_version_2_1())
    with pytest.raises(InputError, match="area_temporal_splits = 2; this video has 1 tubelets"):
        encoder.apply({"params": params}, random_video(1, 1, 64, 64))


def test_a_stream_with_areas_over_time_is_refused() -> None:
    encoder, _ = _model(_config(2, 2))
    with pytest.raises(InputError, match=r"area_temporal_splits = 2.*must be 1: areas over rows"):
        streaming.init_state(encoder, 1, 3)
    encoder, _ = _model(_config(1, 5))
    with pytest.raises(InputError, match="area_spatial_splits = 5; this video has 4 rows"):
        streaming.init_state(encoder, 1, 3)


def test_areas_take_their_share_of_the_operations() -> None:
    config = _config(2, 4, area_layers=(0, 1))
    full = dataclasses.replace(config, area_layers=(0, 0))
    scores = 2 * 2 * 64 * 64 * config.hidden_size  # of one layer: q kᵀ, and weights times v
    saved = forward_flops(full, 64, 64) - forward_flops(config, 64, 64)
    assert saved == scores - scores // 8


def test_the_words_of_the_command_line() -> None:
    assert parse_areas(None, None) is None
    config = tiny_config(num_layers=8)
    default = parse_areas("4x2", None).of(config)
    assert (default.area_spatial_splits, default.area_temporal_splits) == (4, 2)
    assert default.area_layers == (0, 6)
    assert parse_areas("2x1", "1:3").of(config).area_layers == (1, 3)


@pytest.mark.parametrize(
    ("area", "layers", "message"),
    [
        ("2", None, "--area 2; it must be SPATIALxTEMPORAL splits, as 2x2"),
        ("0x2", None, "--area 0x2; it must be SPATIALxTEMPORAL"),
        ("2x2", "3", "--area-layers 3; it must be START:END, as 0:18"),
        (None, "0:3", "--area-layers 0:3 needs --area"),
    ],
)
def test_other_words_are_refused(area: str | None, layers: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_areas(area, layers)


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"area_layers = \(0, 4\).*<= 3, the number of layers"):
        parse_areas("2x2", "0:4").of(tiny_config())
