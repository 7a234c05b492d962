"""Makes the virtual environment of the `saccadic` peer: `python benchmarks/peers/make_env.py`."""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = HERE.parents[1] / ".venv-saccadic"
REQUIREMENTS = HERE / "saccadic_requirements.txt"


def python_of(folder: Path) -> Path:
    """Returns the path of the interpreter of a virtual environment.

    Args:
        folder: The folder of the environment.

    Returns:
        The path, whether or not it exists.
    """
    if sys.platform == "win32":
        return folder / "Scripts" / "python.exe"
    return folder / "bin" / "python"


def make(folder: Path) -> Path:
    """Creates the environment, or brings an existing one up to date.

    Args:
        folder: Where it goes.

    Returns:
        The path of its interpreter.
    """
    python = python_of(folder)
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-r", REQUIREMENTS], check=True)
    subprocess.run([python, "-c", "import saccade.streaming, saccade.model"], check=True)
    return python


def main() -> None:
    """Reads the command line and makes the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    folder = parser.parse_args().folder
    print(make(folder.absolute()))


if __name__ == "__main__":
    main()
