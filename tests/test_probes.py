"""Meta's probes: what they are, what they fit, and the names of their classes."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from commandline import refused, run

from jvjepa.config import ClassifierConfig
from jvjepa.convert import Hints, attach_probe, convert, read_labels
from jvjepa.convert.architecture import infer_probe
from jvjepa.convert.meta import meta_entries
from jvjepa.convert.tables import expected_shapes
from jvjepa.errors import InputError
from jvjepa.registry import PROBES, RELEASES
from jvjepa.weights import read_record

TINY, PROBE = (official.GOLDEN / f"vjepa2_tiny{name}.pt" for name in ("", "_probe"))
LABELS = tuple("abcdefg")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder`, converted, and `probe`, the same with a probe attached; read only."""
    folder = tmp_path_factory.mktemp("probes")
    hints = Hints(heads=2, predictor_heads=2, crop_size=64)
    convert(str(TINY), folder / "encoder", hints=hints)
    attach_probe(PROBE, folder / "encoder", folder / "probe", labels=LABELS, heads=2)
    return folder


def test_probes_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    encoder, out = made / "encoder", tmp_path / "out"

    def refuse(message: str, probe: Path = PROBE, encoder: Path = encoder, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            attach_probe(probe, encoder, out, **{"labels": LABELS, "heads": 2, **options})
        assert not out.exists()

    refuse("has 7 classes, and there are 2 labels", labels=("a", "b"))
    refuse("has a classifier already", encoder=made / "probe")
    refuse("num_heads = 5; it must be a divisor of the encoder's width 32", heads=5)
    refuse(r"layers = \(1, 9\); it must be among", layers=(1, 9))
    refuse("num_heads = 0; it must be a whole number above 0", heads=0)
    refuse("frames_per_clip = 0; it must be a whole number above 0", frames=0)
    refuse("frames_per_clip = 3; it must be 1 or a multiple of .* tubelet_size, 2", frames=3)
    refuse("probe-index = 1; .* has 0 to 0", index=1)
    refuse("has no classifiers, so it is no probe", probe=TINY)
    content = torch.load(PROBE, weights_only=True)
    content["classifiers"] *= 3
    torch.save(content, tmp_path / "grid.pt")
    refuse("holds 3 classifiers, .* --probe-index, 0 to 2", probe=tmp_path / "grid.pt")
    wide = {"module.pooler.query_tokens": torch.ones(1, 1, 48)}
    content["classifiers"] = [content["classifiers"][0] | wide]
    torch.save(content, tmp_path / "wide.pt")
    refuse(r"query_tokens has shape \[1, 1, 48\]", probe=tmp_path / "wide.pt")
    content["classifiers"] = [{"module.verb_classifier.weight": torch.ones(3, 32)}]
    torch.save(content, tmp_path / "ek100.pt")
    refuse("action anticipation", probe=tmp_path / "ek100.pt")


def test_a_probe_that_sees_several_layers(made: Path, tmp_path: Path) -> None:
    attach_probe(PROBE, made / "encoder", tmp_path / "out", labels=LABELS, layers=(1, 3))
    classifier = read_record(tmp_path / "out")[0].classifier
    assert classifier.layers == (1, 3)
    assert classifier.num_heads == 16
    assert classifier.layer_norm_eps == 1e-5


@pytest.mark.parametrize("name", PROBES)
def test_every_released_probe_is_known_by_its_name(name: str) -> None:
    released = PROBES[name]
    labels = tuple(map(str, range(released.num_classes)))
    classifier = ClassifierConfig(
        labels=labels,
        num_heads=16,
        layer_norm_eps=1e-5,
        layers=released.layers,
        frames_per_clip=released.frames,
    )
    config = dataclasses.replace(RELEASES[released.encoder].config, classifier=classifier)
    wanted = [entry for entry in meta_entries(config) if entry.part == "classifier"]
    shapes, unsaid = expected_shapes(wanted), {"heads": None, "layers": None, "frames": None}
    file = Path(released.source.rpartition("/")[2])
    assert infer_probe(file, shapes, labels, **unsaid) == classifier
    said = infer_probe(file, shapes, labels, heads=8, layers=(), frames=8)
    changes = {"num_heads": 8, "layers": (), "frames_per_clip": 8}
    assert said == dataclasses.replace(classifier, **changes)
    mine = infer_probe(Path("mine.pt"), shapes, labels, **unsaid)
    assert mine == dataclasses.replace(classifier, layers=(), frames_per_clip=None)


def test_the_frames_of_a_probe_are_its_own(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    probe, labels = tmp_path / "ssv2-vitl-16x2x3.pt", tmp_path / "labels.txt"
    shutil.copy(PROBE, probe)
    labels.write_text("\n".join(LABELS))
    attach = ("convert", "--probe", probe, "--encoder", made / "encoder", "--labels", labels)
    for options, frames in (((), 16), (("--probe-frames", "8"), 8)):
        assert run(*attach, *options, "--force", tmp_path / "out") == 0
        config = read_record(tmp_path / "out")[0]
        assert config.classifier.frames_per_clip == frames
        assert config.encoder.frames_per_clip == 64
    assert read_record(made / "probe")[0].classifier.frames_per_clip is None
    source = ("convert", TINY, tmp_path / "other")
    message = refused(capfd, *source, "--probe-frames", "8")
    assert message.startswith("--probe-frames is for --probe")


def test_labels(tmp_path: Path) -> None:
    for name, text in (
        ("list.json", '["a", "b"]'),
        ("object.json", '{"1": "b", "0": "a"}'),
        ("config.json", '{"id2label": {"0": "a", "1": "b"}, "hidden_size": 3}'),
        ("lines.txt", "a\nb\n"),
    ):
        (tmp_path / name).write_text(text)
        assert read_labels(tmp_path / name) == ("a", "b")
    for text, message in (
        ("{", "is not JSON"),
        ('["a", 1]', "must hold the names"),
        ('["a", ""]', "none of them empty"),
        ('{"0": "a", "2": "b"}', "keys must be 0 to 1"),
        ("3", "must hold the names"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / "bad.json")
