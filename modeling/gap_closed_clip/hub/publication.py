"""Publish a model folder: everything that belongs to it, in one commit, after it has loaded in a clean process."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha, validate_repo_id

from ..checkpoint import ADAPTER_CONFIG, base_of_adapter, check_checkpoint, is_adapter, is_local
from .card import CARD_TEMPLATE, write_card
from .reload import check_code, check_reload
from .staging import left_out, published, replaced, staged


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)."


@dataclass
class Publication:
    """
    What went, or would go.

    Args:
        repo_id: owner/name.
        changes: path in the repository -> "new", "changed", "unchanged", "deleted", or "?" where the Hub could not be
            asked.
        sizes: path -> bytes.
        left_out: what the folder holds besides.
        url: of the commit; None if nothing was sent.
        remarks: what its owner should know: what was left out although it looks as if it belonged to the model, paths
            of this machine that everybody will read, no licence; of a dry run, why it could not be sent.
    """

    repo_id: str
    changes: dict[str, str]
    sizes: dict[str, int]
    left_out: list[str]
    remarks: list[str]
    url: str | None = None

    def __str__(self) -> str:
        width = max(map(len, self.changes))
        lines = [
            f"{change:>9}  {name:<{width}}  {_readable(self.sizes[name]) if name in self.sizes else '':>9}"
            for name, change in sorted(self.changes.items())
            if change != "unchanged"
        ]
        if unchanged := list(self.changes.values()).count("unchanged"):
            lines.append(f"unchanged: {unchanged} files")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join([*lines, *self.remarks])

    @property
    def outcome(self) -> str:
        return f"Published: {self.url}" if self.url else f"{self.repo_id} holds just this already."


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    template: str | Path = CARD_TEMPLATE,
    private: bool = True,
    base: str | None = None,
    license: str | None = None,
    keep_card: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    output: str | Path | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Publication:
    """
    Publishes a model folder in one commit: weights, config, processor, code, card, evaluation, figures, handler. Or
    the folder of an adapter, whose base model is on the Hub already.

    Nothing is sent that does not load and run in a clean process without this package. What the repository had from an
    earlier publication and the folder no longer has is deleted; files that are no part of one are left alone.

    Args:
        folder: as train.py, or `model.save_pretrained` and `processor.save_pretrained`, left it.
        repo_id: `owner/name`, or a name of the user's own.
        template: Jinja template of the card; by default this package's own.
        private: of a new repository; an existing one stays what it is.
        base: of an adapter, the Hub id of its base model, where the adapter itself names a folder.
        license: of the weights, an identifier like "apache-2.0"; by default what the training said.
        keep_card: send the README.md of the folder instead of rendering it for this repository.
        trust_remote_code: run the folder's Python files though they are not this version's own.
        dry_run: check everything, send nothing; works without a token too.
        output: a new folder to leave a copy of what goes, e.g. to read the card or try the handler.
        message: of the commit.
        token: by default that of `hf auth login` or HF_TOKEN.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, does not load, or the id is none.
        OSError: no token, no right to write there, or no Hub within reach; the repository is then as it was.
    """
    folder = Path(folder).resolve()
    _check_folder(folder, keep_card, trust_remote_code, output)
    problem = None
    try:
        repo_id = check_access(repo_id, token)
    except OSError as error:
        if not dry_run:
            raise
        problem = f"It could not be sent now: {error}"
    base_id, base_folder = _base_on_the_hub(folder, base, token, trust_remote_code)
    with staged(folder, base_id) as (stage, remarks), _named(stage, folder):
        if not keep_card:
            card = write_card(stage, template=template, repo_id=repo_id, license=license, base_folder=base_folder)
            if card.data.license is None:
                remarks.append(
                    "The card names no licence, so nobody may reuse the weights: --license, e.g. apache-2.0."
                )
        check_reload(stage, base_folder, folder if base_folder else None)
        if output is not None:
            shutil.copytree(stage, output)
        files = published(stage)
        with _hub_errors(repo_id):
            api = HfApi(token=token)
            remote, head = _remote_files(api, repo_id, may_fail=dry_run)
            publication = Publication(
                repo_id,
                changes=_changes(files, remote),
                sizes={name: path.stat().st_size for name, path in files.items()},
                left_out=left_out(folder, list(files)),
                remarks=[*remarks, problem] if problem else remarks,
            )
            if not dry_run:
                publication.url = _commit(api, publication, files, head, private, message)
    return publication


def _check_folder(folder: Path, keep_card: bool, trust_remote_code: bool, output: str | Path | None) -> None:
    """What can be known to be wrong before anything runs."""
    check_checkpoint(folder)
    if (folder / ADAPTER_CONFIG).is_file() and not is_adapter(folder):
        raise ValueError(
            f"{folder} holds a whole model and an adapter beside it: merge them (peft's merge_and_unload) and save "
            "the model, or save the adapter alone, into another folder."
        )
    if not trust_remote_code:
        check_code(folder)
    if keep_card and not (folder / "README.md").is_file():
        raise FileNotFoundError(f"{folder} has no README.md to keep: leave keep_card (--keep-card) out.")
    if output is not None and Path(output).exists():
        raise FileExistsError(f"{output} exists already: name a new folder for what would go.")


def _base_on_the_hub(
    folder: Path, name: str | None, token: str | None, trust_remote_code: bool
) -> tuple[tuple[str, str] | None, Path | None]:
    """Hub id and commit of an adapter's base model, and a folder with it; nothing for a whole model."""
    if not is_adapter(folder):
        return None, None
    name, revision = (name, None) if name else base_of_adapter(folder)
    if name is None or is_local(name):
        raise ValueError(
            f"{folder} is an adapter for {name}, which nobody else has: publish that first, python publish.py {name} "
            "owner/name, and then the adapter with --base owner/name."
        )
    with _hub_errors(name):
        commit = HfApi(token=token).repo_info(name, revision=revision).sha
        base_folder = Path(snapshot_download(name, revision=commit, token=token))
    check_checkpoint(base_folder)
    if not trust_remote_code:
        check_code(base_folder)
    return (name, commit), base_folder


