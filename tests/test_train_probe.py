import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from caches import CLIP, ENCODER, WIDTH, cache, random_cache, separable
from evaluation import reference_logits
from models import relative_error, tiny_config
from probing import ATTENTIVE, LINEAR, PAIR, head, run

from jvjepa.errors import ConfigError, InputError
from jvjepa.train.feature_cache import Features
from jvjepa.train.frozen_features import FeatureConfig
from jvjepa.train.manifest import DataError
from jvjepa.train.probe import (
    probe_result,
    probe_steps,
    probe_task,
)
from jvjepa.train.probe_heads import Heads, ProbeConfig, probabilities, sample_tokens
from jvjepa.train.task import Task
from jvjepa.typing import Params

# The grid


@pytest.mark.parametrize("config", [pytest.param(PAIR, marks=pytest.mark.slow), LINEAR])
def test_a_grid_is_what_its_heads_are_alone(config: ProbeConfig) -> None:
    training = random_cache()
    grid = probe_task(config, training, training)
    together, reports = run(grid, 4)

    losses = []
    for i, (rate, decay) in enumerate(config.grid):
        one = dataclasses.replace(config, learning_rates=(rate,), weight_decays=(decay,))
        task = probe_task(one, training, training)
        alone, its = run(task, 4, lambda _, i=i: head(grid.trained, i))
        losses.append([float(report["loss"]) for report in its])
        for leaf, other in zip(
            jax.tree.leaves(head(together, i)), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=2e-5)
    losses = np.array(losses)
    for name, right in (
        ("loss", losses.sum(axis=0)),
        ("best_loss", losses.min(axis=0)),
        ("mean_loss", losses.mean(axis=0)),
    ):
        assert relative_error([report[name] for report in reports], right) <= 1e-5
    assert all(report["finite_heads"] == len(config.grid) for report in reports)
    assert len(set(np.round(losses[:, 0], 5))) == len(
        config.grid
    )  # heads begin with weights of their own


def test_adamw_is_that_of_torch_with_the_schedule_of_meta() -> None:
    training = random_cache(rows=12)
    config = dataclasses.replace(LINEAR, learning_rates=(0.01, 0.002))
    task = probe_task(config, training, training)
    steps = probe_steps(config, training)
    assert steps == 6
    ours, _ = run(task, steps)

    means = training.values.astype(np.float64).mean(axis=(1, 2, 3, 4))
    x = torch.tensor((means - means.mean(axis=0)) / means.std(axis=0))
    with task.feed(0, 0, 1) as feed:
        batches = [next(feed) for _ in range(steps)]
    rows = [[_row(training, tokens) for tokens in batch.tokens] for batch in batches]
    for i, (rate, decay) in enumerate(config.grid):
        start = jax.tree.map(lambda leaf, i=i: torch.tensor(np.asarray(leaf[i], np.float64)),
                             task.trained["heads"])  # fmt: skip
        weights = [start["kernel"].requires_grad_(), start["bias"].requires_grad_()]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
        for number, chosen in enumerate(rows, 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / steps))
            optimizer.zero_grad()
            logits = x[chosen] @ weights[0] + weights[1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(chosen) % 3).backward()
            optimizer.step()
        for name, right in zip(("kernel", "bias"), weights, strict=True):
            assert relative_error(ours["heads"][name][i], right.detach().numpy()) <= 1e-5
    rates = [float(task.optimizer.schedules["learning_rate"](i)) for i in range(steps)]
    right = [0.01 * 0.5 * (1 + math.cos(math.pi * n / steps)) for n in range(1, steps + 1)]
    np.testing.assert_allclose(rates, right, atol=1e-8)


def _row(features: Features, tokens: np.ndarray) -> int:
    flat = features.values.reshape(len(features), -1)
    return int(np.flatnonzero((flat == tokens.reshape(-1)).all(axis=1))[0])


