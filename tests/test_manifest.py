import json
import os
from pathlib import Path

import numpy as np
import pytest
from commandline import cut_short, refused, run
from videofiles import moving_frames, write_audio, write_video

from jvjepa.errors import InputError
from jvjepa.train.manifest import DataError, Manifest, check_file, read_manifest


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def rows(manifest: Manifest) -> list[tuple[str, float, float, int]]:
    columns = (manifest.starts, manifest.ends, manifest.labels)
    return list(zip(manifest.paths, *(column.tolist() for column in columns), strict=True))


# Forms


def test_metas_form(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.csv",
        'a.mp4 3\n\n/data/b c.mp4   0\n"d e.mp4" 12\nsub/f.mp4\t7\nwith::colons g.mp4::1\n',
    )

    manifest = read_manifest(path)

    inf = float("inf")
    assert rows(manifest) == [
        (str(tmp_path / "a.mp4"), 0, inf, 3),
        ("/data/b c.mp4", 0, inf, 0),
        (str(tmp_path / "d e.mp4"), 0, inf, 12),
        (str(tmp_path / "sub/f.mp4"), 0, inf, 7),
        (str(tmp_path / "with::colons g.mp4"), 0, inf, 1),
    ]
    assert manifest.labelled
    assert manifest.labels.dtype == np.int32
    assert manifest.classes == ()


@pytest.mark.parametrize(
    "start", ["", "\ufeff", "path,start,end,label\n", "Path, Start, End, Label\n"]
)
def test_csv(tmp_path: Path, start: str) -> None:
    path = write(
        tmp_path / "train.csv",
        start + 'a b.mp4,0.5,2,3\n"x, ""y"".mp4",,,0\nhttp://host/c.mp4, 1 ,,4\n',
    )

    inf = float("inf")
    assert rows(read_manifest(path)) == [
        (str(tmp_path / "a b.mp4"), 0.5, 2, 3),
        (str(tmp_path / 'x, "y".mp4'), 0, inf, 0),
        ("http://host/c.mp4", 1, inf, 4),
    ]


def test_a_header_chooses_the_columns(tmp_path: Path) -> None:
    unlabelled = read_manifest(write(tmp_path / "a.csv", "path\na.mp4\nb.mp4\n"))
    assert rows(unlabelled)[1] == (str(tmp_path / "b.mp4"), 0, float("inf"), -1)
    assert not unlabelled.labelled

    turned = read_manifest(write(tmp_path / "b.csv", "label,path\n5,a.mp4\n"))
    assert rows(turned) == [(str(tmp_path / "a.mp4"), 0, float("inf"), 5)]


def test_json_lines(tmp_path: Path) -> None:
    records = [
        {"path": "a.mp4", "label": 3},
        {"label": 0, "path": "/data/ü b.mp4", "end": 4, "start": 1.5},
        {"path": "c.mp4", "label": 1, "start": None},
    ]
    path = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")

    inf = float("inf")
    assert rows(read_manifest(path)) == [
        (str(tmp_path / "a.mp4"), 0, inf, 3),
        ("/data/ü b.mp4", 1.5, 4, 0),
        (str(tmp_path / "c.mp4"), 0, inf, 1),
    ]
    bare = read_manifest(write(tmp_path / "u.jsonl", '{"path": "a.mp4"}'))
    assert not bare.labelled


def test_a_relative_manifest_is_read_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.csv", "a.mp4 0\n")
    monkeypatch.chdir(tmp_path)

    assert read_manifest("m.csv").paths == (str(tmp_path / "a.mp4"),)


def test_folder_of_classes(tmp_path: Path) -> None:
    for name in ("run/b.mp4", "run/a.MKV", "jump/deep/c.mov", "jump/note.txt", "run/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run" / "again").symlink_to(tmp_path, target_is_directory=True)

    manifest = read_manifest(tmp_path)

    names = [os.path.relpath(path, tmp_path) for path in manifest.paths]
    assert names == ["jump/deep/c.mov", "run/a.MKV", "run/b.mp4"]
    assert manifest.labels.tolist() == [0, 1, 1]
    assert manifest.classes == ("jump", "run")


