"""Anticipation is Meta's: against its outputs where there are some, else against a PyTorch port.

Compiling takes most of the time, so that tests share models and shapes where they can.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import torch
from anticipators import CLASSES, GOLDEN, LABELS, V2, WIDTH, probe_tensors, setup, write_epic
from commandline import refused, run
from hfcheckpoints import save_checkpoint, tiny_config
from models import compiled, random_video, relative_error

import jvjepa
from jvjepa import anticipation
from jvjepa.anticipation import Anticipation, Anticipator, anticipate, extended_tokens
from jvjepa.config import AnticipatorConfig, EncoderConfig, ModelConfig
from jvjepa.convert import (
    ActionLabels,
    Hints,
    attach_probe,
    convert,
    diagnose,
    export_hf,
    verification,
    verify,
)
from jvjepa.convert.comparison import Size, compare_anticipator
from jvjepa.convert.official import Official
from jvjepa.encoder import concatenate_levels
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import count_parameters, parameter_shapes, unstack_layers

MODULE = 1e-5


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def worst(found: Anticipation, expected: dict[str, np.ndarray]) -> float:
    """The largest error of any kind of classes."""
    given = {kind for kind, logits in found._asdict().items() if logits is not None}
    assert given == set(expected)
    return max(relative_error(getattr(found, kind), right) for kind, right in expected.items())


# --- Against the original -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "num_steps"),
    [(V2, (4, 64, 64), 1), ("vjepa2_1_tiny_teacher", (6, 48, 80), 2)],
)
def test_logits_are_those_of_the_original(
    name: str, size: tuple[int, int, int], num_steps: int
) -> None:
    model, clips, seconds = setup(name), random_video(2, *size), np.array([0.3, 1.75])
    found = anticipate(*model.parts, clips, seconds, num_steps=num_steps)
    expected = model.theirs.anticipate(clips, seconds, num_steps)
    assert {kind: logits.shape for kind, logits in expected.items()} == {
        kind: (2, count) for kind, count in CLASSES.items()
    }
    assert worst(found, expected) <= MODULE
    later = anticipate(*model.parts, clips, seconds[::-1], num_steps=num_steps)
    assert worst(later, expected) > 10 * MODULE
    assert worst(found, model.theirs.anticipate(clips, seconds, 3 - num_steps)) > 10 * MODULE


def test_more_frames_at_a_time_and_another_rate() -> None:
    model = setup(output_frames=4, frames_per_second=10)
    clips, seconds = random_video(2, 6, 64, 48), np.array([0.0, 0.7])  # the second: 3.5 tubelets
    found = anticipate(*model.parts, clips, seconds, num_steps=2)
    assert worst(found, model.theirs.anticipate(clips, seconds, 2)) <= MODULE
    for fields in ({}, {"output_frames": 4}, {"frames_per_second": 10}):
        other = setup(**fields).theirs.anticipate(clips, seconds, 2)
        assert worst(found, other) > 10 * MODULE


def test_a_probe_for_actions_alone() -> None:
    model, tokens = setup(actions_only=True), random_tokens(2, 9, WIDTH)
    found = compiled(model.anticipator, model.params["anticipator"], tokens)
    assert found.verbs is found.nouns is None
    assert worst(found, model.theirs.action_logits(tokens)) <= MODULE


def test_each_query_and_head_is_metas_classifier() -> None:
    """A golden probe in the place of one kind gives the golden logits."""
    data, rng = official.data(V2), np.random.default_rng(0)
    golden, seven = official.weights("vjepa2_tiny_probe.pt", "classifiers", 0), tuple("abcdefg")
    head = AnticipatorConfig(actions=seven, verbs=seven, nouns=seven, num_layers=2, num_heads=2)
    config = dataclasses.replace(official.V2, classifier=None, anticipator=head)
    run_ours = jax.jit(Anticipator(head, config.encoder).apply)
    for place in range(3):
        theirs = dict(golden)
        linear = {key: theirs.pop(f"linear.{key}") for key in ("weight", "bias")}
        queries = random_tokens(1, 3, WIDTH)
        queries[:, place] = golden["pooler.query_tokens"][:, 0]
        theirs["pooler.query_tokens"] = queries
        for i, kind in enumerate(("verb", "noun", "action")):
            for key, value in linear.items():
                other = rng.normal(size=value.shape).astype(np.float32)
                theirs[f"{kind}_classifier.{key}"] = value if i == place else other
        found = run_ours({"params": official.anticipator(theirs)}, data["out.video"])
        tensors = {name: torch.from_numpy(value) for name, value in theirs.items()}
        port = Official(config, {"anticipator": tensors}, rounding="float32")
        again = port.action_logits(data["out.video"])
        for i, kind in enumerate(CLASSES):
            error = relative_error(found[i], data["out.logits"])
            assert error <= MODULE if i == place else error > 0.1
            assert relative_error(found[i], again[kind]) <= MODULE


# --- Which places are predicted -----------------------------------------------------------------


def test_the_predictor_is_asked_for_the_tubelets_after_the_clip() -> None:
    model, clips = setup("vjepa2_1_tiny_teacher"), random_video(2, 4, 32, 48)
    seconds, tubelets = [1.2, 0.24], [4, 0]  # 8 frames a second are 4 tubelets
    config = model.config.anticipator
    how = {"encoder": model.encoder, "predictor": model.predictor, "config": config}
    found = jax.jit(
        functools.partial(extended_tokens, **how, seconds=np.array(seconds), num_steps=2)
    )(params=model.params, video=clips)
    levels = compiled(model.encoder, model.params["encoder"], clips, method="levels")
    tokens = np.asarray(concatenate_levels(levels))  # 2 tubelets of 2 x 3
    ids = np.array([[12 + 6 * ahead + i for i in range(6)] for ahead in tubelets])
    seen = np.tile(np.arange(12), (2, 1))
    expected = [tokens]
    predict = jax.jit(functools.partial(model.predictor.apply, grid=(7, 2, 3)))
    for _ in range(2):
        variables = {"params": model.params["predictor"]}
        expected.append(predict(variables, tokens, seen, ids).targets)
        tokens = np.concatenate([tokens[:, 6:], expected[-1]], axis=1)
    assert relative_error(found, np.concatenate(expected, axis=1)[..., -WIDTH:]) <= MODULE


def test_time_counts_in_whole_tubelets() -> None:
    model, clips = setup(), random_video(2, 4, 64, 64)

    def actions(seconds: Any) -> np.ndarray:
        return np.asarray(anticipate(*model.parts, clips, seconds).actions)

    same = actions(1.0)
    for seconds in (1.2, 1.2499, 1, [1.0, 1.1], np.float32([1.2, 1.0]), jnp.float32(1.0)):
        assert np.array_equal(actions(seconds), same)
    for seconds in (0.99, 1.25):
        assert relative_error(actions(seconds), same) > 10 * MODULE
    assert np.isfinite(actions(60.0)).all()


# --- As a compiled function ---------------------------------------------------------------------


def test_traced_seconds(compilations: Callable[[], int]) -> None:
    model, clips = setup(), random_video(2, 4, 64, 64)
    step = jax.jit(lambda clips, seconds: anticipate(*model.parts, clips, seconds))
    expected = model.theirs.anticipate(clips, np.array([0.3, 1.75]))
    assert worst(step(clips, np.float32([0.3, 1.75])), expected) <= MODULE
    before = compilations()
    for wrong in (-0.01, -1.0, 60.01, np.inf, -np.inf, np.nan, 1e9):
        found = step(clips, np.float32([0.3, wrong]))
        for kind, right in expected.items():
            good, bad = np.asarray(getattr(found, kind))
            assert np.isnan(bad).all()
            assert relative_error(good, right[0]) <= MODULE
    assert np.isfinite(np.asarray(step(clips, np.float32([0.0, 60.0])).actions)).all()
    assert compilations() == before
    with pytest.raises(InputError, match="seconds is int32"):
        step(clips, np.int32([1, 2]))


def test_another_time_compiles_nothing(compilations: Callable[[], int]) -> None:
    model, clips = setup(), random_video(2, 4, 64, 64)
    anticipate(*model.parts, clips, 1.0)
    before = compilations()
    for seconds in (0.25, [1.75, 0.0], np.array([0.5, 1.0])):
        anticipate(*model.parts, clips, seconds)
    assert compilations() == before


def test_unrolled_layers_in_bfloat16() -> None:
    model, clips, dtype = setup(), random_video(2, 4, 64, 64), jnp.bfloat16
    params = unstack_layers(jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), model.params))
    how = {"dtype": dtype, "param_dtype": dtype, "scan": False}
    parts = [dataclasses.replace(part, **how) for part in model.parts[:3]]
    found = anticipate(*parts, params, clips)
    assert found.actions.dtype == dtype
    assert MODULE < worst(found, model.theirs.anticipate(clips, np.ones(2))) <= 0.1


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"seconds": -0.5}, r"seconds = -0\.5; it must be 0 to 60"),
        ({"seconds": 1000}, "seconds = 1000; it must be 0 to 60"),
        ({"seconds": [1.0, np.nan]}, "seconds = nan; it must be 0 to 60"),
        ({"seconds": np.ones(3)}, r"seconds is float64 \[3\]; it must be a number or float \[2\]"),
        ({"num_steps": 0}, "num_steps = 0; it must be 1 or more"),
        ({"video": random_video(2, 1, 64, 64)}, "video has T = 1 frames; .* needs 2 or more"),
        ({"video": random_video(2, 3, 64, 64)}, "video has T = 3 frames; take 1, or"),
        ({"video": random_video(2, 64, 64)}, r"must be \[B, T, H, W, 3\]"),
    ],
)
def test_bad_input(how: dict[str, Any], message: str) -> None:
    good = {"video": random_video(2, 4, 64, 64), "seconds": 1.0}
    with pytest.raises(InputError, match=message):
        anticipate(*setup().parts, **{**good, **how})


def test_tokens_that_cannot_be_right() -> None:
    model = setup()
    with pytest.raises(InputError, match=r"tokens have shape \(2, 4, 31\)"):
        compiled(model.anticipator, model.params["anticipator"], np.zeros((2, 4, 31), np.float32))


def test_the_configuration() -> None:
    config = setup().config
    head, predictor = config.anticipator, config.predictor
    assert ModelConfig.from_json(config.to_json()) == config
    assert head.heads == ("verbs", "nouns", "actions")
    assert AnticipatorConfig(actions=("a",)).heads == ("actions",)
    for changes, message in (
        ({"predictor": None}, "ModelConfig.predictor = None; it must be there"),
        (
            {"predictor": dataclasses.replace(predictor, output_dim=96)},
            "PredictorConfig.output_dim = 96; it must be the encoder's width",
        ),
        (
            {"anticipator": dataclasses.replace(head, num_heads=5)},
            "AnticipatorConfig.num_heads = 5; it must be a divisor of the encoder's width 32",
        ),
        (
            {"anticipator": dataclasses.replace(head, frames_per_clip=33)},
            "AnticipatorConfig.frames_per_clip = 33; it must be 1 or a multiple of",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **changes)
    for changes, message in (
        ({"verbs": ()}, r"verbs = \(\); it must be a tuple of one or more names"),
        ({"nouns": ()}, r"nouns = \(\); it must be a tuple of one or more names"),
        ({"actions": ()}, r"actions = \(\); it must be"),
        ({"actions": (1,)}, r"actions = \(1,\); it must be"),
        ({"output_frames": 0}, "output_frames = 0; it must be a whole number above 0"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps = 0\.0; it must be between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(head, **changes)


# --- From a file --------------------------------------------------------------------------------

PAIRS = [(0, 0), (1, 1), (2, 3), (0, 2), (1, 3), (0, 0)]  # 3 verbs, 4 nouns, 5 actions
LABEL_SET = ActionLabels(**LABELS)
ENDS = ("anticipator, weights", "anticipator", "anticipation")  # what verify compares last


def save_probe(path: Path, tensors: official.Weights) -> Path:
    named = {f"module.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"classifiers": [named], "epoch": 20}, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`probe.pt`, the golden models converted, and `ek100`, one of them with it; read only."""
    folder = tmp_path_factory.mktemp("anticipation")
    hints = Hints(heads=2, predictor_heads=2, crop_size=64)
    for name in (*GOLDEN, "vjepa2_1_tiny_distilled", "vjepa2_ac_tiny"):
        convert(str(official.GOLDEN / f"{name}.pt"), folder / name, hints=hints)
    probe = save_probe(folder / "probe.pt", probe_tensors())
    attach_probe(probe, folder / V2, folder / "ek100", labels=LABEL_SET, heads=4)
    return folder