@pytest.mark.parametrize("kind", [pytest.param("attentive", marks=pytest.mark.slow), "linear"])
def test_what_can_be_told_apart_is_learned(kind: str) -> None:
    rates = {"attentive": (3e-3, 1e-6), "linear": (0.03, 1e-6)}[kind]
    config = dataclasses.replace(
        ATTENTIVE, kind=kind, epochs=5, batch_size=16, learning_rates=rates, weight_decays=(0.01,)
    )
    training, validation = separable(96, 0), separable(30, 1)
    task = probe_task(config, training, validation)
    before = task.evaluate(task.trained, {}, task.frozen)
    trained, _ = run(task, probe_steps(config, training))
    values = task.evaluate(trained, {}, task.frozen)

    assert before["accuracy"] < 0.7
    assert values["accuracy"] == values["accuracy/head_00"] == 1.0
    assert values["accuracy/head_01"] < 0.9  # hardly trained
    assert task.best == ("accuracy", "max")
    result = probe_result(config, training, task, trained)
    assert (result.head, result.learning_rate, result.accuracy) == (0, rates[0], 1.0)
    assert set(values) == {"accuracy", "accuracy/head_00", "accuracy/head_01"}


@pytest.mark.parametrize("config", [pytest.param(PAIR, marks=pytest.mark.slow), LINEAR])
def test_a_head_that_diverges_stops_no_other(config: ProbeConfig) -> None:
    training = random_cache()
    task = probe_task(config, training, training)

    def broken(trained: Params) -> Params:
        def put(leaf: jax.Array) -> jax.Array:
            return leaf.at[1].set(jnp.inf) if leaf.ndim == 2 else leaf  # the biases of a head

        return jax.tree.map(put, trained)

    fine, _ = run(task, 2)
    some, reports = run(task, 2, broken)
    for i in [i for i in range(len(config.grid)) if i != 1]:
        for leaf, other in zip(
            jax.tree.leaves(head(some, i)), jax.tree.leaves(head(fine, i)), strict=True
        ):
            np.testing.assert_array_equal(leaf, other)
    assert all(report["finite_heads"] == len(config.grid) - 1 for report in reports)
    assert all(np.isfinite([*report.values()]).all() for report in reports)
    values = task.evaluate(some, {}, task.frozen)
    assert values["accuracy/head_01"] == 0.0

    every = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), task.trained)
    _, [report] = run(task, 1, lambda _: every)
    assert np.isnan(report["loss"])
    assert report["finite_heads"] == 0


def test_initial_weights() -> None:
    config = dataclasses.replace(ATTENTIVE, num_layers=3)
    encoder = tiny_config(head_width=24, num_heads=4)
    heads = Heads(config=config, encoder=encoder, features=FeatureConfig(views=(CLIP,)), classes=5)
    params = heads.init()

    again = dataclasses.replace(heads, config=dataclasses.replace(config, seed=1)).init()
    assert not np.array_equal(params["linear"]["kernel"], again["linear"]["kernel"])
    np.testing.assert_array_equal(heads.init()["linear"]["kernel"], params["linear"]["kernel"])
    blocks = params["pooler"]["blocks"]
    assert blocks["attention"]["query"]["kernel"].shape == (4, 3, 96, 96)
    cross = params["pooler"]["cross_attention"]
    for layer, wanted in (
        *((blocks["attention"][name], [1, 1, 1]) for name in ("query", "key", "value")),
        (blocks["mlp"]["fc1"], [1, 1, 1]),
        (blocks["attention"]["proj"], [2, 4, 6]),
        (blocks["mlp"]["fc2"], [2, 4, 6]),
        (cross["attention"]["value"], 1),
        (cross["mlp"]["fc1"], 1),
        (cross["mlp"]["fc2"], 6),
    ):
        found = layer["kernel"].std(axis=(0, -2, -1))
        # of some 10,000 draws and more, whose deviation is within 2%
        np.testing.assert_allclose(found, 0.02 / np.sqrt(wanted), rtol=0.02)
        assert not layer["bias"].any()
    assert 0.018 < params["pooler"]["query_tokens"].std() < 0.022
    np.testing.assert_array_equal(blocks["norm1"]["scale"], 1)
    fewer = dataclasses.replace(config, weight_decays=(0.01,), learning_rates=(3e-3,))
    fewer = dataclasses.replace(heads, config=fewer).init()
    np.testing.assert_array_equal(fewer["pooler"]["query_tokens"][0],
                                  params["pooler"]["query_tokens"][0])  # fmt: skip
    bound = 1 / math.sqrt(96)
    assert 0.95 * bound < jnp.abs(params["linear"]["kernel"]).max() <= bound
    linear = dataclasses.replace(heads, config=dataclasses.replace(config, kind="linear"))
    shapes = {name: leaf.shape for name, leaf in linear.init().items()}
    assert shapes == {"kernel": (4, 96, 5), "bias": (4, 5)}
    assert linear.init()["bias"].any()


