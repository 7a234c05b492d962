"""Meta's probes: what they are, what they fit, and the names of their classes."""

import dataclasses
import random
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from anticipators import EPIC_NAMES, write_epic
from commandline import refused, run

import jvjepa
from jvjepa.config import AnticipatorConfig, ClassifierConfig
from jvjepa.convert import (
    ActionLabels,
    Hints,
    attach_probe,
    convert,
    read_epic_labels,
    read_labels,
    verify,
)
from jvjepa.convert.architecture import infer_anticipator, infer_probe
from jvjepa.convert.meta import meta_entries
from jvjepa.convert.tables import expected_shapes
from jvjepa.errors import InputError
from jvjepa.registry import PROBES, RELEASES, Probe
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
    names = ActionLabels(actions=LABELS)
    refuse("is a classifier; its labels are names, not verbs and nouns", labels=names)


def test_a_probe_on_an_encoder_that_was_not_converted(made: Path, tmp_path: Path) -> None:
    model = jvjepa.load(made / "encoder")
    jvjepa.save(tmp_path / "encoder", dataclasses.replace(model, source=None))
    attach_probe(PROBE, tmp_path / "encoder", tmp_path / "out", labels=LABELS, heads=2)
    _, source = read_record(tmp_path / "out")
    assert source.name == str(tmp_path / "encoder")
    assert source.probe == read_record(made / "probe")[1].probe
    checks = verify(tmp_path / "out", str(TINY), probe=PROBE)
    assert {check.name for check in checks if check.ok} >= {"classifier, weights", "classifier"}


def test_a_probe_that_sees_several_layers(made: Path, tmp_path: Path) -> None:
    attach_probe(PROBE, made / "encoder", tmp_path / "out", labels=LABELS, layers=(1, 3))
    classifier = read_record(tmp_path / "out")[0].classifier
    assert classifier.layers == (1, 3)
    assert classifier.num_heads == 16
    assert classifier.layer_norm_eps == 1e-5


@pytest.mark.parametrize("name", PROBES)
def test_every_released_probe_is_known_by_its_name(name: str) -> None:
    released = PROBES[name]
    if released.verbs:
        check_anticipator(released)
        return
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


def check_anticipator(released: Probe) -> None:
    def names(count: int) -> tuple[str, ...]:
        return tuple(map(str, range(count)))

    counts = (released.num_classes, released.verbs, released.nouns)
    labels = ActionLabels(
        **dict(zip(("actions", "verbs", "nouns"), map(names, counts), strict=True))
    )
    right = AnticipatorConfig(**dataclasses.asdict(labels))
    assert (right.num_heads, right.layer_norm_eps, right.num_layers) == (16, 1e-5, 3)
    assert (right.frames_per_clip, right.frames_per_second) == (released.frames, 8) == (32, 8)
    config = dataclasses.replace(RELEASES[released.encoder].config, anticipator=right)
    wanted = [entry for entry in meta_entries(config) if entry.part == "anticipator"]
    shapes, path = expected_shapes(wanted), Path(released.source.rpartition("/")[2])
    assert len(shapes) == 55  # tensors of the released file, as others report
    assert infer_anticipator(path, shapes, labels, heads=None, frames=None) == right
    said = infer_anticipator(path, shapes, labels, heads=8, frames=16)
    assert said == dataclasses.replace(right, num_heads=8, frames_per_clip=16)
    few = dataclasses.replace(labels, nouns=labels.nouns[1:])
    message = "97 verbs, 289 nouns, 3568 actions, and there are labels for 97 verbs, 288 nouns"
    with pytest.raises(InputError, match=message):
        infer_anticipator(path, shapes, few, heads=None, frames=None)


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
        ("windows.txt", "\ufeffa\r\nb\r\n"),
        ("empty-lines.txt", "a\nb\n\n \n"),
        ("marked.json", '\ufeff["a", "b"]'),
    ):
        (tmp_path / name).write_bytes(text.encode())
        assert read_labels(tmp_path / name) == ("a", "b")
    (tmp_path / "cranes.txt").write_text("crane\nbus\ncrane\n")
    assert read_labels(tmp_path / "cranes.txt") == ("crane", "bus", "crane")
    for content, message in (
        (b"a\n\nb\n", r"bad\.txt:2: is empty; it must be the name of a class"),
        ("a\nb\ncaf\xe9\n".encode("latin-1"), r"bad\.txt:3: is not a text in UTF-8 \("),
    ):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / "bad.txt")
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


# --- Labels of actions --------------------------------------------------------------------------


def pair_hash(pair: tuple[int, int]) -> int:
    """CPython's hash of a pair of small numbers from 3.8 on, as an unsigned number."""
    word, total = 2**64 - 1, 2870177450012600261
    for number in pair:
        total = total + number * 14029467366897019727 & word
        total = (total << 31 | total >> 33) * 11400714785074694791 & word
    return total + (2 ^ 2870177450012600261 ^ 3527539) & word


