import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from models import relative_error
from quality import in_memory, tiny_quality_config
from ratedvideos import kept_examples

from jvjepa import registry
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import unstack_layers
from jvjepa.quality import QualityConfig, QualityModel
from jvjepa.quality_weights import quality_shapes
from jvjepa.text_config import TextConfig
from jvjepa.train.loop import LoopConfig, begin, make_step, train
from jvjepa.train.manifest import DataError
from jvjepa.train.metrics import read
from jvjepa.train.mos import MosConfig, frozen_blocks, mos_task, scorer, trained_quality
from jvjepa.train.mos_features import Examples, made_of
from jvjepa.train.mos_layers import cut
from jvjepa.train.mos_loss import quality_loss, start_weights
from jvjepa.train.mos_metrics import measure
from jvjepa.train.mos_scorer import Batch, Scorer
from jvjepa.train.optimizer import OptimizerConfig, ParameterGroup
from jvjepa.train.task import State, Task

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.01, schedule="constant")
HEAD = MosConfig(optimizer=OPTIMIZER, video_rate=0.0, batch_size=4)
UPPER = MosConfig(optimizer=OPTIMIZER, freeze=0.5, batch_size=4)
TEXT = dataclasses.replace(UPPER, text_rate=0.1)
TOKENS = 2 * 2 * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QualityModel:
    config = dataclasses.replace(tiny_quality_config(feature="mean"))
    return in_memory(config, tmp_path_factory.mktemp("quality") / "tokenizer")


def examples(part: Scorer, folder: Path, count: int = 10, seed: int = 0) -> Examples:
    """Random features; the scores can be learned from them."""
    rng = np.random.default_rng(seed)
    shape = (48,) if part.kept.depth is None else (TOKENS, 48)
    videos = rng.normal(size=(count, *shape)).astype(np.float32)
    texts = rng.normal(size=(count, 24)).astype(np.float32)
    means = videos.reshape(count, -1, 48).mean(axis=1)
    scores = 3 + 2 * np.tanh(means[:, :5] * np.sqrt(len(videos[0].reshape(-1, 48))))
    scores = scores.astype(np.float32)
    return kept_examples(folder, videos, texts, scores, made_of(part.model, part.kept))


def set_up(
    model: QualityModel, config: MosConfig, folder: Path, **options: Any
) -> tuple[Scorer, Task]:
    part = scorer(model, config)
    sets = [examples(part, folder / f"{i}", seed=i) for i in range(2)]
    return part, mos_task(part, config, *sets, steps=8, **options)


def batches(task: Task, count: int, step: int = 0, index: int = 0, of: int = 1) -> list[Batch]:
    with task.feed(step, index, of) as feed:
        return list(itertools.islice(feed, count))


# What is frozen


@pytest.mark.parametrize(
    ("layers", "share", "frozen"),
    [(40, 0.85, 34), (24, 0.85, 20), (12, 0.85, 10), (7, 0.85, 5), (40, 0.0, 0), (3, 0.99, 2)],
)
def test_a_share_is_rounded_down(layers: int, share: float, frozen: int) -> None:
    assert frozen_blocks(layers, share) == frozen


def test_a_vit_g_has_as_many_trained_parameters_as_the_original() -> None:
    encoder = registry.get("vjepa2-vitg-fpc64-384").config.encoder
    config = QualityConfig(encoder=encoder, text=TextConfig())
    shapes = {
        tuple(name.split("/")): jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in quality_shapes(config).items()
    }
    params = unflatten_dict(shapes)
    depth = frozen_blocks(encoder.num_layers, MosConfig().freeze)
    _, upper = jax.eval_shape(lambda tree: cut(tree, encoder, depth), params["encoder"])

    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(upper["blocks"]) == 151_501_056
    assert count(upper["norm"]) == 2_816
    assert count(params["head"]) == 1_383_173
    assert count({**upper, "head": params["head"]}) == 152_887_045


