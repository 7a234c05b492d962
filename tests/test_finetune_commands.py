"""Fine-tuning what was stored: its dtype, the classifier it has, and the size of the clips."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_params
from test_distill_finetune import CLIP, DATA, OPTIMIZER, batch, manifest, model

from jvjepa import Encoder, cli
from jvjepa.config import ModelConfig, PredictorConfig
from jvjepa.errors import ConfigError
from jvjepa.heads import Classifier
from jvjepa.train import commands
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task
from jvjepa.train.data import Batch, normalise
from jvjepa.train.distill import SIZES, DistillConfig, distill_task
from jvjepa.train.finetune import FinetuneConfig, finetune_task, finetuned, with_classifier
from jvjepa.train.initialisation import init_params
from jvjepa.train.loop import begin, make_step
from jvjepa.train.manifest import DataError
from jvjepa.train.task import Task
from jvjepa.weights import Model, load, save

TINY = dataclasses.replace(OPTIMIZER, learning_rate=1e-5, weight_decay=0.0)
CONFIG = FinetuneConfig(optimizer=TINY, data=DATA, num_layers=1, num_heads=2)


def in_bfloat16(folder: Path, some: Model) -> Model:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), some.params)
    save(folder, dataclasses.replace(some, params=params))
    return load(folder)


def dtypes(some: Model) -> set[str]:
    modules = [some.encoder, some.classifier]
    stored = {leaf.dtype.name for leaf in jax.tree.leaves(some.params)}
    return stored | {np.dtype(module.param_dtype).name for module in modules}


# Dtypes


def test_bfloat16_weights_are_trained_in_float32(tmp_path: Path) -> None:
    begun = with_classifier(model(num_layers=1), CONFIG, manifest(), seed=0)
    begun = in_bfloat16(tmp_path / "begun", begun)
    assert dtypes(begun) == {"bfloat16"}
    task = finetune_task(begun, CONFIG, manifest(), steps=1)
    state, _ = jax.jit(make_step(task))(begin(task), task.frozen, batch(), jax.random.key(0))
    save(tmp_path / "after", finetuned(begun, task, state))
    after = load(tmp_path / "after")
    assert dtypes(finetuned(begun, task, state)) == dtypes(after) == {"float32"}
    before, now = (
        np.asarray(some.params["encoder"]["blocks"]["norm1"]["scale"], np.float32)
        for some in (begun, after)
    )
    assert (before != now).all()


def test_a_new_classifier_on_bfloat16_weights_can_be_saved(tmp_path: Path) -> None:
    stored = in_bfloat16(tmp_path / "stored", model(num_layers=1))
    begun = with_classifier(stored, CONFIG, manifest(), seed=0)
    assert dtypes(begun) == {"float32"}
    task = finetune_task(begun, CONFIG, manifest(), steps=1)
    save(tmp_path / "after", finetuned(begun, task, begin(task)))
    assert dtypes(load(tmp_path / "after")) == {"float32"}


@pytest.mark.parametrize("kind", ["causal-lora", "distill"])
def test_what_learns_from_bfloat16_weights_is_float32(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 24, "num_layers": 1, "num_heads": 1, "mlp_dim": 48}
    monkeypatch.setitem(SIZES, "vit-tiny", small)
    stored = in_bfloat16(tmp_path / "stored", model(num_layers=1))
    if kind == "causal-lora":
        config = CausalLoraConfig(optimizer=TINY, data=DATA, window=1)
        task = causal_lora_task(stored, config, manifest(), steps=1)
    else:
        config = DistillConfig(optimizer=TINY, data=DATA, size="vit-tiny")
        task = distill_task(stored, config, manifest(), steps=1)
    state, metrics = jax.eval_shape(
        make_step(task), begin(task), task.frozen, batch(), jax.random.key(0)
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trained)} == {"float32"}
    assert metrics["loss"].dtype == jnp.float32


# Sizes


@pytest.mark.parametrize(
    ("rope_grid", "layers"), [("input", ()), ("config", ()), ("input", (0, 1))]
)
def test_what_is_saved_computes_what_was_trained(
    rope_grid: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    encoder = dataclasses.replace(model().config.encoder, rope_grid=rope_grid)
    params = {"encoder": random_params(Encoder(encoder))}
    plain = Model(
        config=ModelConfig(encoder=encoder), encoder=Encoder(encoder), params=params, source=None
    )
    begun = with_classifier(plain, CONFIG, manifest(), seed=0)
    head = dataclasses.replace(begun.config.classifier, layers=layers)
    begun = dataclasses.replace(
        begun,
        config=dataclasses.replace(begun.config, classifier=head),
        classifier=Classifier(head, encoder),
    )
    clip = dataclasses.replace(CLIP, num_frames=2, crop_size=64)
    data = dataclasses.replace(DATA, clip=clip)
    task = finetune_task(begun, dataclasses.replace(CONFIG, data=data), manifest(), steps=1)
    save(tmp_path / "after", finetuned(begun, task, begin(task)))
    after = load(tmp_path / "after")
    sizes = (after.config.encoder.crop_size, after.config.encoder.frames_per_clip)
    assert (*sizes, after.config.classifier.frames_per_clip) == (64, 2, 2)

    video = np.random.default_rng(0).integers(0, 256, (2, 2, 64, 64, 3)).astype(np.uint8)
    clips = Batch(video, np.array([2, 0], np.int32), np.array([0, 1], np.int32))
    loss, _ = task.loss(task.trained, {}, task.frozen, clips, jnp.array(0), jax.random.key(0))
    levels = after.encoder.apply(
        {"params": after.params["encoder"]},
        normalise(jnp.asarray(video)),
        method="levels",
        layers=layers or (1,),
    )
    tokens = jnp.concatenate(list(levels), axis=1)
    scores = after.classifier.apply({"params": after.params["classifier"]}, tokens)
    logs = jax.nn.log_softmax(scores)
    assert float(loss) == pytest.approx(-float(logs[0, 2] + logs[1, 0]) / 2, rel=1e-5)


def test_clips_that_the_encoder_cannot_take() -> None:
    for values in ({"crop_size": 40}, {"num_frames": 3}):
        data = dataclasses.replace(DATA, clip=dataclasses.replace(CLIP, **values))
        with pytest.raises(ConfigError, match=r"must be .*a multiple of"):
            with_classifier(model(), dataclasses.replace(CONFIG, data=data), manifest(), seed=0)


# The classifier


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model with a predictor, and a classifier of the classes a, b and c."""
    folder = tmp_path_factory.mktemp("named") / "model"
    whole = with_classifier(model(num_layers=1), CONFIG, manifest(classes=("a", "b", "c")), seed=5)
    predictor = PredictorConfig(hidden_size=24, num_layers=1, num_heads=1, mlp_dim=48)
    config = dataclasses.replace(whole.config, predictor=predictor)
    guesses = init_params(config, jax.random.key(0))["predictor"]
    params = {**whole.params, "predictor": guesses}
    save(folder, dataclasses.replace(whole, config=config, params=params))
    return folder


