"""The tables of released weights in README.md, made from `jvjepa/registry.py`.

    python .ci/weights_table.py              # prints them
    python .ci/weights_table.py --check      # exit code 1 if README.md has others
    python .ci/weights_table.py --write      # puts them into README.md

`make check-table` and `make table` do the last two.
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jvjepa.config import AnticipatorConfig, ClassifierConfig
from jvjepa.parameters import count_parameters
from jvjepa.registry import PROBES, RELEASES, Probe, Release

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- weights: begin -->", "<!-- weights: end -->"

_FETCH = "`curl -O URL`, then"
_TITLES = {
    "hub": "**V-JEPA 2 on the hub:** `jvjepa convert NAME OUT`",
    "2": f"**V-JEPA 2, Meta's files:** {_FETCH} `jvjepa convert FILE OUT`",
    "2.1 and 2-AC": f"**V-JEPA 2.1 and 2-AC, Meta's files:** {_FETCH} `jvjepa convert FILE OUT`",
    "probes": f"**Probes:** {_FETCH} "
    "`jvjepa convert --probe FILE --encoder MODEL --labels LABELS OUT`",
}


def tables() -> str:
    """Returns the Markdown of every table, without a newline at either end."""
    groups: dict[str, list[dict[str, str]]] = {name: [] for name in _TITLES}
    for name, release in RELEASES.items():
        new = release.config.predictor is None or release.config.encoder.rope == "interleaved"
        group = "hub" if not release.key else "2.1 and 2-AC" if new else "2"
        # transformers has only V-JEPA 2; `jvjepa verify` runs the port of Meta's code for the rest.
        groups[group].append(_release(name, release, "PyTorch port" if new else "transformers"))
    groups["probes"] = [_probe(probe) for probe in PROBES.values()]
    return "\n\n".join(_table(_TITLES[group], rows) for group, rows in groups.items())


def _release(name: str, release: Release, oracle: str) -> dict[str, str]:
    encoder, classifier = release.config.encoder, release.config.classifier
    if release.key:
        place = {"NAME": f"`{name}`", "FILE": _file(release.source), "key": f"`{release.key}`"}
    else:
        place = {"NAME": f"[`{name}`](https://huggingface.co/{release.source})"}
    sizes = (encoder.hidden_size, encoder.num_layers, encoder.num_heads)
    counts = (f"{part.replace('_', ' ')} {n:,}" for part, n in release.num_params.items())
    return {
        **place,
        "licence": release.licence,
        "width · layers · heads": " · ".join(map(str, sizes)),
        "frames": str(encoder.frames_per_clip),
        "pixels": f"{encoder.crop_size}²",
        "tubelet": str(encoder.tubelet_size),
        "images": "yes" if encoder.image_tokenizer else "no",
        "classes": str(len(classifier.labels)) if classifier else "none",
        "parameters": ", ".join(counts).removeprefix("all "),
        "oracle": oracle,
        "error": _error(release.parity),
    }


def _probe(probe: Probe) -> dict[str, str]:
    numbers = {"verbs": probe.verbs, "nouns": probe.nouns, "actions": probe.num_classes}
    names = {kind: tuple(map(str, range(count))) for kind, count in numbers.items()}
    classes, layers = str(probe.num_classes), ", ".join(map(str, probe.layers)) or "the last"
    if probe.verbs:
        part: dict[str, Any] = {"anticipator": AnticipatorConfig(**names)}
        classes = ", ".join(f"{count} {kind}" for kind, count in numbers.items())
        layers += ", and the predictor's tokens"
    else:
        heads = RELEASES[probe.encoder].config.encoder.num_heads  # they change no count
        how = {"num_heads": heads, "layers": probe.layers}
        part = {"classifier": ClassifierConfig(labels=names["actions"], **how)}
    config = dataclasses.replace(RELEASES[probe.encoder].config, **part)
    return {
        "FILE": _file(probe.source),
        "MODEL": f"`{probe.encoder}`",
        "licence": probe.licence,
        "layers seen": layers,
        "frames × clips × views": f"{probe.frames} × {probe.clips} × {probe.views}",
        "classes": classes,
        "parameters": f"{count_parameters(config)[next(iter(part))]:,}",
    }


def _file(url: str) -> str:
    return f"[`{url.rpartition('/')[2]}`]({url})"


def _error(parity: float | None) -> str:
    if parity is None:
        return "not measured"
    digits, exponent = f"{parity:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _table(title: str, rows: Sequence[dict[str, str]]) -> str:
    """A table of what differs between the rows; what does not is said once, above it."""
    shared = {name: cell for name, cell in rows[0].items() if all(r[name] == cell for r in rows)}
    head = [name for name in rows[0] if name not in shared]
    lines = (head, ["---"] * len(head), *([row[name] for name in head] for row in rows))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{title}. All: {', '.join(map(' '.join, shared.items()))}.\n\n{table}"


def replaced(text: str) -> str:
    """Puts the tables between the two marks.

    Args:
        text: of README.md.

    Returns:
        The text with the tables of now.

    Raises:
        ValueError: the marks are not there once each, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"it must have {BEGIN} and after it {END}, each once")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, readme: Path = README) -> int:
    """Prints, checks or writes; exit code 1 if the check fails."""
    parser = argparse.ArgumentParser(description="the tables of released weights in README.md")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="compare README.md with the registry")
    modes.add_argument("--write", action="store_true", help="bring README.md up to date")
    options = parser.parse_args(arguments)
    if not (options.check or options.write):
        print(tables())
        return 0
    text = readme.read_text(encoding="utf-8")
    try:
        right = replaced(text)
    except ValueError as error:
        print(f"{readme}: {error}", file=sys.stderr)
        return 1
    if options.write:
        readme.write_text(right, encoding="utf-8")
    elif text != right:
        print(*_changes(text, right), sep="\n", file=sys.stderr)
        print(f"{readme}: other weights than in jvjepa/registry.py; make table", file=sys.stderr)
        return 1
    return 0


def _changes(text: str, right: str) -> Iterator[str]:
    lines = (text.splitlines(), right.splitlines())
    return difflib.unified_diff(*lines, "README.md", "jvjepa/registry.py", lineterm="", n=0)


if __name__ == "__main__":
    sys.exit(main())
