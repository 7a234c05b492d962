"""Options of training: values that cannot be, presets, what is frozen, and defaults that work."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from caches import random_cache
from flax.traverse_util import flatten_dict
from models import tiny_config
from pretraining import CONFIG, NOWHERE, V2, V2_1, WITH_IMAGES
from quality import in_memory, tiny_quality_config
from ratedvideos import kept_examples

from jvjepa import Encoder, cli
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError
from jvjepa.layers import Remat
from jvjepa.train import distill, pretrain
from jvjepa.train.causal_lora import CausalLoraConfig
from jvjepa.train.commands import Mos, main
from jvjepa.train.data import ClipConfig
from jvjepa.train.distill import DistillConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.finetune import FinetuneConfig
from jvjepa.train.initialisation import init_params
from jvjepa.train.mos import MosConfig, mos_task, scorer
from jvjepa.train.mos_features import made_of
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import PretrainConfig, make_branches, pretrain_task
from jvjepa.train.probe import probe_steps, probe_task
from jvjepa.train.probe_heads import ProbeConfig
from jvjepa.train.running import Run
from jvjepa.train.task import Task
from jvjepa.weights import Model, save

NAN, INF = float("nan"), float("inf")
SMALL = {"hidden_size": 24, "num_layers": 1, "num_heads": 1, "mlp_dim": 48}
KINDS = ("causal-lora", "distill", "finetune", "pretrain")
SetUp = Callable[..., tuple[Task, int]]
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V-JEPA 2.1 of width 48, and a list of 8 clips that nobody reads."""
    folder = tmp_path_factory.mktemp("options")
    encoder = dataclasses.replace(
        tiny_config(num_layers=2, crop_size=32),
        rope="interleaved",
        image_tokenizer=True,
        levels=(0, 1),
    )
    predictor = dataclasses.replace(V2_1.predictor, hidden_size=24, num_heads=1)
    config = ModelConfig(encoder=encoder, predictor=predictor)
    params = init_params(config, jax.random.key(0))
    save(
        folder / "model",
        Model(config=config, encoder=Encoder(encoder), params=params, source=None),
    )
    (folder / "clips.csv").write_text("".join(f"{i}.mp4 {i % 3}\n" for i in range(8)))
    return folder


@pytest.fixture
def set_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """Runs a command until its training would begin: the task, and for how many steps."""
    monkeypatch.setitem(distill.SIZES, "vit-small", SMALL)
    found: list[tuple[Task, int]] = []

    class Stopped(Exception):
        pass

    def stop(run: Run, task: Task, *_: object) -> None:
        found.append((task, run.loop.steps))
        raise Stopped

    monkeypatch.setattr(Run, "train", stop)

    def start(kind: str, *options: object, model: object = folder / "model") -> tuple[Task, int]:
        given = ["train", kind, model, folder / "clips.csv", folder / "run"]
        with contextlib.suppress(Stopped):
            assert cli.main([str(word) for word in (*given, *options)]) == 0
        return found.pop()

    return start


