"""`jvjepa mos`: scores of one video and of many, which go on where they were interrupted."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commandline import refused, run
from models import random_params, tiny_config
from quality import MAX_LENGTH, PROMPTS, tiny_quality
from videofiles import moving_frames, write_video

import jvjepa
from jvjepa import cli, quality_command
from jvjepa.adapters import weights_sha256
from jvjepa.errors import InputError
from jvjepa.quality import SCORES, QualityModel, load_quality, read_pixels, save_quality, score
from jvjepa.score_file import (
    COLUMNS,
    Request,
    ScoreFile,
    folder_requests,
    read_requests,
)

COUNT = 3  # videos that can be read


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `videos` with three that can be read and one that cannot, `list.csv` of the three.

    To be read only.
    """
    folder = tmp_path_factory.mktemp("mos")
    tiny_quality(folder / "model")
    (folder / "videos" / "inner").mkdir(parents=True)
    for i, name in enumerate(("a.mp4", "b.mp4", "inner/c.mp4")):
        write_video(folder / "videos" / name, moving_frames(10 + i, 48, 64, seed=i))
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    rows = zip(("b.mp4", "a.mp4", "inner/c.mp4"), PROMPTS, strict=True)
    write_list(folder / "list.csv", [{"video_name": n, "Prompt": p} for n, p in rows])
    return folder


@pytest.fixture(scope="module")
def model(assets: Path) -> QualityModel:
    return load_quality(assets / "model")


