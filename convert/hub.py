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
from jvjepa.convert.source import CONFIG_FILE, INDEX_FILE, PREPROCESSOR_FILES
from jvjepa.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source on this machine.

    Args:
        name: the hub id, or the folder as it was given.
        folder: where it lies.
        revision: the hub's commit, or "".
    """

    name: str
    folder: Path
    revision: str


def resolve(source: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint, and downloads it where it is not here yet.

    Args:
        source: a folder; a released checkpoint's name ("vjepa2-vitl-fpc64-256"); or a hub id
            ("facebook/vjepa2-vitl-fpc64-256"). A folder that exists wins.
        revision: a branch, tag or commit of the hub's; None takes its main branch.

    Returns:
        The folder, with only the files that a conversion reads.

    Raises:
        InputError: it is none of these, does not exist, or is not in the cache and cannot be
            downloaded.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"revision {revision!r} is for hub ids, and {source} is a folder")
        return Checkpoint(name=source, folder=path, revision="")
    if path.suffix in (".pt", ".pth"):
        raise InputError(
            f"{source}: Meta's .pt files are not supported yet; convert the same model from the "
            "hub, such as facebook/vjepa2-vitl-fpc64-256"
        )
    if path.exists():
        raise InputError(f"{source} is a file; SOURCE must be a folder, a name, or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"{source} is not a folder, and cannot be a hub id (owner/name) either")
    repo = source if "/" in source else _registered(source)
    folder = _download(source, repo, revision)
    return Checkpoint(name=repo, folder=folder, revision=folder.name)


def _registered(name: str) -> str:
    try:
        return registry.get(name).repo
    except InputError as error:
        raise InputError(f"{name!r} is not a folder, and {error}") from None


def _download(source: str, repo: str, revision: str | None) -> Path:
    """Returns the snapshot in the cache; its name is the commit."""
    patterns = [CONFIG_FILE, "*.safetensors", INDEX_FILE, *PREPROCESSOR_FILES]
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
    return f"; the released checkpoints are {', '.join(registry.RELEASES)}"


def _line(reason: object) -> str:
    return (str(reason).splitlines() or [""])[0]
