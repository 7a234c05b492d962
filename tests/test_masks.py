import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvjepa import masks
from jvjepa.errors import ConfigError, InputError
from jvjepa.masks import IMAGE_MASKS, VIDEO_MASKS, Grid, MaskConfig, Masks

MANY_BLOCKS, LARGE_BLOCKS = VIDEO_MASKS
WIDE_RANGES = MaskConfig(
    num_blocks=3, spatial_scale=(0.1, 0.4), temporal_scale=(0.2, 0.9), aspect_ratio=(0.3, 2.0)
)
SMALL_BLOCK = MaskConfig(num_blocks=1, spatial_scale=(0.15, 0.15))
LARGE_BLOCK = MaskConfig(num_blocks=1, spatial_scale=(0.7, 0.7))
GRID = (3, 5, 7)


def _plain_masks(config: MaskConfig, grid: Grid, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The procedure of the original, one sample at a time, each with a block size of its own.

    Returns:
        contexts bool [count, t, h, w], and how many draws each took.
    """
    rng = np.random.default_rng(0)
    temporal = rng.uniform(*config.temporal_scale, count).tolist()
    spatial = rng.uniform(*config.spatial_scale, count).tolist()
    ratios = rng.uniform(*config.aspect_ratio, count).tolist()
    contexts, draws = np.zeros((count, *grid), bool), np.zeros(count, int)
    for i, ratio in enumerate(ratios):
        area = int(grid[1] * grid[2] * spatial[i])
        t = max(1, int(grid[0] * temporal[i]))
        h = min(round(math.sqrt(area * ratio)), grid[1])
        w = min(round(math.sqrt(area / ratio)), grid[2])
        places = [grid[0] - t + 1, grid[1] - h + 1, grid[2] - w + 1]
        while not contexts[i].any():
            contexts[i] = True
            for a, b, c in rng.integers(places, size=(config.num_blocks, 3)).tolist():
                contexts[i, a : a + t, b : b + h, c : c + w] = False
            draws[i] += 1
    return contexts, draws


def _draw(
    config: MaskConfig, grid: Grid, count: int, batch_size: int = 1, seed: int = 0
) -> np.ndarray:
    """Contexts bool [count, B, t, h, w] of as many keys, made from the ids."""

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = _whole_masks(key, config, grid, batch_size)
        return drawn.context_ids, drawn.target_ids

    ids = jax.vmap(draw)(jax.random.split(jax.random.key(seed), count))
    context, target = np.zeros((2, count, batch_size, math.prod(grid)), bool)
    for chosen, chosen_ids in zip((context, target), ids, strict=True):
        np.put_along_axis(chosen, np.asarray(chosen_ids), True, axis=2)
    assert np.array_equal(context, ~target)
    return context.reshape(count, batch_size, *grid)


def _whole_masks(key: jax.Array, config: MaskConfig, grid: Grid, batch_size: int) -> Masks:
    """Masks of which nothing is cut."""
    num_tokens = math.prod(grid)
    whole = {"num_context": num_tokens, "num_targets": num_tokens}
    return masks.sample(key, config, grid, batch_size, **whole)


def _extents(boxes: np.ndarray) -> np.ndarray:
    """Int [n, 3], the (t, h, w) of what is True in bool [n, t, h, w], which are whole boxes."""
    extents = np.stack([boxes.any(axis=a).sum(axis=1) for a in ((2, 3), (1, 3), (1, 2))], axis=1)
    assert np.array_equal(extents.prod(axis=1), boxes.sum(axis=(1, 2, 3)))
    return extents


# The statistics of the original


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        *((config, (1, 16, 16)) for config in (*VIDEO_MASKS, *IMAGE_MASKS)),
        (LARGE_BLOCKS, (1, 2, 2)),
        (WIDE_RANGES, (5, 6, 9)),
    ],
)
def test_masks_have_the_statistics_of_the_original(config: MaskConfig, grid: Grid) -> None:
    # The released blocks span all tubelets, so that one tubelet tells the share of any number.
    count = 20_000
    reference, _ = _plain_masks(config, grid, count)
    drawn = _draw(config, grid, count)[:, 0]
    kept, expected = (x.sum(axis=(1, 2, 3)) for x in (drawn, reference))
    assert abs(kept.mean() / expected.mean() - 1) <= 0.01
    # Kolmogorov and Smirnov's distance, which chance exceeds at most once in a thousand times
    bins = np.arange(math.prod(grid) + 2)
    shares = [np.cumsum(np.histogram(x, bins)[0]) / count for x in (kept, expected)]
    assert np.abs(shares[0] - shares[1]).max() <= 1.95 * math.sqrt(2 / count)
    # how often each single token is kept: five standard deviations of a difference of two shares
    assert np.abs(drawn.mean(axis=0) - reference.mean(axis=0)).max() <= 5 * math.sqrt(0.5 / count)


@pytest.mark.parametrize(
    ("config", "grid", "rows", "columns"),
    [
        (SMALL_BLOCK, (1, 16, 16), {5, 6, 7, 8}, {5, 6, 7}),
        (LARGE_BLOCK, (1, 16, 16), {12, 13, 14, 15, 16}, {11, 12, 13, 14, 15}),
        # int(100 * 0.29) is 28, as 28.99..; in float32 the product is 29
        (MaskConfig(num_blocks=1, spatial_scale=(0.29, 0.29)), (1, 10, 10), None, None),
        (dataclasses.replace(WIDE_RANGES, num_blocks=1), (5, 6, 9), None, None),
    ],
)
def test_block_sizes_have_their_exact_distribution(
    config: MaskConfig, grid: Grid, rows: set[int] | None, columns: set[int] | None
) -> None:
    count = 20_000
    extents = _extents(~_draw(config, grid, count)[:, 0])
    if rows is not None:
        assert (set(extents[:, 1].tolist()), set(extents[:, 2].tolist())) == (rows, columns)
    drawn = Counter(map(tuple, extents.tolist()))

    def midpoints(pair: tuple[float, float], steps: int) -> np.ndarray:
        return pair[0] + (pair[1] - pair[0]) * (np.arange(steps) + 0.5) / steps

    areas = (grid[1] * grid[2] * midpoints(config.spatial_scale, 1_000)).astype(int)
    frames = np.maximum(1, (grid[0] * midpoints(config.temporal_scale, 1_000)).astype(int))
    ratios = midpoints(config.aspect_ratio, 20_000)
    exact: Counter[tuple[int, int, int]] = Counter()
    for area, area_count in Counter(areas.tolist()).items():
        sides = np.sqrt(area * ratios), np.sqrt(area / ratios)
        sides = np.minimum(np.rint(np.stack(sides, axis=1)), grid[1:]).astype(int)
        for (h, w), side_count in Counter(map(tuple, sides.tolist())).items():
            for t, frame_count in Counter(frames.tolist()).items():
                exact[t, h, w] += area_count / 1e3 * side_count / 2e4 * frame_count / 1e3
    assert set(drawn) <= set(exact)
    assert sum(exact.values()) == pytest.approx(1)
    distance = sum(abs(drawn[size] / count - exact[size]) for size in exact) / 2
    # The mean distance is at most sqrt(k / n) / 2; by McDiarmid's inequality it is larger by
    # sqrt(ln(1e6) / 2n) at most once in a million times.
    bound = math.sqrt(len(exact) / count) / 2 + math.sqrt(math.log(1e6) / (2 * count))
    assert distance <= bound


def test_block_sides_round_to_even_as_in_python() -> None:
    config = MaskConfig(num_blocks=1, spatial_scale=(0.25, 0.25), aspect_ratio=(0.25, 0.25))
    extents = _extents(~_draw(config, (1, 10, 10), 50)[:, 0])
    assert (extents == [1, 2, 10]).all()  # the root of 25 * 0.25 is 2.5


def test_a_batch_shares_the_size_of_blocks_and_not_their_places() -> None:
    contexts = _draw(
        MaskConfig(num_blocks=1, spatial_scale=(0.1, 0.5), temporal_scale=(0.3, 0.9)),
        *((6, 8, 10), 50),
        batch_size=16,
    )
    sizes = set()
    for batch in ~contexts:
        extents = _extents(batch)
        assert (extents == extents[0]).all()
        assert len(np.unique(batch.reshape(16, -1), axis=0)) > 4
        sizes.add(tuple(extents[0].tolist()))
    assert len(sizes) > 20


@pytest.mark.parametrize("grid", [(8, 16, 16), (2, 3, 5)])
def test_the_context_is_never_empty(grid: Grid) -> None:
    _, draws = _plain_masks(LARGE_BLOCKS, grid, 1_000)
    assert (draws > 1).sum() > 10  # where it would be empty without drawing again
    contexts = _draw(LARGE_BLOCKS, grid, 10, batch_size=200)
    assert contexts.any(axis=(2, 3, 4)).all()
    assert not contexts.all(axis=(2, 3, 4)).any()


# Fixed lengths


def test_ids_ascend_and_padding_repeats_the_last() -> None:
    drawn = _whole_masks(jax.random.key(3), MANY_BLOCKS, GRID, 3)
    for ids, valid in (drawn[:2], drawn[2:]):
        assert ids.shape == valid.shape == (3, 105)
        assert (ids.dtype, valid.dtype) == (jnp.int32, jnp.bool_)
        for row, is_valid in zip(np.asarray(ids), np.asarray(valid), strict=True):
            kept = int(is_valid.sum())
            assert 0 < kept < len(row)
            assert is_valid[:kept].all()
            assert (np.diff(row[:kept]) > 0).all()
            assert (row[kept:] == row[kept - 1]).all()


def test_longer_samples_keep_their_first_ids() -> None:
    key = jax.random.key(3)
    whole = _whole_masks(key, MANY_BLOCKS, GRID, 3)
    cut = masks.sample(key, MANY_BLOCKS, GRID, 3, num_context=20, num_targets=40)
    for i, length in enumerate((20, 20, 40, 40)):
        assert cut[i].shape == (3, length)
        assert np.array_equal(cut[i], whole[i][:, :length])
    assert (whole.target_valid.sum(axis=1) > 40).any()  # else nothing was cut


@pytest.mark.parametrize("config", [LARGE_BLOCKS, WIDE_RANGES])
def test_proposed_lengths_cut_the_share_that_was_asked_for(config: MaskConfig) -> None:
    grid = (3, 6, 7)
    contexts = _plain_masks(config, grid, 10_000)[0].sum(axis=(1, 2, 3))
    proposals = [masks.lengths(config, grid, quantile=q) for q in (0.0, 0.5, 0.95, 1.0)]
    assert proposals[2] == masks.lengths(config, grid)
    for quantile, proposal in zip((0.0, 0.5, 0.95, 1.0), proposals, strict=True):
        for length, kept in zip(proposal, (contexts, 126 - contexts), strict=True):
            assert 1 <= length <= 126
            # four standard deviations of the shares, of 10,000 draws and of 4,096
            slack = 4 * math.sqrt(0.25 * (1 / 10_000 + 1 / 4_096))
            assert (kept <= length).mean() >= quantile - slack
            assert (kept < length).mean() <= quantile + slack


# As a JAX function


def test_a_key_says_it_all() -> None:
    a, b, c = (_whole_masks(jax.random.key(i), MANY_BLOCKS, GRID, 3) for i in (1, 1, 2))
    for x, y, z in zip(a, b, c, strict=True):
        assert np.array_equal(x, y)
        assert not np.array_equal(x, z)


def test_jit_and_vmap_change_nothing() -> None:
    grid, keys = (2, 4, 4), jax.random.split(jax.random.key(0), 20)

    def draw(key: jax.Array) -> Masks:
        return masks.sample(key, LARGE_BLOCKS, grid, 3, num_context=9, num_targets=30)

    mapped = jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys))
    for i, key in enumerate(keys):
        for one, many in zip(draw(key), mapped, strict=True):
            assert np.array_equal(one, many[i])


def test_the_second_call_compiles_nothing(compilations: Callable[[], int]) -> None:
    keys = [jax.random.key(i) for i in range(20)]
    for i, key in enumerate(keys):
        masks.sample(key, LARGE_BLOCKS, (2, 4, 4), 3, num_context=9, num_targets=30)
        if i == 0:
            compiled = compilations()
    assert compilations() == compiled


# What cannot be


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 0),
        ("num_blocks", True),
        ("num_blocks", 2.0),
        ("spatial_scale", (0.0, 0.5)),
        ("spatial_scale", (0.5, 0.4)),
        ("spatial_scale", (0.5, 1.1)),
        ("spatial_scale", 0.15),
        ("spatial_scale", [0.15, 0.15]),
        ("spatial_scale", (0.15,)),
        ("spatial_scale", ("0.15", "0.15")),
        ("temporal_scale", (0.5, 2.0)),
        ("temporal_scale", (math.nan, 1.0)),
        ("aspect_ratio", (-1.0, 1.0)),
        ("aspect_ratio", (1.0, math.inf)),
        ("aspect_ratio", (1.0, math.nan)),
    ],
)
def test_impossible_configs_are_refused(field: str, value: object) -> None:
    good = {"num_blocks": 2, "spatial_scale": (0.1, 0.2)}
    with pytest.raises(ConfigError, match=rf"MaskConfig\.{field} = .*; it must be"):
        MaskConfig(**{**good, field: value})


@pytest.mark.parametrize("scale", [0.15, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("ratios", [(0.75, 1.5), (0.1, 0.3), (1.0, 1.0), (0.2, 8.0)])
def test_grids_are_refused_where_a_block_is_empty_or_all(
    scale: float, ratios: tuple[float, float]
) -> None:
    config = MaskConfig(num_blocks=1, spatial_scale=(scale, scale), aspect_ratio=ratios)
    seen = set()
    for h, w in [(h, w) for h in range(1, 9) for w in range(1, 9)]:
        area = int(h * w * scale)
        all_ratios = np.linspace(*ratios, 2001)
        rows = np.minimum(np.rint(np.sqrt(area * all_ratios)), h)
        columns = np.minimum(np.rint(np.sqrt(area / all_ratios)), w)
        if min(rows.min(), columns.min()) < 1:
            expected = "draws empty blocks"
        elif ((rows == h) & (columns == w)).any():
            expected = "leaves no context"
        else:
            expected = "num_context = 0"
        seen.add(expected)
        with pytest.raises(InputError) as error:  # of the grid, and else of the length
            masks.sample(jax.random.key(0), config, (2, h, w), 1, num_context=0, num_targets=1)
        assert expected in str(error.value), (h, w)
        if isinstance(error.value, ConfigError):
            assert f"on the grid (2, {h}, {w}); take a larger grid" in str(error.value)
    assert len(seen) > 1


@pytest.mark.parametrize(("longest", "message"), [(0.5, "num_context"), (1.0, "no context")])
def test_blocks_may_cover_whole_tubelets_but_not_all(longest: float, message: str) -> None:
    config = MaskConfig(num_blocks=2, spatial_scale=(1.0, 1.0), temporal_scale=(0.5, longest))
    with pytest.raises(InputError, match=message):
        masks.sample(jax.random.key(0), config, (4, 3, 3), 1, num_context=0, num_targets=1)


@pytest.mark.parametrize(("num_blocks", "message"), [(20, "num_context"), (100, "no context")])
def test_blocks_too_many_to_leave_a_context_are_refused(num_blocks: int, message: str) -> None:
    config = MaskConfig(num_blocks=num_blocks, spatial_scale=(0.7, 0.7))
    with pytest.raises(InputError, match=message):
        masks.sample(jax.random.key(0), config, (1, 16, 16), 2, num_context=0, num_targets=1)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("grid", (16, 16)),
        ("grid", (0, 16, 16)),
        ("grid", (1.0, 16, 16)),
        ("batch_size", 0),
        ("num_context", 0),
        ("num_context", 513),
        ("num_targets", 513),
        ("num_targets", 1.5),
    ],
)
def test_impossible_arguments_are_refused(argument: str, value: object) -> None:
    good = {"grid": (2, 16, 16), "batch_size": 2, "num_context": 9, "num_targets": 9}
    with pytest.raises(InputError, match=rf"{argument} = .*; it must be"):
        masks.sample(jax.random.key(0), MANY_BLOCKS, **{**good, argument: value})


def test_impossible_quantiles_are_refused() -> None:
    for quantile in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"quantile = .*; it must be between 0 and 1"):
            masks.lengths(MANY_BLOCKS, (1, 16, 16), quantile=quantile)