@pytest.mark.parametrize("sees", ["view", "clip", "tubelet"])
def test_statistics(sees: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(150, 2, 2, 2, 3, WIDTH)) * np.linspace(0.01, 3, WIDTH) + 50
    values[..., 7] = 50.123
    training = cache(values.astype(np.float32), np.arange(150) % 2)
    config = dataclasses.replace(LINEAR, sees=sees)
    task = probe_task(config, training, training)

    means = sample_tokens(training.values.astype(np.float64), sees).mean(axis=2)
    means = means.reshape(-1, WIDTH)
    assert relative_error(task.frozen["mean"], means.mean(axis=0)) <= 1e-6
    std = means.std(axis=0)
    std[7] = 1
    np.testing.assert_allclose(task.frozen["std"], std, rtol=1e-5)


# Batches


def batches(task: Task, count: int, step: int = 0, index: int = 0, of: int = 1) -> list[Any]:
    with task.feed(step, index, of) as feed:
        return list(itertools.islice(feed, count))


def numbered(rows: int = 11, shape: tuple[int, ...] = (2, 3, 2, 1)) -> Features:
    """Every token is its own number."""
    values = np.arange(rows * math.prod(shape), dtype=np.float32).reshape(rows, *shape, 1)
    return cache(np.repeat(values, WIDTH, axis=-1), np.arange(rows) % 4)


@pytest.mark.parametrize("sees", ["view", "clip", "tubelet"])
def test_every_epoch_sees_every_video_once(sees: str) -> None:
    training = numbered()
    config = dataclasses.replace(LINEAR, batch_size=5, sees=sees)
    task = probe_task(config, training, training)
    found = batches(task, 40)

    samples = sample_tokens(training.values, sees)
    length = samples.shape[2]
    assert {batch.tokens.shape for batch in found} == {(5, length, WIDTH)}
    rows = [[int(first // 12) for first in batch.tokens[:, 0, 0]] for batch in found]
    for batch, its in zip(found, rows, strict=True):
        np.testing.assert_array_equal(batch.labels, np.array(its) % 4)
        assert batch.labels.dtype == np.int32
        for tokens, row in zip(batch.tokens, its, strict=True):
            assert any(np.array_equal(tokens, sample) for sample in samples[row])
    epochs = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)  # the eleventh fills no batch
    assert len({tuple(epoch) for epoch in epochs}) == 20
    drawn = {float(batch.tokens[i, 0, 0]) for batch in found for i in range(5)}
    assert len(drawn) > 0.6 * 11 * samples.shape[1]  # each sample has its turn


def test_a_run_goes_on_where_it_was() -> None:
    task = probe_task(dataclasses.replace(LINEAR, batch_size=4), numbered(), numbered())
    whole = batches(task, 9)
    for step in (1, 2, 5):
        for one, other in zip(batches(task, 3, step), whole[step:], strict=False):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.labels, other.labels)
    other = probe_task(dataclasses.replace(LINEAR, seed=1), numbered(), numbered())
    assert not np.array_equal(batches(other, 1)[0].tokens, whole[0].tokens)


def test_processes_share_a_batch() -> None:
    task = probe_task(dataclasses.replace(LINEAR, batch_size=4), numbered(), numbered())
    whole, parts = batches(task, 3), [batches(task, 3, 0, i, 2) for i in range(2)]
    for batch, one, other in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch.tokens[::2], one.tokens)
        np.testing.assert_array_equal(batch.tokens[1::2], other.tokens)
    odd = probe_task(dataclasses.replace(LINEAR, batch_size=5), numbered(), numbered())
    with pytest.raises(InputError, match=r"batch_size = 5; .* multiple of the 2 processes"):
        batches(odd, 1, 0, 0, 2)