def write_list(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_scores(path: Path) -> dict[tuple[str, str], list[float]]:
    with open(path, encoding="utf-8", newline="") as file:
        return {
            (row["video_name"], row["Prompt"]): [float(row[name]) for name in COLUMNS]
            for row in csv.DictReader(file)
        }


def expected(model: QualityModel, path: Path, prompt: str) -> np.ndarray:
    return score(model, read_pixels(path, model.config), prompt)


# --- One video ----------------------------------------------------------------------------------


def test_one_video(
    assets: Path, model: QualityModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = assets / "videos" / "a.mp4", tmp_path / "scores.json"
    assert run("mos", assets / "model", path, "--prompt", PROMPTS[0], "--json", out) == 0
    right = expected(model, path, PROMPTS[0])
    record = json.loads(out.read_text())
    assert list(record["scores"]) == list(SCORES)
    assert np.array_equal(np.float32(list(record["scores"].values())), right)
    assert record["video"] == str(path)
    assert record["prompt"] == PROMPTS[0]
    assert record["model"] == str(assets / "model")
    printed = capfd.readouterr().out
    for name, value in zip(SCORES, right, strict=True):
        assert f"{name:12} {value:6.3f}" in printed
    error = refused(capfd, "mos", assets / "model", path, "--prompt", "a", "--json", out)
    assert "exists" in error
    assert run("mos", assets / "model", path, "--prompt", "a dog", "--json", out, "--force") == 0
    assert json.loads(out.read_text())["prompt"] == "a dog"


def test_a_prompt_that_is_cut_off_is_said(
    assets: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = assets / "videos" / "a.mp4"
    with caplog.at_level(logging.WARNING):
        assert run("mos", assets / "model", path, "--prompt", "the cat " * 30) == 0
    assert f"has 62 tokens; the text encoder sees the first {MAX_LENGTH}" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "videos/a.mp4"), "--prompt is missing; say what"),
        (("model", "videos/a.mp4", "--prompt", "  "), "--prompt is empty"),
        (("model", "videos/missing.mp4", "--prompt", "a"), "missing.mp4"),
        (("model", "videos/broken.mp4", "--prompt", "a"), "broken.mp4"),
        (("model", "videos/a.mp4", "--prompt", "a", "--out", "x.csv"), "--out is for a folder or"),
        (("model", "videos/a.mp4", "--prompt", "a", "--videos", "x"), "--videos is for a folder"),
        (("model", "videos/a.mp4", "--prompt", "a", "--json", "x.txt"), "must end in .json"),
        (("nothing", "videos/a.mp4", "--prompt", "a"), "is no video-quality model"),
        (("videos", "videos/a.mp4", "--prompt", "a"), "is no video-quality model"),
        (("model", "videos"), "is not one video; name a file for the scores: --out"),
        (("model", "videos", "--out", "x.csv"), "--prompt is missing"),
        (("model", "videos", "--out", "x.csv", "--prompt", "a", "--videos", "x"), "is for a .csv"),
        (("model", "model", "--out", "x.csv", "--prompt", "a"), "has no video in it"),
        (("model", "list.csv", "--out", "x.csv", "--prompt", "a"), "has prompts of its own"),
        (("model", "list.csv", "--out", "list.csv"), "list.csv is the source, "),
        (("model", "list.csv", "--out", "x.json"), "must end in .csv"),
        (("model", "list.csv", "--out", "nowhere/x.csv"), "is not a folder"),
        (("model", "list.csv", "--out", "x.csv"), "does not hold 3 of the videos"),
        (("model", "missing.csv", "--out", "x.csv"), "missing.csv"),
    ],
)
def test_wrong_options_are_refused(
    assets: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(assets)
    before = sorted(assets.rglob("*"))
    assert message in refused(capfd, "mos", *arguments)
    assert sorted(assets.rglob("*")) == before


def test_other_models_are_refused(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(num_layers=1)
    encoder = jvjepa.Encoder(config)
    other = jvjepa.Model(
        config=jvjepa.ModelConfig(encoder=config),
        encoder=encoder,
        params={"encoder": random_params(encoder)},
        source=None,
    )
    jvjepa.save(tmp_path / "encoder", other)
    video = assets / "videos" / "a.mp4"
    error = refused(capfd, "mos", tmp_path / "encoder", video, "--prompt", "a")
    assert "a converted checkpoint, which jvjepa.load loads" in error


# --- Many videos --------------------------------------------------------------------------------


def test_a_list(
    assets: Path, model: QualityModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, summary = tmp_path / "scores.csv", tmp_path / "scores.json"
    videos = assets / "videos"
    how = ("--videos", videos, "--out", out)
    assert run("mos", assets / "model", assets / "list.csv", *how, "--json", summary) == 0
    found = read_scores(out)
    names = ("b.mp4", "a.mp4", "inner/c.mp4")
    assert list(found) == list(zip(names, PROMPTS, strict=True))
    for (name, prompt), scores in found.items():
        assert np.array_equal(np.float32(scores), expected(model, videos / name, prompt))
    record = json.loads(summary.read_text())
    assert [row["video"] for row in record["videos"]] == list(names)
    assert list(record["videos"][0]["scores"].values()) == found["b.mp4", PROMPTS[0]]
    assert record["excluded"] == {}
    printed = capfd.readouterr().out
    assert "3/3" in printed
    mean = np.mean(list(found.values()), axis=0)
    assert f"{SCORES[0]:12} {mean[0]:6.3f}" in printed


def test_a_folder_whose_bad_videos_are_excluded_and_listed(
    assets: Path, model: QualityModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, summary = tmp_path / "scores.csv", tmp_path / "scores.json"
    how = ("--prompt", " a cat ", "--out", out, "--json", summary)
    assert run("mos", assets / "model", assets / "videos", *how) == 1
    found = read_scores(out)
    assert sorted(found) == [(name, "a cat") for name in ("a.mp4", "b.mp4", "inner/c.mp4")]
    printed = capfd.readouterr().out
    assert "cannot be read  broken.mp4" in printed
    assert f"excluded: {assets / 'videos' / 'broken.mp4'}" in printed
    record = json.loads(summary.read_text())
    assert list(record["excluded"]) == ["broken.mp4"]
    assert len(record["videos"]) == COUNT
    assert "3.0" not in {str(x) for row in found.values() for x in row}  # nothing made up


def count_scored(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    scored = []
    real = quality_command.score_embedded

    def counting(*arguments: object) -> np.ndarray:
        scored.append(real(*arguments))
        return scored[-1]

    monkeypatch.setattr(quality_command, "score_embedded", counting)
    return scored


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_an_interrupted_run_goes_on(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cut: int,
) -> None:
    """`cut` bytes of the last row are missing, as after a crash."""
    how = (assets / "model", assets / "list.csv", "--videos", assets / "videos", "--out")
    assert run("mos", *how, tmp_path / "whole.csv") == 0
    whole = (tmp_path / "whole.csv").read_bytes()
    scored, out = count_scored(monkeypatch), tmp_path / "scores.csv"
    rows = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:3])[: None if cut == 0 else -cut])
    capfd.readouterr()
    assert run("mos", *how, out) == 0
    assert out.read_bytes() == whole
    there = 2 if cut == 0 else 1
    assert len(scored) == COUNT - there
    assert f"{there} of 3 videos are scored in {out} already" in capfd.readouterr().out
    assert run("mos", *how, out) == 0  # there is nothing left to do
    assert len(scored) == COUNT - there
    assert run("mos", *how, out, "--force") == 0
    assert len(scored) == 2 * COUNT - there
    assert out.read_bytes() == whole


def test_ctrl_c_keeps_what_there_is(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = quality_command.score_embedded, []

    def interrupted(*arguments: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(quality_command, "score_embedded", interrupted)
    out = tmp_path / "scores.csv"
    how = ("--videos", assets / "videos", "--out", out)
    assert run("mos", assets / "model", assets / "list.csv", *how) == 130
    assert len(read_scores(out)) == 1


def test_scores_of_several_models_are_not_mixed(
    assets: Path, model: QualityModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how = (assets / "list.csv", "--videos", assets / "videos", "--out", tmp_path / "scores.csv")
    assert run("mos", assets / "model", *how) == 0
    before = (tmp_path / "scores.csv").read_bytes()
    tiny_quality(tmp_path / "other", seed=1)
    assert "of a model with other weights" in refused(capfd, "mos", tmp_path / "other", *how)
    assert (tmp_path / "scores.csv").read_bytes() == before
    save_quality(tmp_path / "copy", model)
    assert run("mos", tmp_path / "copy", *how) == 0


def test_evaluate_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(cli, "run", lambda command, console: taken.append(command) or 0)
    assert cli.main(["mos", "evaluate", "model", "--x"]) == 0
    assert cli.main(["train", "probe", "model"]) == 0
    assert cli.main(["mos", "./evaluate", "video.mp4", "--prompt", "a"]) == 0
    assert (taken[0].module, taken[0].arguments) == ("mos_commands", ("model", "--x"))
    assert (taken[1].module, taken[1].arguments) == ("commands", ("probe", "model"))
    assert taken[2].model == Path("evaluate")


# --- Lists and files of scores ------------------------------------------------------------------


def test_requests_of_a_list(tmp_path: Path) -> None:
    prompts = ('says "hi", twice', "two\nlines", "日本")
    rows = [
        {"Other": "x", "video_name": f" {i}.mp4", "Prompt": f"{prompt} "}
        for i, prompt in enumerate(prompts)
    ]
    rows.append({"Other": "", "video_name": "0.mp4", "Prompt": "another prompt"})
    for i in range(3):
        (tmp_path / f"{i}.mp4").touch()
    write_list(tmp_path / "list.csv", rows)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "list.csv").read_bytes())
    for name in ("list.csv", "bom.csv"):
        assert read_requests(tmp_path / name) == [
            *(Request(f"{i}.mp4", tmp_path / f"{i}.mp4", p) for i, p in enumerate(prompts)),
            Request("0.mp4", tmp_path / "0.mp4", "another prompt"),
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video_name,Text\na.mp4,x\n", "has no column Prompt; it has video_name, Text, and "),
        ("video_name,Prompt,Prompt\na.mp4,x,y\n", "has the column Prompt more than once"),
        ("", "has no column video_name, Prompt; it has none, and"),
        ("video_name,Prompt\n", "lists no video"),
        ("video_name,Prompt\na.mp4,\n", r"list.csv:2: Prompt is empty"),
        ("video_name,Prompt\n ,x\n", r"list.csv:2: video_name is empty"),
        ("video_name,Prompt\na.mp4,x\na.mp4,x\n", r"list.csv:3: a.mp4 .* stands in line 2 too"),
        ("video_name,Prompt\na.mp4\n", r"list.csv:2: has more or fewer fields than the header"),
        ("video_name,Prompt\na.mp4,x,y\n", r"list.csv:2: has more or fewer fields than the header"),
        ('video_name,Prompt\na.mp4,"x\n', "is no CSV"),
        ("video_name,Prompt\nb.mp4,x\nc.mp4,y\na.mp4,z\n", "hold 2 of the .*: b.mp4, c.mp4"),
        ("video_name,Prompt\na.mp4,\xff\n", "is not a text in UTF-8"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        read_requests(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


def test_requests_of_a_folder(assets: Path, tmp_path: Path) -> None:
    found = folder_requests(assets / "videos", "a cat")
    assert [request.name for request in found] == ["a.mp4", "b.mp4", "broken.mp4", "inner/c.mp4"]
    assert all(request.path.is_file() and request.prompt == "a cat" for request in found)
    (tmp_path / ".hidden.mp4").touch()
    with pytest.raises(InputError, match="has no video in it"):
        folder_requests(tmp_path, "a cat")


PROMPT_KINDS = ("plain", 'with "quotes", and commas', "two\nlines\r\nor three", "日本 é", '"', ",")


def test_a_file_of_scores_cut_anywhere_keeps_its_whole_rows(tmp_path: Path) -> None:
    """Whatever the byte at which it was cut off, what is kept are the first rows, unchanged."""
    path, rng = tmp_path / "scores.csv", np.random.default_rng(0)
    requests = [Request(f"{i}.mp4", path, prompt) for i, prompt in enumerate(PROMPT_KINDS)]
    scores = rng.normal(size=(len(requests), 5)).astype(np.float32)
    ends = []
    with ScoreFile(path, "m", force=False) as file:
        ends.append(path.stat().st_size)
        for request, row in zip(requests, scores, strict=True):
            file.add(request, row)
            ends.append(path.stat().st_size)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends[1:])
        with ScoreFile(path, "m", force=False) as file:
            assert [file.has(request) for request in requests] == [
                i < whole for i in range(len(requests))
            ]
            for request, row in zip(requests[:whole], scores, strict=False):
                assert np.array_equal(file.scores[request.name, request.prompt], row)
        assert path.read_bytes() == content[: ends[whole]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "something else", "is no file of scores"),
        (lambda text: "a,b\n1,2\n", "has no column video_name"),
        (lambda text: text.replace("model", "Model"), "has no column model"),
        (lambda text: text.replace("0.5", "x"), "could not convert"),
        (lambda text: text.replace("0.5", "nan"), "are not finite"),
        (lambda text: text.replace("digest", "other"), "of a model with other weights"),
    ],
)
def test_other_files_are_left_alone(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "scores.csv"
    with ScoreFile(path, "digest", force=False) as file:
        file.add(Request("a.mp4", path, "a"), np.float32([0.5, 1, 2, 3, 4]))
    text = change(path.read_text())
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        ScoreFile(path, "digest", force=False)
    assert path.read_text() == text
    with ScoreFile(path, "digest", force=True) as file:
        assert file.scores == {}


def test_the_digest_is_of_the_weights(model: QualityModel, assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    how = ("--prompt", "a", "--out", out)
    run("mos", assets / "model", assets / "videos" / "inner", *how)
    with open(out, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == weights_sha256(model.params)