@pytest.mark.parametrize("config", [HEAD, TEXT])
def test_what_is_trained_and_how_fast(
    model: QualityModel, config: MosConfig, tmp_path: Path
) -> None:
    """Adam's first update is the learning rate, whatever the gradient."""
    config = dataclasses.replace(config, optimizer=dataclasses.replace(OPTIMIZER, weight_decay=0.0))
    part, task = set_up(model, config, tmp_path)
    rates = {"head": 2e-2, "encoder": 1e-2 * config.video_rate, "text": 1e-2 * config.text_rate}
    rates = {name: rate for name, rate in rates.items() if rate}
    assert set(task.trained) == set(rates)
    step = jax.jit(make_step(task))
    state, _ = step(begin(task), task.frozen, batches(task, 1)[0], jax.random.key(0))
    new = flatten_dict(trained_quality(part, state).params, sep="/")
    old = flatten_dict(model.params, sep="/")
    assert new.keys() == old.keys()
    moved = {name: np.abs(np.asarray(new[name]) - np.asarray(old[name])) for name in old}
    for name, by in moved.items():
        part_of, *_ = name.split("/")
        if part_of not in rates or name.startswith("encoder/patch_embed"):
            assert not by.any(), name
        elif not name.startswith("text/"):  # of its tables few rows are used
            upper = by[1:] if name.startswith("encoder/blocks") else by
            assert upper.max() == pytest.approx(rates[part_of], rel=0.02), name
            assert not by[: len(by) - len(upper)].any(), name  # half of two blocks are frozen
    if "text" in rates:
        assert moved["text/embed_norm/scale"].max() == pytest.approx(rates["text"], rel=0.02)


def test_a_pooler_is_frozen(tmp_path: Path) -> None:
    model = in_memory(tiny_quality_config(feature="attentive"), tmp_path / "tokenizer")
    _, task = set_up(model, UPPER, tmp_path)
    assert set(task.frozen) == {"pooler"}
    assert set(task.trained) == {"head", "encoder"}
    _, task = set_up(model, HEAD, tmp_path / "head")
    assert task.frozen == {}


def test_blocks_of_their_own_are_stacked(model: QualityModel, tmp_path: Path) -> None:
    alone = {
        name: part and dataclasses.replace(part, scan=False)
        for name, part in (("encoder", model.encoder), ("text", model.text))
    }
    loose = dataclasses.replace(model, **alone, params=unstack_layers(model.params))
    part = scorer(loose, UPPER)
    jax.tree.map(np.testing.assert_array_equal, part.model.params, model.params)
    assert made_of(part.model, part.kept) == made_of(model, part.kept)


# The loss


def test_the_loss_is_that_of_the_head_with_dropout(model: QualityModel, tmp_path: Path) -> None:
    _, task = set_up(model, HEAD, tmp_path)
    batch = batches(task, 1)[0]
    key = jax.random.key(3)
    value, parts = task.loss(task.trained, task.carried, {}, batch, jnp.asarray(0), key)
    params = {"params": task.trained["head"]}
    found = model.head.apply(
        params, batch.video, batch.text[0], deterministic=False, rngs={"dropout": key}
    )
    right, of = quality_loss(found, batch.scores, start_weights())
    assert relative_error(value, right) <= 1e-6
    assert {name: float(parts[name]) for name in of} == pytest.approx(
        {name: float(x) for name, x in of.items()}, rel=1e-5
    )
    again = task.loss(task.trained, task.carried, {}, batch, jnp.asarray(0), jax.random.key(4))
    assert float(again[0]) != float(value)


def test_kept_texts_are_what_the_text_encoder_gives(model: QualityModel, tmp_path: Path) -> None:
    """Trained or not, the text encoder sees the same prompts."""
    texts = scorer(model, TEXT)
    some = examples(texts, tmp_path)
    ids, mask = texts.text(some)
    embedded = model.text.apply({"params": model.params["text"]}, ids, mask, method="embed")
    plain = scorer(model, UPPER)
    some = dataclasses.replace(some, texts=np.asarray(embedded))
    found = [
        part.predict({**part.divide()[0], **part.divide()[1]}, some, 4) for part in (texts, plain)
    ]
    assert relative_error(*found) <= 1e-4