# Evaluation


@pytest.mark.parametrize("sees", ["view", "clip", "tubelet"])
@pytest.mark.parametrize("kind", ["attentive", "linear"])
def test_probabilities_are_averaged_over_what_is_not_seen_together(kind: str, sees: str) -> None:
    config = dataclasses.replace(ATTENTIVE, kind=kind, sees=sees, weight_decays=(0.1,))
    training = random_cache(shape=(2, 2, 2, 3), rows=7)
    task = probe_task(config, training, training)
    heads = Heads(config=config, encoder=ENCODER, features=training.config, classes=3)
    values = training.values[:2]
    params = jax.tree.map(lambda leaf: leaf * 3, task.trained["heads"])  # not all 1 / 3
    found = probabilities(heads, params, task.frozen, jnp.asarray(sample_tokens(values, sees)))

    cut = {
        "view": [(slice(v, v + 1), slice(None), slice(None)) for v in range(2)],
        "clip": [(v, slice(c, c + 1), slice(None)) for v in range(2) for c in range(2)],
        "tubelet": [(v, c, t) for v in range(2) for c in range(2) for t in range(2)],
    }[sees]
    assert found.shape == (2, 2, 3)
    for g, row in itertools.product(range(2), range(2)):
        its = jax.tree.map(lambda leaf, g=g: np.asarray(leaf[g], np.float64), params)
        answers = []
        for place in cut:
            tokens = values[(row, *place)].reshape(-1, WIDTH).astype(np.float64)
            if kind == "attentive":
                logits = reference_logits(heads.classifier(), its, tokens)
            else:
                mean, std = (np.asarray(task.frozen[name], np.float64) for name in ("mean", "std"))
                logits = (tokens.mean(axis=0) - mean) / std @ its["kernel"] + its["bias"]
            answers.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
        assert relative_error(found[g, row], np.mean(answers, axis=0)) <= 1e-5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_accuracy_counts_every_video_once(rows: int, batch_size: int) -> None:
    config = dataclasses.replace(LINEAR, batch_size=min(batch_size, 10))
    training, validation = random_cache(), random_cache(rows=rows, shape=(2, 1, 2, 3), seed=5)
    task = probe_task(config, training, validation)
    heads = Heads(
        config=dataclasses.replace(config, batch_size=batch_size),
        encoder=ENCODER,
        features=training.config,
        classes=3,
    )
    tokens = jnp.asarray(sample_tokens(validation.values, "view"))
    found = probabilities(heads, task.trained["heads"], task.frozen, tokens)
    right = (np.asarray(found).argmax(axis=-1) == validation.labels).mean(axis=1)
    values = task.evaluate(task.trained, {}, task.frozen)

    each = [values[f"accuracy/head_{i:02d}"] for i in range(4)]
    np.testing.assert_allclose(each, right)
    assert values["accuracy"] == max(each)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_caches(dtype: str) -> None:
    training = random_cache()
    small = dataclasses.replace(training, values=training.values.astype(jnp.dtype(dtype)))
    exact, rounded = (
        run(probe_task(LINEAR, some, some), 2)[1][-1]["loss"] for some in (training, small)
    )
    assert exact != rounded
    np.testing.assert_allclose(exact, rounded, rtol=2e-2)  # bfloat16 has 8 bits of each value