def test_the_whole_way_from_a_file_to_logits(made: Path) -> None:
    model, right = jvjepa.load(made / "ek100"), setup()
    assert model.config.anticipator == right.config.anticipator
    jax.tree.map(np.testing.assert_array_equal, model.params, right.params)
    assert model.source.probe.keys == {"anticipator": "classifiers[0]"}
    count = count_parameters(model.config)["anticipator"]
    assert count == sum(value.size for value in probe_tensors().values())


def test_a_saved_model_is_the_same(made: Path, tmp_path: Path) -> None:
    model = jvjepa.load(made / "ek100", scan=False)
    jvjepa.save(tmp_path / "again", model)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made / "ek100" / name).read_bytes()


def test_the_checks_tell_queries_apart() -> None:
    model = setup()
    ours = jvjepa.Model(
        config=model.config,
        encoder=model.encoder,
        anticipator=model.anticipator,
        params=model.params,
        source=None,
    )
    size, rng = Size(clips=2, frames=4, rounded=False), np.random.default_rng(0)
    assert compare_anticipator(ours, model.theirs, size, rng).ok
    tensors = {name: torch.from_numpy(value) for name, value in probe_tensors().items()}
    tensors["pooler.query_tokens"] = tensors["pooler.query_tokens"][:, [1, 0, 2]]
    swapped = Official(model.config, {"anticipator": tensors}, rounding="float32")
    assert not compare_anticipator(ours, swapped, size, rng).ok


