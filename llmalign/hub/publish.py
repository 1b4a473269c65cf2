"""To the Hub and back: what differs is uploaded, an interrupted push goes on, and what comes back is checked."""

import errno
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from llmalign.assets import file_digest
from llmalign.errors import UserError
from llmalign.hub.staging import MANIFEST, MARK, Staged

logger = logging.getLogger(__name__)

UNREACHABLE: Any = (OSError, *HfHubHTTPError.__bases__)  # of whichever HTTP library lies below
# Of the file system: the same command does not go on before that is put right.
DISK = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
DOWNLOADS = ".cache/huggingface/download"  # where the client keeps what it knows of the files of a folder
PULLED = ".cache/llmalign-pull"  # whose files they are
_REASON = 200


@dataclass(frozen=True)
class Pushed:
    """What a push did: files uploaded and deleted, and the page; none of both where nothing differed."""

    uploaded: list[str]
    deleted: list[str]
    url: str
    private: bool


def push(staged: Staged, repo: str, *, public: bool = False, revision: str | None = None, message: str = "") -> Pushed:
    """Upload what differs from the repository, which is made where it is not there, private unless `public`.

    Files are compared by their hashes; those that an earlier push put there and this one lacks are deleted; all of it
    is one commit, and large files that a push which failed had sent are not sent again. Raises UserError for a
    repository that is public where `public` is not set, without rights or a connection, never naming the token.
    """
    api = HfApi()
    with _said(repo):
        if get_token() is None:
            raise UserError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN")
        created = api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.repo_info(repo).private)
        if not private and not public:
            raise UserError(
                f"{repo} is public, and a push is private unless it is asked for: give --public, or another --repo"
            )
        if private and public:
            logger.warning("%s is private and stays so; its settings on the Hub make it public.", repo)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = _hashes(api, repo, revision)
        changed = [name for name in staged.files if there.get(name) not in _both_hashes(staged.folder / name)]
        gone = [name for name in _earlier(api, repo, revision, there) if name not in staged.files and name in there]
        if changed or gone:
            operations: list[Any] = [CommitOperationAdd(name, staged.folder / name) for name in changed]
            operations += [CommitOperationDelete(name) for name in gone]
            api.create_commit(
                repo, operations, commit_message=message or "Model trained with llmalign", revision=revision
            )
    return Pushed(changed, gone, str(created), private)


def pull(repo: str, out: Path, *, revision: str | None = None, overwrite: bool = False) -> int | None:
    """Download a repository into `out` and check every file against its manifest; the number of files checked.

    Raises UserError, naming the file, where one is missing, another than was pushed, or names a path outside, and as
    `push` does; also, without `overwrite`, for an `out` with anything but an earlier pull of the same repository. One
    without a manifest is downloaded, unchecked, which is logged: None.
    """
    if not overwrite:
        _check_free(repo, out)
    with _said(repo):
        try:
            snapshot_download(repo, revision=revision, local_dir=out, ignore_patterns=[MARK])
        finally:
            if (out / DOWNLOADS).is_dir():
                (out / PULLED).write_text(repo, encoding="utf-8")
    file = out / MANIFEST
    if not file.is_file():
        logger.warning("%s has no %s, so nothing could be checked.", repo, MANIFEST)
        return None
    for name, wanted in _manifest(file).items():
        path = out / name
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{name} is in the manifest of {repo} and did not come: pull again, or push again")
        if path.stat().st_size != wanted["size"] or file_digest(path) != wanted["sha256"]:
            raise UserError(f"{name} of {repo} is not what was pushed: its hash differs from the manifest's")
    return len(_manifest(file))


def _check_free(repo: str, out: Path) -> None:
    """Only a pull of the same repository, or a part of one, may be there already."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    found = [name for name in found if not name.startswith(".cache/")]
    more = next((name for name in found if not (out / DOWNLOADS / f"{name}.metadata").is_file()), None)
    record = out / PULLED
    if more is not None or not record.is_file() or record.read_text(encoding="utf-8") != repo:
        held = more or "other files"
        raise UserError(
            f"{out} holds {held} and is no earlier pull of {repo}: name another folder with --out, or give --overwrite"
        )


def _manifest(file: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        bad = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if not bad and all(isinstance(one["size"], int) and isinstance(one["sha256"], str) for one in files.values()):
            return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no manifest ({type(error).__name__}): pull again") from error
    raise UserError(f"{file} is no manifest of this project: {bad[0] if bad else 'sizes or hashes are missing'}")


def _hashes(api: HfApi, repo: str, revision: str | None) -> dict[str, str]:
    """The SHA-256 of large files and git's hash of the others, by name."""
    tree = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in tree if isinstance(entry, RepoFile)
    }


def _both_hashes(path: Path) -> tuple[str, str]:
    content = path.read_bytes() if path.stat().st_size < 32_000_000 else None  # git's own is of small files alone
    git = "" if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return file_digest(path), git


def _earlier(api: HfApi, repo: str, revision: str | None, there: dict[str, str]) -> list[str]:
    """What an earlier push put there, by its manifest."""
    if MANIFEST not in there:
        return []
    return list(_manifest(Path(api.hf_hub_download(repo, MANIFEST, revision=revision))))


@contextmanager
def _said(repo: str) -> Iterator[None]:
    """One sentence for what the Hub or the network refuses; no token in it."""
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository; it is user/name") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no repository {repo} that this token may see; check the name and the token (`hf auth whoami`)"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"the Hub refuses the token for {repo} (HTTP {status}): it needs to be valid and to have write access; "
                "run `hf auth login`, or set HF_TOKEN"
            ) from None
        raise UserError(
            f"the Hub refused {repo} (HTTP {status}): {_clean(error.server_message or str(error))}"
        ) from None
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so the Hub is not asked for anything; unset it") from error
    except RuntimeError as error:  # as the client calls a large file that broke off, with the reason as its cause
        if not isinstance(error.__cause__, UNREACHABLE):
            raise
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK:
            raise _disk(error.__cause__) from error
        raise UserError(f"{_clean(str(error))} The same command goes on where it stopped.") from None
    except UNREACHABLE as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise _disk(error) from error
        raise UserError(
            f"the Hub was lost on the way ({type(error).__name__}: {_clean(str(error))}); the same command goes on "
            "where it stopped"
        ) from None


def _disk(error: OSError) -> UserError:
    where = error.filename or "the disk"
    return UserError(f"{where} cannot be written ({error.strerror}): make room there, or name another folder")


def _clean(text: str) -> str:
    token = get_token()
    text = " ".join((text.replace(token, "***") if token else text).split())
    return text if len(text) <= _REASON else text[:_REASON] + "..."