def test_weights_adapt_in_training_alone_and_are_in_the_checkpoint(
    model: QualityModel, tmp_path: Path
) -> None:
    _, task = set_up(model, HEAD, tmp_path)
    rows = iter(np.stack([1.3 ** np.arange(8.0), 0.7 ** np.arange(8.0)], axis=1))
    carried, weights = task.carried, []
    for regression, ranking in rows:
        values = task.evaluate(task.trained, carried, task.frozen)
        assert values == task.evaluate(task.trained, task.carried, task.frozen)
        metrics = {"regression": jnp.float32(regression), "ranking": jnp.float32(ranking)}
        carried = task.adapt(carried, metrics)
        weights.append(float(carried["weights"]["regression"]))
    assert weights == pytest.approx([0.7] * 5 + [0.6, 0.5, 0.5])
    batch = batches(task, 1)[0]
    before, after = (
        task.loss(task.trained, c, {}, batch, jnp.asarray(0), jax.random.key(0))
        for c in (task.carried, carried)
    )
    assert float(before[1]["regression_weight"]) == pytest.approx(0.7)
    assert float(after[1]["regression_weight"]) == pytest.approx(0.5)
    assert float(before[0]) != float(after[0])


def test_a_run_that_goes_on_is_the_run(model: QualityModel, tmp_path: Path) -> None:
    config = LoopConfig(steps=8, save_every=4, log_every=1, keep=3)
    _, task = set_up(model, HEAD, tmp_path)
    moving = jnp.tile(jnp.asarray([[1e-3, 1e3]]), (6, 1))
    weights = {**start_weights(), "history": moving, "count": jnp.int32(6)}  # they adapt at once
    task = dataclasses.replace(task, carried={"weights": weights})
    whole = train(task, config, tmp_path / "whole")
    cut = dataclasses.replace(task, feed=lambda *where: _ends(task.feed(*where), 5))
    with pytest.raises(StopIteration):
        train(cut, config, tmp_path / "cut")
    resumed = train(task, config, tmp_path / "cut", resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.trained, resumed.trained)
    jax.tree.map(np.testing.assert_array_equal, whole.carried, resumed.carried)
    courses = [
        [row["regression_weight"] for row in read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert courses[0][:3] == pytest.approx([0.7, 0.6, 0.5])
    assert courses[0][-4:] == courses[1][-4:]
    other = set_up(model, dataclasses.replace(HEAD, head_rate=1.0), tmp_path)[1]
    with pytest.raises(InputError, match=r"is another run's: .*head_rate = 2\.0, now 1\.0"):
        train(other, config, tmp_path / "cut", resume=True)


class _ends:
    """A feed that has no more batches after some."""

    def __init__(self, feed: Any, count: int) -> None:
        self._feed, self._count = feed, count

    def __enter__(self) -> Any:
        return itertools.islice(self._feed.__enter__(), self._count)

    def __exit__(self, *error: Any) -> None:
        self._feed.__exit__(*error)


@pytest.mark.slow
def test_what_can_be_learned_is_learned(model: QualityModel, tmp_path: Path) -> None:
    part = scorer(model, UPPER)
    some = examples(part, tmp_path, count=16)
    task = mos_task(part, dataclasses.replace(UPPER, batch_size=16), some, steps=100)
    before = part.predict({**task.trained, **task.frozen}, some, 8)
    state, step = begin(task), jax.jit(make_step(task))
    losses = []
    for number, batch in enumerate(batches(task, 100)):
        state, metrics = step(state, task.frozen, batch, jax.random.key(number))
        losses.append(float(metrics["loss"]))
    found = part.predict({**state.trained, **task.frozen}, some, 8)
    scores = [measure(x, some.ratings.scores)["final_score"] for x in (before, found)]
    assert scores[0] < 0.5
    assert scores[1] > 0.8
    assert losses[-1] < 0.3 * losses[0]


# Batches


def test_batches(model: QualityModel, tmp_path: Path) -> None:
    part, task = set_up(model, UPPER, tmp_path)
    some = examples(part, tmp_path / "0")
    whole = batches(task, 8)
    rows = [[_row(some, video) for video in batch.video] for batch in whole]
    for batch, its in zip(whole, rows, strict=True):
        np.testing.assert_array_equal(batch.scores, some.ratings.scores[its])
        np.testing.assert_array_equal(batch.text[0], some.texts[its])
    epochs = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for step in (1, 3):
        np.testing.assert_array_equal(batches(task, 1, step)[0].video, whole[step].video)
    halves = [batches(task, 2, 0, i, 2) for i in range(2)]
    for batch, one, other in zip(whole, *halves, strict=False):
        np.testing.assert_array_equal(batch.video, np.concatenate([one.video, other.video]))
    seeded = set_up(model, UPPER, tmp_path, seed=1)[1]
    assert not np.array_equal(batches(seeded, 1)[0].video, whole[0].video)
    with pytest.raises(InputError, match=r"batch_size = 4; .* multiple of the 3 processes"):
        batches(task, 1, 0, 0, 3)


def _row(some: Examples, video: np.ndarray) -> int:
    return next(row for row in range(len(some)) if np.array_equal(some.load(row), video))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_every_video_is_predicted_once(
    model: QualityModel, tmp_path: Path, batch_size: int
) -> None:
    part = scorer(model, HEAD)
    some = examples(part, tmp_path)
    params = part.divide()[0]
    found = part.predict(params, some, batch_size)
    video = np.stack([some.load(row) for row in range(10)])
    right = model.head.apply({"params": params["head"]}, video, some.texts)
    assert relative_error(found, right) <= 1e-5


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": 1.0}, r"freeze = 1\.0; it must be below 1; video_rate = 0 freezes all blocks"),
        ({"freeze": -0.1}, r"freeze = -0\.1; it must be a number, 0 or more"),
        ({"head_rate": 0}, r"head_rate = 0; it must be above 0"),
        ({"video_rate": float("nan")}, r"video_rate = nan"),
        ({"text_rate": "off"}, r"text_rate = 'off'"),
        ({"batch_size": 0}, r"batch_size = 0"),
        ({"dtype": "float16"}, r"dtype = 'float16'; it must be one of \('float32', 'bfloat16'\)"),
        ({"stored": "int8"}, r"stored = 'int8'; it must be one of"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MosConfig(**options)


def test_groups_are_made_of_rates() -> None:
    groups = (ParameterGroup(pattern=".*"),)
    optimizer = dataclasses.replace(OPTIMIZER, groups=groups)
    with pytest.raises(ConfigError, match=r"optimizer\.groups: there must be none; head_rate, "):
        MosConfig(optimizer=optimizer)


def test_what_does_not_fit(model: QualityModel, tmp_path: Path) -> None:
    part = scorer(model, HEAD)
    some = examples(part, tmp_path / "a")
    with pytest.raises(InputError, match=r"batch_size = 16; .*a\.csv gives 10 videos to train on"):
        mos_task(part, dataclasses.replace(HEAD, batch_size=16), some, steps=1)
    with pytest.raises(
        DataError, match=r"10 of the videos to .*a\.csv: 0\.mp4 is 0\.mp4; .*5 more"
    ):
        mos_task(part, HEAD, some, some, steps=1)
    upper = examples(scorer(model, UPPER), tmp_path / "upper")
    with pytest.raises(InputError, match=r"the features of the validation set are of another"):
        mos_task(part, HEAD, some, upper, steps=1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    part = scorer(dataclasses.replace(model, params=half), HEAD)
    with pytest.raises(InputError, match=r"parameters are bfloat16; .* they must be float32"):
        mos_task(part, HEAD, some, steps=1)


def test_widths_that_differ_are_told(model: QualityModel, tmp_path: Path) -> None:
    """A head that was made for another encoder."""
    head = jax.tree.map(lambda x: x, model.params["head"])
    head["norm"] = {name: leaf[:-1] for name, leaf in head["norm"].items()}
    head["fc1"] = {**head["fc1"], "kernel": head["fc1"]["kernel"][:-1]}
    broken = dataclasses.replace(model, params={**model.params, "head": head})
    part = scorer(broken, HEAD)
    some = examples(part, tmp_path / "again")
    with pytest.raises(InputError, match=r"have 72 channels; the head was made for 71"):
        part.predict(part.divide()[0], some, 4)
    with pytest.raises(InputError, match=r"have 72 channels; the head was made for 71"):
        mos_task(part, HEAD, some, steps=1)


def test_nothing_is_rated_by_a_constant(model: QualityModel, tmp_path: Path) -> None:
    _, task = set_up(model, HEAD, tmp_path)
    zeros = jax.tree.map(jnp.zeros_like, task.trained)
    values = task.evaluate(zeros, task.carried, task.frozen)
    assert np.isnan(values["validation/final_score"])
    assert np.isfinite(values["validation/Overall/rmse"])
    assert task.best == ("validation/final_score", "max")
    assert isinstance(begin(task), State)
