import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jvjepa import registry

SCRIPT = Path(__file__).parent.parent / ".ci" / "weights_table.py"
spec = importlib.util.spec_from_file_location("weights_table", SCRIPT)
weights_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(weights_table)


def rows() -> dict[str, dict[str, str]]:
    """Every row by the text of its first cell; "All" is what is said above its table."""
    found = {}
    blocks = weights_table.tables().split("\n\n")
    for above, table in zip(blocks[::2], blocks[1::2], strict=True):
        head, _, *lines = ([x.strip() for x in x.strip("|").split("|")] for x in table.split("\n"))
        for cells in lines:
            row = dict(zip(head, cells, strict=True))
            name = re.search(r"`(.+?)`", cells[0])[1]
            assert name not in found
            found[name] = {**row, "All": above}
    return found


def check(row: dict[str, str], **facts: str) -> None:
    for fact, value in facts.items():
        if fact in row:
            assert row[fact] == value
        else:
            assert re.search(rf"[ :,] {fact} {re.escape(value)}[,.]", row["All"]), (fact, value)


def test_every_release_is_there_with_its_facts() -> None:
    table = rows()
    files = {probe.source.rpartition("/")[2] for probe in registry.PROBES.values()}
    assert set(table) == {*registry.RELEASES, *files}
    for name, release in registry.RELEASES.items():
        row, encoder = table[name], release.config.encoder
        check(row, licence=release.licence, images="yes" if encoder.image_tokenizer else "no")
        check(row, frames=str(encoder.frames_per_clip), pixels=f"{encoder.crop_size}²", tubelet="2")
        sizes = (encoder.hidden_size, encoder.num_layers, encoder.num_heads)
        assert row["width · layers · heads"].split(" · ") == list(map(str, sizes))
        counts = re.findall(r"[\d,]*\d", row["parameters"])
        assert [int(n.replace(",", "")) for n in counts] == list(release.num_params.values())
        if release.key:
            check(row, key=f"`{release.key}`")
            assert f"]({release.source})" in row["FILE"]
        else:
            assert f"](https://huggingface.co/{release.source})" in row["NAME"]


def test_oracles_classes_and_licences() -> None:
    table = rows()
    for name in registry.RELEASES:
        is_new = name.startswith(("vjepa2_1", "vjepa2_ac"))
        check(table[name], oracle="PyTorch port" if is_new else "transformers")
        classes = {"ssv2": "174", "diving48": "48"}.get(name.rpartition("-")[2], "none")
        check(table[name], classes=classes)
    apache = {name for name, row in table.items() if row.get("licence") == "Apache-2.0"}
    assert apache == {"vjepa2-vitg-fpc64-256", "vjepa2-vitg-fpc64-384"}


def test_probes() -> None:
    table = rows()
    # What the released classifiers have more than the encoders that they stand on.
    hub = {name: sum(r.num_params.values()) for name, r in registry.RELEASES.items()}
    right = {
        "ssv2-vitl-16x2x3.pt": hub["vjepa2-vitl-fpc16-256-ssv2"] - hub["vjepa2-vitl-fpc64-256"],
        "diving48-vitg-384-32x4x3.pt": hub["vjepa2-vitg-fpc32-384-diving48"]
        - hub["vjepa2-vitg-fpc64-384"],
    }
    for name, count in right.items():
        assert table[name]["parameters"] == f"{count:,}"
    row = table["diving48-vitl-256.pt"]
    assert (row["MODEL"], row["layers seen"]) == ("`vjepa2_vit_large`", "17, 19, 21, 23")
    assert (row["frames × clips × views"], row["classes"]) == ("32 × 4 × 3", "48")
    assert table["ssv2-vitl-16x2x3.pt"]["layers seen"] == "the last"
    check(row, licence="not stated")


def test_measured_errors_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"vjepa2-vitl-fpc64-256": 1.234e-6, "vjepa2_1_vit_base_384": 2e-10}
    for name in registry.RELEASES:
        release = dataclasses.replace(registry.RELEASES[name], parity=errors.get(name))
        monkeypatch.setitem(registry.RELEASES, name, release)
    table = rows()
    shown = {"vjepa2-vitl-fpc64-256": "1.2e-6", "vjepa2_1_vit_base_384": "2.0e-10"}
    for name in registry.RELEASES:
        check(table[name], error=shown.get(name, "not measured"))


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# title\n\n{weights_table.BEGIN}\nold\n{weights_table.END}\n\nthe rest\n")
    return path


def test_check_says_what_to_run_and_write_repairs(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = readme.read_text()
    assert weights_table.main(["--check"], readme) == 1
    message = capsys.readouterr().err
    assert message.endswith(f"{readme}: other weights than in jvjepa/registry.py; make table\n")
    assert "\n-old\n" in message
    assert readme.read_text() == before
    assert weights_table.main(["--write"], readme) == 0
    assert weights_table.main(["--check"], readme) == 0
    right = readme.read_text()
    assert right == before.replace("old", weights_table.tables())
    for old, new in (("325,971,328", "325,971,329"), ("MIT", "GPL"), ("vitl.pt", "vitL.pt")):
        readme.write_text(right.replace(old, new, 1))
        assert weights_table.main(["--check"], readme) == 1
        assert weights_table.main(["--write"], readme) == 0
        assert readme.read_text() == right
    readme.write_text(right + "what stands elsewhere is nobody's business\n")
    assert weights_table.main(["--check"], readme) == 0


@pytest.mark.parametrize("mode", ["--check", "--write"])
@pytest.mark.parametrize(
    "marks", ["", "{0}", "{1}", "{1}{0}", "{0}{1}{0}", "{0}{1}{1}", "{0}{0}{1}"]
)
def test_marks_that_are_not_right(
    readme: Path, capsys: pytest.CaptureFixture[str], mode: str, marks: str
) -> None:
    text = marks.format(weights_table.BEGIN, weights_table.END)
    readme.write_text(text)
    assert weights_table.main([mode], readme) == 1
    assert re.fullmatch(r".*README\.md: it must have <!-- .*, each once\n", capsys.readouterr().err)
    assert readme.read_text() == text


def test_the_readme_is_up_to_date() -> None:
    command = [sys.executable, str(SCRIPT)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"{weights_table.tables()}\n"
    result = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