def set_order(keys: list[Any], hashes: list[int]) -> list[Any]:
    """The order in which CPython iterates over a set into which these were put."""
    table: list[tuple[Any, int] | None] = [None] * 8

    def put(key: Any, code: int) -> bool:
        mask, perturb, start = len(table) - 1, code, code & len(table) - 1
        while True:
            for i in range(start, start + (10 if start + 9 <= mask else 1)):
                if table[i] is None:
                    table[i] = (key, code)
                    return True
                if table[i][0] == key:
                    return False
            perturb >>= 5
            start = start * 5 + 1 + perturb & mask

    used = 0
    for key, code in zip(keys, hashes, strict=True):
        used += put(key, code)
        if used * 5 >= (len(table) - 1) * 3:
            old, size = table, 8
            while size <= used * 4:
                size *= 2
            table = [None] * size
            for entry in filter(None, old):
                put(*entry)
    return [entry[0] for entry in table if entry is not None]


@pytest.mark.parametrize(
    ("count", "verbs", "nouns"), [(7, 4, 5), (2000, 97, 300), (60_000, 40, 90)]
)
def test_epic_classes_are_in_the_order_of_sets(
    tmp_path: Path, count: int, verbs: int, nouns: int
) -> None:
    rng = random.Random(count)
    pairs = [(int(rng.triangular(0, verbs, 0)), rng.randrange(nouns)) for _ in range(count)]
    found = read_epic_labels(write_epic(tmp_path, pairs))
    actions = set_order(pairs, [pair_hash(pair) for pair in pairs])
    assert found.actions == tuple(f"verb {verb} noun {noun}" for verb, noun in actions)
    assert list(found.actions) != sorted(found.actions)
    for i, (kind, names) in enumerate({"verb": found.verbs, "noun": found.nouns}.items()):
        numbers = [pair[i] for pair in actions]
        assert names == tuple(f"{kind} {number}" for number in set_order(numbers, numbers))


def test_epic_classes_have_names_if_they_are_there(tmp_path: Path) -> None:
    pairs = [(0, 0), (3, 1), (0, 12), (0, 0)]
    path = write_epic(tmp_path, pairs, names=True)
    found = read_labels(path)
    assert found == read_epic_labels(path, *(tmp_path / name for name in EPIC_NAMES))
    assert set(found.actions) == {"take tap", "wash pan", "take oven:door"}
    assert (set(found.verbs), set(found.nouns)) == ({"take", "wash"}, {"tap", "pan", "oven:door"})
    (tmp_path / "EPIC_100_noun_classes.csv").unlink()
    assert read_labels(path).verbs == found.verbs
    assert set(read_labels(path).nouns) == {"noun 0", "noun 1", "noun 12"}


def test_action_labels_as_json(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text('{"verbs": ["a", "b"], "nouns": ["c"], "actions": [[1, 0], [0, 0]]}')
    assert read_labels(path) == ActionLabels(verbs=("a", "b"), nouns=("c",), actions=("b c", "a c"))
    path.write_text('{"actions": ["boil an egg"]}')
    assert read_labels(path) == ActionLabels(actions=("boil an egg",))
    for text, message in (
        ('{"verbs": ["a"], "nouns": ["c"], "actions": [[1, 0]]}', r"has the action \[1, 0\]; it"),
        ('{"verbs": ["a"], "nouns": ["c"], "actions": [[0, -1]]}', r"the action \[0, -1\]"),
        ('{"verbs": ["a"], "nouns": ["c"], "actions": [[0]]}', r"the action \[0\]; it must be"),
        ('{"verbs": ["a"], "nouns": ["c"], "actions": [[0, true]]}', r"the action \[0, True\]"),
        ('{"verbs": ["a"], "nouns": ["c"], "actions": [[0, 0], "x"]}', "names of the classes"),
        ('{"verbs": [1], "nouns": ["c"], "actions": [[0, 0]]}', "names of the classes"),
        ('{"actions": ["a"], "noun": ["c"]}', r"has \['noun'\]; it may have verbs, nouns and act"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_labels(path)


def test_annotations_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.csv"
    for text, message in (
        ("verb,noun_class\n1,2\n", "has no column verb_class; it has verb, noun_class"),
        ("", "has no column verb_class, noun_class; it has none"),
        ("verb_class,noun_class\n", "holds no rows"),
        ("verb_class,noun_class\n1,2\n1,x\n", "csv:3: noun_class is 'x'; it must be a whole"),
        ("verb_class,noun_class\n1.0,2\n", "csv:2: verb_class is '1.0'"),
        ("noun_class,verb_class\n1\n", "csv:2: has more or fewer fields than the header"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_labels(path)
    write_epic(tmp_path, [(0, 0), (4, 0)], names=True)
    with pytest.raises(InputError, match=r"verb_classes.csv has no key for the verb classes \[4\]"):
        read_labels(tmp_path / "EPIC_100_train.csv")
    monkeypatch.setattr(sys, "implementation", types.SimpleNamespace(name="pypy"))
    with pytest.raises(InputError, match="is that of sets in CPython of 64 bits"):
        read_epic_labels(path)