@pytest.fixture
def fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that is refused before it leaves anything: what it says."""

    def run(kind: str, *options: object, model: object = folder / "model") -> str:
        given = ["train", kind, model, folder / "clips.csv", folder / "run"]
        assert cli.main([str(word) for word in (*given, *options)]) == 2
        assert not (folder / "run").exists()
        return " ".join(capsys.readouterr().err.split())

    return run


# Values that cannot be

IMPOSSIBLE = {
    ClipConfig: {
        "num_frames": (0, True, 2.5, "16", None),
        "fps": (0, True, NAN, INF, "4"),
        "crop_size": (0, 32.0, False),
        "temporal": ("all", None),
        "clips": (0, 1.0),
        "spatial": ("center", []),
        "scale": ((0.5, 0.7, 0.9), (0.5,), (NAN, 1.0), (0.5, NAN), (True, 1), [0.3, 1.0], 0.5),
        "aspect": ((1.0,), (NAN, NAN), (1.0, INF), ("1", "2"), (2.0, 1.0), None),
        "flip": (NAN, True, -0.1, "0.5"),
        "view": (1, -1, 0.0, False),
        "views": (0, 2.0),
    },
    DataConfig: {
        "clip": (None, 16),
        "batch_size": (-3, 0, True, 8.0, "8"),
        "seed": (-1, 2**32, 0.5, True),
        "workers": ("a", -1, 1.0, None),
        "max_bad": (NAN, 1.1, -0.1, "0", True),
    },
    CausalLoraConfig: {
        "lora": (None,),
        "optimizer": (None,),
        "data": (ClipConfig(),),
        "window": (0, 8.0, True),
        "past": (-1, True, 0.5),
        "loss": ("l1",),
        "quantize": ("int3", 8),
        "dtype": ("float16", []),
        "remat": ("blocks", True, None),
    },
    DistillConfig: {
        "size": ("vit-huge", None, []),
        "window": (0, 2.5, True),
        "optimizer": (1e-4,),
        "data": (None,),
        "loss": (None,),
        "dtype": ("float16",),
        "remat": ("blocks",),
    },
    FinetuneConfig: {
        "optimizer": (None,),
        "data": (None,),
        "num_layers": (-1, 0, 1.5, True),
        "num_heads": (-1, 0, "16"),
        "smoothing": (NAN, 1, -0.1, True, "0"),
        "dtype": ("float16",),
        "remat": ("blocks",),
    },
    PretrainConfig: {
        "optimizer": (None,),
        "data": (None,),
        "images": (ClipConfig(num_frames=1),),
        "image_share": (0, 1, NAN, True, "0.5"),
        "video_masks": ((), [], 8),
        "image_masks": ((), (None,)),
        "mask_quantile": (1.5, NAN, True),
        "mask_index": (-1, True, 0.0),
        "context_weight": (-1.0, INF, True, "1"),
        "image_context_weight": (NAN, None),
        "context_ramp": (7, (1,), (1, 2, 3), (20, 10), (-1, 5), (1.0, 2.0), (False, True)),
        "distance_weighting": ("no", 1, None),
        "momentum": (True, 1.1, NAN, "1"),
        "final_momentum": (0.5, NAN, True),
        "dtype": ("float16",),
        "remat": ("blocks",),
    },
}
CASES = [
    (config, field, value)
    for config, fields in IMPOSSIBLE.items()
    for field, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("config", "field", "value"), CASES)
def test_impossible_values_are_named(config: type[Any], field: str, value: object) -> None:
    name = re.escape(f"{config.__name__}.{field} = {value!r}; it must be ")
    with pytest.raises(ConfigError, match=rf"{name}\w"):
        config(**{field: value})


@pytest.mark.parametrize("config", IMPOSSIBLE)
def test_every_field_is_checked(config: type[Any]) -> None:
    assert set(IMPOSSIBLE[config]) == {field.name for field in dataclasses.fields(config)}
    assert config() == config()


@pytest.mark.parametrize("remat", Remat.__args__)
def test_what_can_be_is_taken(remat: Remat) -> None:
    clip = ClipConfig(num_frames=2, fps=1, scale=(1, 1), aspect=(1, 1), flip=1, view=1, views=2)
    data = DataConfig(clip=clip, seed=2**32 - 1, max_bad=0)
    for config in (CausalLoraConfig, DistillConfig, FinetuneConfig, PretrainConfig):
        assert config(data=data, remat=remat).data.clip.view == 1
    assert PretrainConfig(context_ramp=(0, 1), momentum=0, final_momentum=1, images=data).images


# Clips that cannot be cut


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num-frames", 1, "ClipConfig.num_frames = 1; it must be a multiple of 2, and"),
        ("num-frames", 5, "ClipConfig.num_frames = 5; it must be a multiple of 2, and"),
        (
            "crop-size",
            40,
            "ClipConfig.crop_size = 40; it must be a multiple of the encoder's patch",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["causal-lora", "distill"])
def test_clips_that_cannot_be_cut_are_refused(
    fails: Fails, kind: str, option: str, value: int, message: str
) -> None:
    assert message in fails(kind, f"--data.clip.{option}", value)


def test_a_student_can_learn_from_single_tubelets(set_up: SetUp, fails: Fails) -> None:
    two = ["--data.clip.num-frames", 2, "--data.clip.crop-size", 32]
    assert set_up("distill", *two)[0].name == "distill"
    assert "it must be a multiple of 2, and 4 or more" in fails("causal-lora", *two)


# The architecture of a pretraining


def test_no_other_file_is_read_than_the_given_one(
    folder: Path, tmp_path: Path, set_up: SetUp, fails: Fails
) -> None:
    text = (folder / "model" / "config.json").read_text()
    own, other = tmp_path / "config.json", tmp_path / "other.json"
    own.write_text(text)
    other.write_text(text.replace('"mlp_dim": 144', '"mlp_dim": 96'))
    assert "other.json: an architecture is read of a file named" in fails("pretrain", model=other)
    task, _ = set_up("pretrain", "--data.clip.crop-size", 64, model=own)
    assert task.record["model"]["encoder"]["mlp_dim"] == 144


# Presets


def preset(path: Path, text: str) -> Path:
    path.write_text(f"from jvjepa.train.causal_lora import CausalLoraConfig\n{text}\n")
    return path


def test_a_preset_may_follow_an_equals_sign(tmp_path: Path, set_up: SetUp) -> None:
    mine = preset(tmp_path / "mine.py", "config = CausalLoraConfig(window=3)")
    for options, window in (
        ([f"--preset={mine}"], 3),
        (["--preset", mine, "--window", 2], 2),
        (["--window=2", f"--preset={mine}"], 2),
        (["--preset=causal_lora_vitl"], 8),
        (["--preset=causal_lora_vitl", f"--preset={mine}"], 3),  # the last counts
    ):
        assert set_up("causal-lora", *options)[0].record["window"] == window


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "it raises ZeroDivisionError: division by zero"),
        (
            "config = CausalLoraConfig(window=0)",
            "ConfigError: CausalLoraConfig.window = 0; it must",
        ),
        ("config = = 1", "it raises SyntaxError: invalid syntax"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("config = CausalLoraConfig()\nloop = 5", "it must define loop, a LoopConfig, not 5"),
        ("config = 5", "it must define config, a CausalLoraConfig, not 5"),
        ("", "it must define config, a CausalLoraConfig, not None"),
    ],
)
def test_a_preset_that_is_wrong_is_named(
    tmp_path: Path, fails: Fails, text: str, message: str
) -> None:
    mine = preset(tmp_path / "mine.py", text)
    said = fails("causal-lora", f"--preset={mine}")
    assert f"--preset {mine}: " in said
    assert message in said


def test_what_a_preset_raised_is_the_cause(tmp_path: Path) -> None:
    mine = preset(tmp_path / "mine.py", "raise KeyError('x\\ny')")
    with pytest.raises(ConfigError, match=r"mine\.py: it raises KeyError") as found:
        main(["causal-lora", "a", "b", "c", "--preset", str(mine)], console=None)
    assert isinstance(found.value.__cause__, KeyError)
    assert "\n" not in str(found.value)


def test_a_preset_must_follow(fails: Fails) -> None:
    for words in (["--preset"], ["--preset="]):
        assert "--preset: a name or a file has to follow" in fails("distill", *words)
    assert "--preset nothing: there is none; there are causal_lora_vitl" in fails(
        "distill", "--preset=nothing"
    )


@pytest.mark.parametrize("kind", [*KINDS, "probe", "mos"])
def test_help_names_presets(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", kind, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--preset NAME" in shown
    assert "causal_lora_vitl, cooldown_2_1_vitg" in shown


# What is frozen

GROUPS = """
from jvjepa.train.finetune import FinetuneConfig
from jvjepa.train.optimizer import OptimizerConfig, ParameterGroup, layer_decay
groups = (
    {}ParameterGroup(pattern="{}", learning_rate=10.0),
    ParameterGroup(pattern=".*"),
)
config = {}(optimizer=OptimizerConfig(learning_rate=1e-3, groups=groups))
"""


def frozen(task: Task) -> set[str]:
    """What is frozen, up to the part of a block."""
    return {"/".join(name.split("/")[:2]) for name in flatten_dict(task.frozen, sep="/")}


def test_patterns_freeze(tmp_path: Path, set_up: SetUp, fails: Fails) -> None:
    norms, pooler = "encoder/norms/.*", "classifier/pooler/.*"
    assert frozen(set_up("finetune")[0]) == set()
    assert frozen(set_up("finetune", "--freeze-regex", norms)[0]) == {"encoder/norms"}
    both = set_up("finetune", "--freeze-regex", norms, pooler, "--freeze", 0.5)[0]
    embeddings = {
        f"encoder/{name}"
        for name in ("patch_embed", "patch_embed_image", "image_embed", "video_embed")
    }
    rest = {"encoder/blocks_0", "encoder/norms", "classifier/pooler"}
    assert frozen(both) == embeddings | rest
    # The groups of a preset say what the others do, and those that are frozen whole do not matter.
    mine = preset(
        tmp_path / "mine.py",
        GROUPS.format("*layer_decay(0.5, 2), ", "classifier/linear/.*", "FinetuneConfig"),
    )
    task = set_up("finetune", "--preset", mine, "--freeze-regex", pooler, "--freeze", 0.5)[0]
    assert frozen(task) == embeddings | {"encoder/blocks_0", "classifier/pooler"}
    groups = task.record["optimizer"]["groups"]
    assert [(group["pattern"], group["learning_rate"]) for group in groups][-3:] == [
        ("encoder/blocks_1/.*", 0.5),
        ("classifier/linear/.*", 10.0),
        (".*", 1.0),
    ]
    # One that is frozen twice is no mistake.
    again = set_up("finetune", "--freeze-regex", "encoder/blocks_0/mlp/.*", "--freeze", 0.5)[0]
    assert frozen(again) == embeddings | {"encoder/blocks_0"}
    said = fails("finetune", "--freeze-regex", "encoder/blokcs_0/.*")
    assert "'encoder/blokcs_0/.*' matches no parameter; near are encoder/blocks_0/" in said
    assert "pattern = '('; it is wrong: missing )" in fails("finetune", "--freeze-regex", "(")
    assert "all parameters are frozen" in fails("finetune", "--freeze-regex", ".*")


def test_groups_of_adapters_have_the_names_that_are_told(tmp_path: Path, set_up: SetUp) -> None:
    name = re.search(r'group patterns see "(.*)"', CausalLoraConfig.__doc__)[1]
    mine = preset(tmp_path / "mine.py", GROUPS.format("", name, "CausalLoraConfig"))
    task, _ = set_up("causal-lora", "--preset", mine)
    assert [group["pattern"] for group in task.record["optimizer"]["groups"]] == [name, ".*"]


# Schedules and defaults


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_can_be_set_up(set_up: SetUp, kind: str) -> None:
    task, steps = set_up(kind)
    assert task.name == kind
    assert steps == (300_000 if kind == "pretrain" else 10_000)


def test_the_defaults_of_probes_and_quality_can_be_set_up(tmp_path: Path) -> None:
    encoder = tiny_config(head_width=24, num_layers=1, crop_size=32)
    training = random_cache(128)
    values = training.values.repeat(2, axis=-1)
    training = dataclasses.replace(training, encoder=encoder, values=values)
    config = ProbeConfig(kind="linear")
    assert probe_task(config, training, training).name == "probe"
    assert probe_steps(config, training) == 20
    model = in_memory(tiny_quality_config(), tmp_path / "tokenizer")
    part = scorer(model, MosConfig())
    kept = (np.ones((10, 8, 48), np.float32), np.ones((10, 24), np.float32))
    scores = np.arange(50, dtype=np.float32).reshape(10, 5) / 10
    some = kept_examples(tmp_path / "set", *kept, scores, made_of(part.model, part.kept))
    steps = Mos.__dataclass_fields__["loop"].default_factory().steps
    assert mos_task(part, MosConfig(), some, steps=steps).name == "mos"


@pytest.mark.parametrize(
    ("model", "changes", "steps", "refused"),
    [
        (V2_1, {"context_ramp": (100, 200)}, 100, True),
        (V2_1, {"context_ramp": (99, 200)}, 100, True),
        (V2_1, {"context_ramp": (98, 200)}, 100, False),
        (V2_1, {"context_ramp": None}, 100, False),
        (V2_1, {"context_ramp": (100, 200), "context_weight": 0}, 100, False),
        (V2, {"context_ramp": (100, 200)}, 100, False),
    ],
)
def test_a_loss_that_would_never_count_is_refused(
    model: ModelConfig, changes: dict[str, Any], steps: int, refused: bool
) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    message = r"context_ramp = \(\d+, 200\); it must be None, or begin before .* steps = 100; else"
    with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
        pretrain_task(model, config, NOWHERE, steps=steps)
    if not refused and config.context_ramp and not config.context_weight:
        mixed = dataclasses.replace(config, images=WITH_IMAGES.images)
        with pytest.raises(ConfigError, match=message):
            pretrain_task(model, mixed, NOWHERE, NOWHERE, steps=steps)


def test_schedules_are_checked_before_parameters_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(model: ModelConfig, key: jax.Array) -> Any:
        assert isinstance(key, jax.core.Tracer)  # shapes alone
        return init_params(model, key)

    monkeypatch.setattr(pretrain, "init_params", draw)
    long = dataclasses.replace(
        CONFIG, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=101)
    )
    with pytest.raises(ConfigError, match="warmup_steps = 101; it must be at most the steps"):
        pretrain_task(V2_1, long, NOWHERE, steps=100)
    whole = dataclasses.replace(CONFIG.video_masks[0], num_blocks=8, spatial_scale=(1.0, 1.0))
    masked = dataclasses.replace(CONFIG, video_masks=(whole,))
    with pytest.raises(ConfigError, match="leaves no context on the grid"):
        pretrain_task(V2_1, masked, NOWHERE, steps=100)


def test_pretraining_takes_an_attention_backend(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def branches(*given: object) -> Any:
        found.append(make_branches(*given))
        return found[-1]

    monkeypatch.setattr(pretrain, "make_branches", branches)
    set_up("pretrain", "--attention", "xla", "--data.clip.crop-size", 64)
    [(video, _)] = found
    assert (video.encoder.attention, video.predictor.attention) == ("xla", "xla")