@pytest.mark.parametrize(
    ("labels", "options", "kept", "told"),
    [
        ((0, 2), [], True, "the model's own classifier of 3 classes goes on"),
        ("abc", [], True, "the model's own classifier of 3 classes goes on"),
        ((0, 1, 2, 3), [], False, "has label 3, the model's classifier 3 classes"),
        ("xyz", [], False, "has 3 classes (x, y, z), the model's classifier 3 classes (a, b, c)"),
        ((0, 1, 2), ["--new-classifier"], False, "of the model's own: --new-classifier"),
    ],
)
def test_a_classifier_that_fits_is_kept(
    labels: tuple[int, ...] | str,
    options: list[str],
    kept: bool,
    told: str,
    named: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clips = tmp_path / "list.csv"
    if isinstance(labels, str):
        clips = tmp_path / "clips"
        for name in labels:
            (clips / name).mkdir(parents=True)
            (clips / name / "1.mp4").touch()
    else:
        clips.write_text("".join(f"{label}.mp4 {label}\n" for label in labels))

    def no_training(command: commands.Finetune, task: Task, *others: object) -> object:
        command.out.mkdir()
        return begin(task)

    monkeypatch.setattr(commands.Finetune, "train", no_training)
    given = ["train", "finetune", str(named), str(clips), str(tmp_path / "run"), *options]
    sizes = ["--data.clip.num-frames", "4", "--data.clip.crop-size", "32"]
    assert cli.main([*given, *sizes, "--num-heads", "2", "--num-layers", "1"]) == 0
    assert told in " ".join(capsys.readouterr().out.split())
    before, after = load(named), load(tmp_path / "run" / "model")
    same = [np.asarray(some.params["classifier"]["linear"]["kernel"]) for some in (before, after)]
    assert np.array_equal(*same) == kept
    names = tuple(labels) if isinstance(labels, str) else tuple(map(str, labels))
    assert after.config.classifier.labels == (("a", "b", "c") if kept else names)
    assert set(after.params) == {"encoder", "classifier"}


def test_a_new_classifier_has_a_clip_of_each_class(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = r"list.csv: labels must be 0, 1, .* is 1000000, of row 1, but no row has 1, 2, .*\.\."
    with pytest.raises(DataError, match=right):
        with_classifier(model(), CONFIG, manifest((0, 1_000_000)), seed=0)
    (tmp_path / "list.csv").write_text("0.mp4 0\n1.mp4 1\n2.mp4 1000000\n")
    given = ["train", "finetune", str(named), str(tmp_path / "list.csv"), str(tmp_path / "run")]
    assert cli.main(given) == 2
    assert "without a gap; the largest is 1000000" in " ".join(capsys.readouterr().err.split())


def test_a_validation_numbers_the_same_classes() -> None:
    of_folder = manifest(classes=("down", "left", "up"))
    begun = with_classifier(model(num_layers=1), CONFIG, of_folder, seed=0)
    others = manifest((0, 1), source="held-out", classes=("left", "up"))
    with pytest.raises(DataError, match=r"held-out: its classes are left, up, and those of list"):
        finetune_task(begun, CONFIG, of_folder, others, steps=1)
    finetune_task(begun, CONFIG, of_folder, manifest((0, 1)), steps=1)  # nobody knows their names
