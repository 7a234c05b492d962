"""Training a video-quality model: its head, and the upper blocks of its video encoder.

    training, validation = split(read_ratings("labels.csv", "videos"), 0.2, seed=0)
    part, store = scorer(model, config), Store(Path("features"))
    sets = [make_examples(part.model, some, store, part.kept) for some in (training, validation)]
    task = mos_task(part, config, *sets, steps=2_000)
    state = train(task, LoopConfig(steps=2_000), "runs/quality")
    save_quality("models/quality", trained_quality(part, state))

The patch embedding and the lower blocks are frozen, and so is an attentive pooler; a video's tokens
above them are computed once and kept. Each part has a learning rate of its own; without one for the
video encoder its features are kept instead, and without one for the text encoder, as by default,
the embeddings of the prompts.

Reference: QualiVision (`src/models/vjepa_model.py`, `src/utils/training.py`), whose schedules are
here in updates, and whose weights of losses adapt in training alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

import grain
import jax
import jax.numpy as jnp

from jvjepa.adapters import weights_sha256
from jvjepa.errors import ConfigError, InputError
from jvjepa.fields import check, check_choices, check_positive_ints
from jvjepa.layers import Remat
from jvjepa.parameters import stack_layers
from jvjepa.quality import QualityModel
from jvjepa.train.feeding import options, reading
from jvjepa.train.frozen_features import DTYPES as STORED
from jvjepa.train.frozen_features import Stored
from jvjepa.train.manifest import DataError
from jvjepa.train.mos_features import Examples, Kept, made_of
from jvjepa.train.mos_loss import adapt_weights, quality_loss, start_weights
from jvjepa.train.mos_metrics import FINAL, measure
from jvjepa.train.mos_scorer import Batch, Scorer, gather
from jvjepa.train.optimizer import OptimizerConfig, ParameterGroup, make_optimizer
from jvjepa.train.task import Best, Feed, State, Task
from jvjepa.typing import Array, Params
from jvjepa.weights import DTYPES

_NAMED = 5  # videos that an error names


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosConfig:
    """What is trained, and how.

    Args:
        optimizer: without groups; the three rates below make them.
        freeze: share of the video encoder's blocks, from the first, that are frozen, 0 to below 1;
            with 0.85 the first 34 of 40. Its patch embedding is frozen with any.
        head_rate: what the learning rate is multiplied with for the head, above 0.
        video_rate: the same for the video encoder's other blocks and its final norm; 0 freezes them
            too.
        text_rate: the same for the text encoder; 0 freezes it.
        batch_size: videos of a batch, over all processes; order is learned within a batch, or
            within a part of it where the loop divides it.
        dtype: of the computation; the head's is float32.
        remat: what is computed anew for the gradient of the video encoder, see `jvjepa.Encoder`.
        stored: dtype of the kept features.

    Raises:
        ConfigError: a value is impossible.
    """

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-4, warmup_steps=100, weight_decay=0.01, max_norm=1.0
        )
    )
    freeze: float = 0.85
    head_rate: float = 2.0
    video_rate: float = 0.5
    text_rate: float = 0.0
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    stored: Stored = "float32"

    def __post_init__(self) -> None:
        """Checks the fields that nothing else does."""
        rates = ("head_rate", "video_rate", "text_rate")
        for name in (*rates, "freeze"):
            value = getattr(self, name)
            number = type(value) in (int, float) and 0 <= value < math.inf
            check(number, self, name, "a number, 0 or more")
        check(self.freeze < 1, self, "freeze", "below 1; video_rate = 0 freezes all blocks")
        check(self.head_rate > 0, self, "head_rate", "above 0")
        check_positive_ints(self, "batch_size")
        check_choices(self, dtype=tuple(DTYPES), stored=tuple(STORED))
        if self.optimizer.groups:
            given = ", ".join(rates)
            raise ConfigError(f"optimizer.groups: there must be none; {given} are instead of them")


def frozen_blocks(num_layers: int, share: float) -> int:
    """How many blocks, from the first, a share freezes: rounded down."""
    return int(num_layers * share)


def scorer(model: QualityModel, config: MosConfig) -> Scorer:
    """Divides a model into what is kept of its results and what runs in training.

    Args:
        model: the model; blocks may be stacked or not.
        config: what is trained.

    Returns:
        The part that runs; its `kept` is what `make_examples` must keep.
    """
    if not model.encoder.scan:
        stacked = {
            name: part and dataclasses.replace(part, scan=True)
            for name, part in (
                ("encoder", model.encoder),
                ("text", model.text),
                ("pooler", model.pooler),
            )
        }
        model = dataclasses.replace(model, **stacked, params=stack_layers(model.params))
    depth = frozen_blocks(model.config.encoder.num_layers, config.freeze)
    kept = Kept(depth if config.video_rate else None, config.stored, jnp.dtype(config.dtype))
    return Scorer(model=model, kept=kept, reads=config.text_rate > 0, remat=config.remat)


def mos_task(
    scorer: Scorer,
    config: MosConfig,
    training: Examples,
    validation: Examples | None = None,
    *,
    steps: int,
    seed: int = 0,
) -> Task:
    """Sets up the training.

    Args:
        scorer: from `scorer`, of a float32 model.
        config: what is trained.
        training: videos to learn from, from `make_examples` with `scorer.model` and `scorer.kept`.
        validation: videos to measure on, at every checkpoint, and to choose the best one by.
        steps: updates of the run, for the schedules.
        seed: of which videos a batch has.

    Returns:
        The task; `trained_quality` makes a model of its result. An evaluation reports what
        `jvjepa.train.mos_metrics.measure` does, under "validation/".

    Raises:
        ConfigError: the optimizer does not fit the run.
        InputError: the examples are of other weights, or fewer than a batch takes.
        DataError: a video is in both sets.
    """
    sets = {"training": training} | ({} if validation is None else {"validation": validation})
    _check(scorer, config, sets)
    trained, frozen = scorer.divide()

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        weights = carried["weights"]
        found = scorer({**trained, **frozen}, batch, key)
        value, parts = quality_loss(found, batch.scores, weights)
        return value, {**parts, "regression_weight": weights["regression"]}

    def adapt(carried: Params, metrics: dict[str, Array]) -> Params:
        return {"weights": adapt_weights(carried["weights"], metrics)}

    def evaluate(trained: Params, carried: Params, frozen: Params) -> dict[str, float]:
        found = scorer.predict({**trained, **frozen}, validation, config.batch_size)
        values = measure(found, validation.ratings.scores)
        return {f"validation/{name}": value for name, value in values.items()}

    model = scorer.model
    return Task(
        name="mos",
        record={
            "model": model.config.to_json(),
            "weights": weights_sha256({**trained, **frozen}),
            "text": weights_sha256(model.params["text"]),
            **options(config, "remat"),
            "data_seed": seed,
            "features": dict(training.made_of),
            **{name: some.ratings.digest for name, some in sets.items()},
        },
        trained=trained,
        carried={"weights": start_weights()},
        frozen=frozen,
        loss=loss,
        adapt=adapt,
        optimizer=make_optimizer(_with_groups(config, trained), trained, steps=steps),
        feed=_feed(scorer, config.batch_size, seed, training),
        evaluate=None if validation is None else evaluate,
        best=None if validation is None else Best(f"validation/{FINAL}", "max"),
        dtype=jnp.dtype(config.dtype),
    )


def trained_quality(scorer: Scorer, state: State) -> QualityModel:
    """Makes a model of what was trained, to be saved with `jvjepa.quality.save_quality`.

    Args:
        scorer: of the task.
        state: its result.

    Returns:
        The model, with trained weights and stacked blocks.
    """
    params = scorer.put_back(jax.device_get(state.trained))
    return dataclasses.replace(scorer.model, params=params)


def _with_groups(config: MosConfig, trained: Params) -> OptimizerConfig:
    rates = {"head": config.head_rate, "encoder": config.video_rate, "text": config.text_rate}
    groups = [
        ParameterGroup(pattern=f"{name}/.*", learning_rate=float(rates[name])) for name in trained
    ]
    return dataclasses.replace(config.optimizer, groups=tuple(groups))


def _check(scorer: Scorer, config: MosConfig, sets: Mapping[str, Examples]) -> None:
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(scorer.divide())}
    if dtypes != {jnp.dtype(jnp.float32)}:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise InputError(f"the model's parameters are {found}; to be trained they must be float32")
    wanted = made_of(scorer.model, scorer.kept)
    for name, some in sets.items():
        if some.made_of != wanted:
            raise InputError(
                f"the features of the {name} set are of another model or other options"
            )
    if len(sets["training"]) < config.batch_size:
        raise InputError(
            f"batch_size = {config.batch_size}; {sets['training'].ratings.source} gives "
            f"{len(sets['training'])} videos to train on, take no more"
        )
    first = gather(sets["training"], scorer.text(sets["training"]), [0])
    trained, frozen = scorer.divide()
    jax.eval_shape(scorer, {**trained, **frozen}, first)  # the head's width is looked at
    if "validation" in sets:
        _check_apart(sets["training"], sets["validation"])


def _check_apart(training: Examples, validation: Examples) -> None:
    """Raises DataError where the two have a video in common, by whatever name."""
    known = dict(zip(training.videos, training.ratings.names, strict=True))
    pairs = zip(validation.videos, validation.ratings.names, strict=True)
    common = [f"{name} is {known[video]}" for video, name in pairs if video in known]
    if common:
        more = f"; and {len(common) - _NAMED} more" if len(common) > _NAMED else ""
        raise DataError(
            f"{validation.ratings.source}: {len(common)} of the videos to measure on are trained "
            f"on, in {training.ratings.source}: {'; '.join(common[:_NAMED])}{more}"
        )


def _feed(scorer: Scorer, batch_size: int, seed: int, training: Examples) -> Feed:
    """Batches of kept features; every epoch shuffles, and drops what does not fill a batch."""
    epoch = len(training) // batch_size * batch_size
    text = scorer.text(training)

    def feed(
        step: int, process_index: int, process_count: int
    ) -> AbstractContextManager[grain.DatasetIterator[Batch]]:
        size = batch_size // process_count
        if size * process_count != batch_size:
            raise InputError(
                f"batch_size = {batch_size}; it must be a multiple of the {process_count} processes"
            )
        share = slice(process_index * size, (process_index + 1) * size)
        rows = grain.MapDataset.source(range(len(training))).shuffle(seed=seed)
        batches = rows[:epoch].repeat(None).batch(batch_size)[step:]
        batches = batches.map(lambda some: gather(training, text, some[share]))
        return reading(batches)

    return feed