def test_an_encoder_of_hugging_faces(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config(head_width=16))
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    attach_probe(made / "probe.pt", tmp_path / "ours", tmp_path / "out", labels=LABEL_SET, heads=4)
    monkeypatch.setattr(verification, "compare_parts", lambda *_: [])  # it takes long to compile
    checks = verify(tmp_path / "out", str(tmp_path / "hf"), probe=made / "probe.pt")
    assert [check.name for check in checks if not check.ok] == []
    assert [check.name for check in checks][-2:] == ["anticipator, weights", "anticipator"]
    with pytest.raises(ConfigError, match="there is an anticipator of actions, which transformers"):
        export_hf(tmp_path / "out", tmp_path / "back")


def test_what_does_not_fit_is_refused(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refuse(message: str, encoder: str = V2, tensors: Any = None, **how: Any) -> None:
        probe = made / "probe.pt" if tensors is None else save_probe(tmp_path / "p.pt", tensors)
        with pytest.raises(InputError, match=message):
            attach_probe(probe, made / encoder, out, **{"labels": LABEL_SET, "heads": 4, **how})
        assert not out.exists()

    refuse("vjepa2_ac_tiny has no predictor, without which", encoder="vjepa2_ac_tiny")
    refuse("output_dim = 96; it must be the encoder's width", encoder="vjepa2_1_tiny_distilled")
    refuse("ek100 has a classifier already", encoder="ek100")
    few = dataclasses.replace(LABEL_SET, verbs=LABEL_SET.verbs[1:])
    message = "has 3 verbs, 4 nouns, 5 actions, and there are labels for 2 verbs, 4 nouns, 5 act"
    refuse(message, labels=few)
    refuse("has 3 verbs, .* labels for 0 verbs, 0 nouns, 5 actions", labels=LABEL_SET.actions)
    refuse("anticipates actions; --probe-layers is for classifiers", layers=(1,))
    refuse("num_heads = 5; it must be a divisor", heads=5)
    refuse("frames_per_clip = 3; it must be 1 or a multiple", frames=3)
    tensors = probe_tensors()
    del tensors["action_classifier.weight"]
    refuse("has no anticipator.action_classifier.weight", tensors=tensors)
    tensors = probe_tensors()
    del tensors["noun_classifier.bias"]
    refuse("missing anticipator.noun_classifier.bias", tensors=tensors)
    one_query = {"pooler.query_tokens": probe_tensors()["pooler.query_tokens"][:, :1].copy()}
    refuse(r"query_tokens has shape \[1, 1, 32\], \[1, 3", tensors=probe_tensors() | one_query)


def test_a_file_of_actions_alone(made: Path, tmp_path: Path) -> None:
    tensors = probe_tensors({"actions": 5})
    probe = save_probe(tmp_path / "coin.pt", tensors)
    attach_probe(probe, made / V2, tmp_path / "out", labels=LABELS["actions"], heads=4)
    model, right = jvjepa.load(tmp_path / "out"), setup(actions_only=True)
    assert model.config.anticipator == right.config.anticipator
    jax.tree.map(np.testing.assert_array_equal, model.params, right.params)
    assert diagnose(probe).facts["classes"] == "5 actions, on an encoder of width 32"


def test_the_commands(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, probe, source = tmp_path / "out", made / "probe.pt", official.GOLDEN / f"{V2}.pt"
    labels = write_epic(tmp_path / "epic", PAIRS)
    attach = ("convert", "--probe", probe, "--encoder", made / V2, out, "--probe-heads", "4")
    assert run(*attach, "--labels", labels, "--probe-frames", "8") == 0
    config = jvjepa.load(out).config.anticipator
    assert (config.frames_per_clip, config.num_heads) == (8, 4)
    assert sorted(config.verbs) == ["verb 0", "verb 1", "verb 2"]
    assert set(config.actions) == {f"verb {verb} noun {noun}" for verb, noun in PAIRS}
    assert run("verify", out, source, "--probe", probe) == 0
    lines = capfd.readouterr().out.splitlines()[-3:]
    for line, name in zip(lines, ENDS, strict=True):
        assert line.startswith(f"ok   {name} ")
    assert "3 verbs, 4 nouns, 5 actions" in lines[1]
    assert "2 x 4 frames of 64 x 64, 1 to 1.75 s ahead" in lines[2]
    assert "give it with --probe" in refused(capfd, "verify", out, source)
    assert run("info", out) == 0
    assert "anticipator:" in capfd.readouterr().out
    assert run("doctor", out) == 0
    assert f"next: jvjepa anticipate {out} VIDEO" in capfd.readouterr().out
    assert run("doctor", probe) == 0
    assert "3 verbs, 4 nouns, 5 actions, on an encoder of width 32" in capfd.readouterr().out
    tensors = {name: x for name, x in probe_tensors().items() if "action_classifier" not in name}
    (problem,) = diagnose(save_probe(tmp_path / "damaged.pt", tensors)).problems
    assert problem == "it has no anticipator.action_classifier.weight"


def test_released_parts_have_the_shapes_that_modules_make() -> None:
    encoder = EncoderConfig(hidden_size=48, num_layers=2, num_heads=2, mlp_dim=64)
    head = AnticipatorConfig(**LABELS, num_heads=4)
    tokens = jax.ShapeDtypeStruct((1, 6, 48), jnp.float32)
    made = jax.eval_shape(Anticipator(head, encoder).init, jax.random.key(0), tokens)
    found = {
        "/".join(["anticipator", *(key.key for key in path)]): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(made["params"])
    }
    predictor = official.V2.predictor
    listed = parameter_shapes(ModelConfig(encoder=encoder, predictor=predictor, anticipator=head))
    assert found == {name: shape for name, shape in listed.items() if name.startswith("antic")}
    assert anticipation.FARTHEST == 60.0