def test_bfloat16_heads() -> None:
    training = random_cache()
    small = dataclasses.replace(ATTENTIVE, dtype="bfloat16")
    task = probe_task(small, training, training)
    tokens = jnp.asarray(sample_tokens(training.values, "view"))
    params = jax.tree.map(lambda leaf: leaf * 3, task.trained["heads"])
    found = []
    for config in (ATTENTIVE, small):
        heads = Heads(config=config, encoder=ENCODER, features=training.config, classes=3)
        found.append(probabilities(heads, params, {}, tokens))

    assert task.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert found[1].dtype == jnp.float32
    assert 1e-5 < relative_error(found[1], found[0]) < 3e-2


# Bad input


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "mlp"),
        ("sees", "frame"),
        ("dtype", "float16"),
        ("num_layers", 0),
        ("num_heads", 1.5),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", math.nan),
        ("learning_rates", ()),
        ("learning_rates", [0.1]),
        ("learning_rates", (0.1, 0.0)),
        ("learning_rates", (-1.0,)),
        ("learning_rates", (0.1, 0.1)),
        ("learning_rates", (math.inf,)),
        ("learning_rates", ("0.1",)),
        ("weight_decays", ()),
        ("weight_decays", (-0.1,)),
        ("weight_decays", (math.nan,)),
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", True),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 0.5),
    ],
)
def test_bad_probe_options(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"ProbeConfig.{field} = "):
        ProbeConfig(**{field: value})


def test_the_default_grid_is_that_of_meta() -> None:
    grid = ProbeConfig().grid
    assert len(grid) == len(set(grid)) == 20
    assert set(grid) == set(
        itertools.product((5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.01, 0.1, 0.4, 0.8))
    )
    config = ProbeConfig()
    assert (config.num_layers + 1, config.num_heads, config.layer_norm_eps) == (4, 16, 1e-5)


def test_features_that_cannot_be_trained_on() -> None:
    training = random_cache()
    assert probe_steps(ATTENTIVE, training) == 2 * (10 // 4)
    large = dataclasses.replace(ATTENTIVE, batch_size=11)
    with pytest.raises(InputError, match=r"batch_size = 11; list\.csv has features of 10 videos"):
        probe_task(large, training, training)
    unlabelled = cache(training.values, [0, -1, 1, 0, -1, 0, 0, 0, 0, 0])
    with pytest.raises(DataError, match=r"list\.csv: rows 1, 4 have no label"):
        probe_task(ATTENTIVE, unlabelled, training)
    gap = cache(training.values, [0, 1, 3, 0, 1, 0, 0, 0, 0, 0])
    with pytest.raises(DataError, match=r"list\.csv: labels .* largest is 3.* no row has 2"):
        probe_task(ATTENTIVE, gap, training)
    more = cache(training.values, np.arange(10) % 4, name="val.csv")
    with pytest.raises(DataError, match=r"val\.csv: rows 3, 7 have the labels 3, 3"):
        probe_task(ATTENTIVE, training, more)
    pooled = dataclasses.replace(training.config, pool="clip")
    pooled = dataclasses.replace(training, config=pooled)
    with pytest.raises(InputError, match="its features have pool = clip"):
        probe_task(ATTENTIVE, training, pooled)
    with pytest.raises(ConfigError, match=r"ProbeConfig\.num_heads = 16; .* width 24"):
        probe_task(dataclasses.replace(ATTENTIVE, num_heads=16), training, training)


def test_the_record_tells_runs_apart() -> None:
    training = random_cache()
    one = probe_task(LINEAR, training, training).record
    other = probe_task(dataclasses.replace(LINEAR, seed=1), training, training).record
    assert one != other
    moved = dataclasses.replace(training, made_of={**training.made_of, "manifest": "x"})
    assert probe_task(LINEAR, moved, training).record != one
