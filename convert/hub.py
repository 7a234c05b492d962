"""From what the user calls a checkpoint to a folder on this machine."""

import dataclasses
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jvjepa import registry
from jvjepa.convert.bert import FILES as TEXT_FILES
from jvjepa.convert.source import CONFIG_FILE, INDEX_FILE, PREPROCESSOR_FILES
from jvjepa.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source on this machine.

    Args:
        name: the hub id, or the folder or file as it was given.
        path: where it lies: a folder, or one of Meta's `.pt` files.
        revision: the hub's commit, or "".
    """

    name: str
    path: Path
    revision: str


def resolve(source: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint, and downloads it where it is not here yet.

    Args:
        source: a folder; a `.pt` file; a released checkpoint's name ("vjepa2-vitl-fpc64-256"); or
            a hub id ("facebook/vjepa2-vitl-fpc64-256"). What exists here wins.
        revision: a branch, tag or commit of the hub's; None takes its main branch.

    Returns:
        The folder, with only the files that a conversion reads, or the file.

    Raises:
        InputError: it is none of these, does not exist, or is not in the cache and cannot be
            downloaded.
    """
    path = Path(source)
    if path.is_dir() or is_torch_file(path):
        if revision is not None:
            raise InputError(f"revision {revision!r} is for hub ids, and {source} is here")
        if not path.exists():
            raise InputError(f"{source} does not exist")
        return Checkpoint(name=source, path=path, revision="")
    if path.exists():
        raise InputError(
            f"{source} is a file; SOURCE must be a folder, a .pt file, a name, or a hub id"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"{source} is not a folder, and cannot be a hub id (owner/name) either")
    repo = source if "/" in source else _registered(source)
    folder = _download(source, repo, revision)
    return Checkpoint(name=repo, path=folder, revision=folder.name)


def is_torch_file(path: Path) -> bool:
    """Whether a path is called as a file of torch.save is, and is no folder."""
    return path.suffix in (".pt", ".pth", ".tar") and not path.is_dir()


def _registered(name: str) -> str:
    try:
        release = registry.get(name)
    except InputError as error:
        raise InputError(f"{name!r} is not a folder, and {error}") from None
    if release.source.startswith("https:"):
        file = release.source.rpartition("/")[2]
        raise InputError(
            f"{name} is a .pt file of Meta's: fetch it with curl -O {release.source} and convert "
            f"{file}"
        )
    return release.source


def _download(source: str, repo: str, revision: str | None) -> Path:
    """Returns the snapshot in the cache; its name is the commit."""
    patterns = [CONFIG_FILE, "*.safetensors", INDEX_FILE, *PREPROCESSOR_FILES, *TEXT_FILES]
    where = repo if revision is None else f"{repo} at revision {revision}"
    here = f"{source} is not a folder, and {where}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{source!r} is not a folder, and cannot be a hub id either") from None
    except GatedRepoError:
        raise InputError(
            f"{here} asks for its terms to be accepted on the hub and for a login (hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"{here} is not on the hub, or is private{_known(repo)}") from None
    except RevisionNotFoundError:
        raise InputError(f"{repo} has no revision {revision!r}") from None
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        reason = "HF_HUB_OFFLINE is set" if isinstance(cause, OfflineModeIsEnabled) else cause
        raise InputError(
            f"{here} is not in the cache and the hub cannot be reached ({_line(reason)})"
            f"{_known(repo)}"
        ) from None
    except HTTPError as error:
        raise InputError(f"{here} cannot be downloaded ({_line(error)})") from None


def _known(repo: str) -> str:
    """What to add to a message about a repository that may be a misspelt released checkpoint."""
    owner, _, name = repo.partition("/")
    if name in registry.RELEASES or not (owner == "facebook" or name.startswith("vjepa")):
        return ""
    on_the_hub = [n for n, r in registry.RELEASES.items() if r.source.endswith(n)]
    return f"; the released checkpoints are {', '.join(on_the_hub)}"


def _line(reason: object) -> str:
    return (str(reason).splitlines() or [""])[0]