def test_folder_without_classes(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.webm"):
        (tmp_path / name).touch()

    manifest = read_manifest(tmp_path)

    assert [Path(path).name for path in manifest.paths] == ["a.webm", "b.mp4"]
    assert manifest.labels.tolist() == [-1, -1]
    assert not manifest.labelled


def test_folder_of_both_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("run/a.mp4", "b.mp4"):
        (tmp_path / name).touch()

    with pytest.raises(DataError, match=r"no class \(b\.mp4\) beside .*run/a\.mp4"):
        read_manifest(tmp_path)


# Errors


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "", r"m\.csv: lists no clip"),
        ("m.csv", "\n \n", "lists no clip"),
        ("m.csv", "path,label\n", "lists no clip"),
        ("m.jsonl", "", "lists no clip"),
        ("m.csv", "a.mp4\n", r"m\.csv:1: 'a\.mp4' is not `path label` or"),
        ("m.csv", "a.mp4 1\nb.mp4 cat\n", r"m\.csv:2: label = 'cat'; it must be a whole number"),
        ("m.csv", "a.mp4 1.0\n", r"label = '1\.0'"),
        ("m.csv", "a.mp4 -1\n", "label = '-1'"),
        ("m.csv", "a.mp4 ٣\n", "label = '٣'"),
        ("m.csv", "a.mp4 2147483648\n", "label = '2147483648'"),
        ("m.csv", "a.mp4,0,1,\n", "label = ''"),
        ("m.csv", "a.mp4,0,1,2\nb.mp4,0,1\n", r"m\.csv:2: has 3 fields; right is path,start,end"),
        ("m.csv", "a.mp4,0,1,2\nb.mp4 1\n", "has 1 fields"),
        ("m.csv", "a.mp4,x,1,2\n", "start = 'x'; it must be 0 or more seconds"),
        ("m.csv", "a.mp4,-1,1,2\n", "start = '-1'"),
        ("m.csv", "a.mp4,0,nan,2\n", "end = 'nan'"),
        ("m.csv", "a.mp4,0,inf,2\n", "end = 'inf'"),
        ("m.csv", "a.mp4,2,1,2\n", "end = 1; it must be above start = 2"),
        ("m.csv", "a.mp4,1,1,2\n", "end = 1; it must be above start = 1"),
        ("m.csv", ",0,1,2\n", "path = ''"),
        ("m.csv", 'a.mp4,0,1,2\n"b.mp4,0,1,2\n', "is no CSV"),
        ("m.jsonl", "a.mp4 3\n", r"m\.jsonl:1: is no JSON"),
        ("m.jsonl", '{"label": 3}\n', "must be an object with a path"),
        ("m.jsonl", '["a.mp4", 3]\n', "must be an object with a path"),
        ("m.jsonl", '{"path": "a", "lable": 3}\n', "has 'lable'; right are path, start"),
        ("m.jsonl", '{"path": 3, "label": 3}\n', "path = 3"),
        ("m.jsonl", '{"path": "a", "label": 2.5}\n', r"label = 2\.5"),
        ("m.jsonl", '{"path": "a", "label": true}\n', "label = True"),
        ("m.jsonl", '{"path": "a", "start": true}\n', "start = True"),
        ("m.jsonl", '{"path": "a", "end": [1]}\n', r"end = \[1\]"),
        (
            "m.jsonl",
            '{"path": "a", "label": 1}\n{"path": "b"}\n',
            r"m\.jsonl:2: has no label, but .*m\.jsonl:1 has one",
        ),
        (
            "m.jsonl",
            '{"path": "a"}\n{"path": "b", "label": 1}\n',
            r"m\.jsonl:1: has no label, but .*m\.jsonl:2 has one",
        ),
    ],
)
def test_wrong_manifests(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_manifest(write(tmp_path / name, text))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: there is no such file or folder"):
        read_manifest(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="has no video in it"):
        read_manifest(tmp_path)
    one, two = np.zeros(1), np.zeros(2, np.int32)
    (tmp_path / "b.csv").write_bytes(b"a\xff.mp4 1\n")
    with pytest.raises(DataError, match="is not a text in UTF-8"):
        read_manifest(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"lengths \[1, 1, 2\]; there are 1 paths"):
        Manifest(source="x", paths=("a",), starts=one, ends=one, labels=two)
    assert issubclass(DataError, InputError)


# jvjepa data check


def test_check_file(tmp_path: Path, clips: dict[str, Path]) -> None:
    report = check_file(str(clips["mp4"]))
    assert (report.frames, report.size, report.problem) == (60, (64, 48), None)
    assert report.seconds == pytest.approx(2.0, abs=1e-3)

    damaged = cut_short(clips["fast"], tmp_path / "damaged.mp4", 0.6)
    assert "damaged.mp4: a part is missing" in check_file(str(damaged)).problem
    assert "has no video track" in check_file(str(write_audio(tmp_path / "a.mp4"))).problem
    assert "is live" in check_file("rtsp://host/1").problem


def test_check_reports_all_that_is_wrong(
    tmp_path: Path, clips: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    cut_short(clips["fast"], tmp_path / "damaged.mp4", 0.6)
    write_video(tmp_path / "small.mp4", moving_frames(8, 32, 48), 8)
    manifest = write(
        tmp_path / "m.csv",
        f"{clips['mp4']},,,0\nsmall.mp4,,,0\nsmall.mp4,0.5,,2\nsmall.mp4,1.5,9,2\n"
        "damaged.mp4,,,0\ndamaged.mp4,1,,2\ngone.mp4,,,4\n",
    )

    assert run("data", "check", manifest, "--workers", "2") == 1

    out = capfd.readouterr().out
    assert "m.csv: 7 clips of 4 files" in out
    assert "3 labels, 1 to 3 clips each; 2 below the largest (4) have none: 1, 3" in out
    assert "2 files read: 68 frames, 0.00 h, 64x48 (1), 48x32 (1)" in out
    assert "damaged.mp4: a part is missing" in out
    assert "gone.mp4: there is no such file" in out
    assert "small.mp4: start = 1.5, but it lasts 1.000 s" in out
    assert "4 of 7 clips cannot be read (57.14%)" in out


def test_check_of_what_is_whole(
    tmp_path: Path, clips: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = write(tmp_path / "m.jsonl", json.dumps({"path": str(clips["mkv"])}))

    assert run("data", "check", manifest) == 0

    out = capfd.readouterr().out
    assert "no labels" in out
    assert "0 of 1 clips cannot be read (0.00%)\n" in out


def test_check_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "m.csv: lists no clip" in refused(capfd, "data", "check", write(tmp_path / "m.csv", ""))
    assert "no such file" in refused(capfd, "data", "check", tmp_path / "gone.csv")
    assert "workers = 0" in refused(capfd, "data", "check", tmp_path, "--workers", "0")