def check_access(repo_id: str, token: str | None = None) -> str:
    """
    The whole id, `owner/name`, of a repository that this user may write to.

    Raises:
        ValueError: it is no repository id.
        OSError: no token, no right to write there, or no Hub within reach.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id, which is owner/name: {error}") from error
    if not (token or get_token()):
        raise OSError(f"There is no token to publish {repo_id} with. {LOG_IN}")
    with _hub_errors(repo_id):
        user = HfApi(token=token).whoami()
        roles = {organisation["name"]: organisation.get("roleInOrg") for organisation in user.get("orgs", [])}
        owners = [user["name"], *(name for name, role in roles.items() if role != "read")]
    owner, _, name = repo_id.rpartition("/")
    if owner and owner not in owners:
        raise OSError(f"The token is {user['name']}'s, who can't write to {repo_id}, but to: {', '.join(owners)}.")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OSError(f"The token may only read, so {repo_id} can't be published with it. {LOG_IN}")
    return f"{owner or user['name']}/{name}"


def _remote_files(api: HfApi, repo_id: str, may_fail: bool) -> tuple[dict[str, str] | None, str | None]:
    """Path -> hash of what the repository holds, and its latest commit; ({}, None) where there is no repository."""
    try:
        head = api.repo_info(repo_id).sha
        entries = api.list_repo_tree(repo_id, recursive=True, revision=head)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
    except RepositoryNotFoundError:
        return {}, None
    except (HTTPError, OfflineModeIsEnabled, HFValidationError):
        if may_fail:
            return None, None
        raise
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}, head


def _changes(files: dict[str, Path], remote: dict[str, str] | None) -> dict[str, str]:
    if remote is None:
        return dict.fromkeys(files, "?")
    changes = {name: _change(path, remote.get(name)) for name, path in files.items()}
    gone = [name for name in remote if name not in files and replaced(name)]
    return changes | dict.fromkeys(gone, "deleted")


def _change(path: Path, known: str | None) -> str:
    if known is None:
        return "new"
    with open(path, "rb") as file:
        # git's hash for a file in git itself, SHA-256 for one in its large file storage
        own = sha.sha_fileobj(file).hex() if len(known) == 64 else sha.git_hash(file.read())
    return "unchanged" if own == known else "changed"


def _commit(
    api: HfApi, publication: Publication, files: dict[str, Path], head: str | None, private: bool, message: str | None
) -> str | None:
    """One commit of what changed, on top of `head`; its URL."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, change in publication.changes.items():
        if change == "deleted":
            operations.append(CommitOperationDelete(name))
        elif change != "unchanged":
            operations.append(CommitOperationAdd(name, files[name].resolve()))
    if not operations:
        return None
    if head is None:
        api.create_repo(publication.repo_id, private=private)
        head = api.repo_info(publication.repo_id).sha
        message = message or "Publish the model"
    message = message or "Update the model"
    try:
        # On top of what was compared with: a commit that came in between must not be undone unseen.
        commit = api.create_commit(publication.repo_id, operations, commit_message=message, parent_commit=head)
    except HTTPError as error:
        if not _has_arrived(api, publication.repo_id, head, message):
            raise
        raise OSError(
            f"{publication.repo_id}: the answer was lost ({type(error).__name__}), but the commit has arrived: "
            "publish again to be sure, and it will say so."
        ) from error
    return commit.commit_url


def _has_arrived(api: HfApi, repo_id: str, head: str, message: str) -> bool:
    """Whether our commit is there although its answer is not."""
    try:
        latest, before = api.list_repo_commits(repo_id)[:2]
    except (HTTPError, ValueError, KeyError, TypeError):
        return False
    return latest.title == message and before.commit_id == head


@contextmanager
def _named(stage: Path, folder: Path) -> Iterator[None]:
    """Errors about the stage, which is gone when they are read, name the folder that it was made of."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(stage) not in str(error):
            raise
        raise ValueError(str(error).replace(str(stage), str(folder))) from error


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """The Hub's errors as one line each that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be published. Unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: f" {LOG_IN}",
            403: " The token may not write there: choose another owner, or a token with write access.",
            412: " Somebody else has pushed in the meantime: look at it, then publish again.",
        }.get(status, " Nothing in the repository has changed: publish again.")
        raise OSError(f"{repo_id}: the Hub refused, {str(error).strip().splitlines()[0]}.{remedy}") from error
    except HTTPError as error:
        raise OSError(
            f"{repo_id}: the Hub can't be reached ({type(error).__name__}: {error}). Nothing in the repository has "
            "changed: publish again when the network is back."
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise OSError(
            f"{repo_id}: what answers is not the Hub ({type(error).__name__}: {error}). Is there a proxy or a login "
            "page in between? Is HF_ENDPOINT right?"
        ) from error


def _readable(size: int) -> str:
    amount, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
