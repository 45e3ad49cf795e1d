"""Publishes a model folder: all that belongs to it, in one commit, after it has loaded in a clean process."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint import base_of_adapter, check_checkpoint, is_adapter, is_local
from .card import CARD_TEMPLATE, write_card
from .hub_errors import LOG_IN, hub_errors, is_refusal
from .reload import check_code, check_reload
from .repository_card import read_repository_card
from .staging import ONNX_FOLDER, further_modalities, left_out, published, replaced, staged


STAYS_PRIVATE = "{} is there already and private, and stays so: its settings on the Hub make it public."
STAYS_PUBLIC = "{} is there already and public, and stays so: everybody can read what is published there."
CONFIG = "config.json"
NO_LICENSE = "The card names no licence, so nobody may reuse the weights: --license, e.g. apache-2.0."


@dataclass
class Publication:
    """
    What was published, or would be.

    Args:
        repo_id: owner/name.
        changes: path in the repository -> "new"; "present", which is replaced where its content differs; "deleted"; or
            "?" where the Hub could not be asked.
        sizes: path -> bytes.
        left_out: what the folder holds besides.
        remarks: what its owner should know: what was left out although it looks as if it belonged to the model, paths
            of this machine that everybody will read, no licence, another card that is replaced, a repository that
            stays private; of a dry run, why it could not be sent.
        url: of the commit; None if there was none: a dry run, or a repository that holds just this already.
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
            f"{change:>7}  {name:<{width}}  {_readable(self.sizes[name]) if name in self.sizes else '':>9}"
            for name, change in sorted(self.changes.items())
        ]
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
    private: bool | None = None,
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

    Nothing is sent that does not load and run in a clean process without this package. What the repository has and the
    folder has not is deleted, whoever put it there, if its name is one of those that a publication has (weights, code,
    figures, examples); other files are left alone.

    Args:
        folder: as training, or `model.save_pretrained` and `processor.save_pretrained`, left it.
        repo_id: `owner/name`, or a name of the user's own.
        template: Jinja template of the card; by default this package's own.
        private: of a new repository, by default true; an existing one stays what it is, and that is told. With True
            nothing is sent to one that is public.
        base: of an adapter, the Hub id of its base model, where the adapter itself names a folder.
        license: of the weights, an identifier like "apache-2.0"; by default that of the card that is there, or else
            what the training said.
        keep_card: send the README.md of the folder instead of rendering it for this repository.
        trust_remote_code: run the folder's Python files though they are not this version's own.
        dry_run: check everything, send nothing; works without a token too.
        output: a new folder to leave a copy of what goes, e.g. to read the card or try the handler.
        message: of the commit.
        token: by default that of `hf auth login` or HF_TOKEN.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or damaged, does not load, or the id is none; the
            repository is public and `private` is true.
        OSError: no token, no right to write there, or no Hub within reach; the repository is then as it was.
    """
    folder = Path(folder).resolve()
    _check_folder(folder, keep_card, trust_remote_code, output)
    repo_id, problems = _may_write(repo_id, token, dry_run)
    base_id, base_folder = _base_on_the_hub(folder, base, token, trust_remote_code)
    with hub_errors(repo_id):
        there = read_repository_card(HfApi(token=token), repo_id, dry_run)
    problems += _visibility(repo_id, there.private, private)
    with staged(folder, base_id) as (stage, remarks), _errors_name(folder, stage):
        if not keep_card:
            known = license or there.license
            terms = there.license_terms if known == there.license else {}
            card = write_card(
                stage, template=template, repo_id=repo_id, license=known, license_terms=terms, base_folder=base_folder
            )
            remarks += [] if card.data.license else [NO_LICENSE]
            remarks += there.remarks(repo_id, stage, (stage / "README.md").read_text(encoding="utf-8"), license)
        check_reload(stage, base_folder, folder if base_folder else None)
        if output is not None:
            shutil.copytree(stage, output)
        files = published(stage)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        with hub_errors(repo_id):
            changes, url = _send(HfApi(token=token), repo_id, stage, files, private, message, dry_run)
    return Publication(repo_id, changes, sizes, left_out(folder, list(files)), [*remarks, *problems], url)


def _visibility(repo_id: str, now: bool | None, private: bool | None) -> list[str]:
    """
    What is told of a repository that stays private or public.

    Args:
        now: whether it is private; None where there is none.

    Raises:
        ValueError: it is public, and `private` is true.
    """
    if now is None:
        return []
    if now:
        return [STAYS_PRIVATE.format(repo_id)] if private is False else []
    if private:
        raise ValueError(
            f"{repo_id} is public, and the model is to be private: make the repository private in its settings on the "
            "Hub, or give another name."
        )
    return [STAYS_PUBLIC.format(repo_id)] if private is None else []


def _check_folder(folder: Path, keep_card: bool, trust_remote_code: bool, output: str | Path | None) -> None:
    """Checks what can be checked before anything runs."""
    check_checkpoint(folder)
    if not trust_remote_code:
        check_code(folder)
    if keep_card and not (folder / "README.md").is_file():
        raise FileNotFoundError(f"{folder} has no README.md to keep: leave keep_card (--keep-card) out.")
    if output is not None and Path(output).exists():
        raise FileExistsError(f"{output} exists already: name a new folder for what would go.")


def _base_on_the_hub(
    folder: Path, name: str | None, token: str | None, trust_remote_code: bool
) -> tuple[tuple[str, str] | None, Path | None]:
    """Hub id and commit of an adapter's base model, and a folder that holds it; (None, None) for a whole model."""
    if not is_adapter(folder):
        return None, None
    name, revision = (name, None) if name else base_of_adapter(folder)
    if name is None or is_local(name):
        raise ValueError(
            f"{folder} is an adapter for {name}, which nobody else has: publish that first, gap-closed-clip publish "
            f"{name} owner/name, and then the adapter with --base owner/name."
        )
    with hub_errors(name):
        commit = HfApi(token=token).repo_info(name, revision=revision).sha
        base_folder = Path(snapshot_download(name, revision=commit, token=token))
    check_checkpoint(base_folder)
    if not trust_remote_code:
        check_code(base_folder)
    return (name, commit), base_folder


def _may_write(repo_id: str, token: str | None, dry_run: bool) -> tuple[str, list[str]]:
    """The whole id; of a dry run also why nothing could be sent there now, which otherwise is an error."""
    try:
        return check_access(repo_id, token), []
    except OSError as error:
        if not dry_run:
            raise
        return repo_id, [f"It could not be sent now: {error}"]


def check_access(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """
    The whole id, `owner/name`, of a repository that this user may write to.

    Raises:
        ValueError: it is no repository id; the repository is public and `private` is true.
        OSError: no token, no right to write there, or no Hub within reach.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id, which is owner/name: {error}") from error
    if not (token or get_token()):
        raise OSError(f"There is no token to publish {repo_id} with. {LOG_IN}")
    with hub_errors(repo_id):
        user = HfApi(token=token).whoami()
        roles = {organisation["name"]: organisation.get("roleInOrg") for organisation in user.get("orgs", [])}
        owners = [user["name"], *(name for name, role in roles.items() if role != "read")]
    owner, _, name = repo_id.rpartition("/")
    if owner and owner not in owners:
        raise OSError(f"The token is {user['name']}'s, who can't write to {repo_id}, but to: {', '.join(owners)}.")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OSError(f"The token may only read, so {repo_id} can't be published with it. {LOG_IN}")
    whole = f"{owner or user['name']}/{name}"
    if private:
        with hub_errors(whole):
            there = read_repository_card(HfApi(token=token), whole, dry_run=False)
        _visibility(whole, there.private, private)
    return whole


def _send(
    api: HfApi,
    repo_id: str,
    stage: Path,
    files: dict[str, Path],
    private: bool | None,
    message: str | None,
    dry_run: bool,
) -> tuple[dict[str, str], str | None]:
    """Path -> what becomes of it in the repository, and the URL of the commit; a dry run makes none."""
    try:
        remote, head = _remote_files(api, repo_id)
        before = _modalities_there(api, repo_id, remote, head)
    except (HTTPError, OfflineModeIsEnabled, HFValidationError):
        if not dry_run:
            raise
        return dict.fromkeys(files, "?"), None
    changes = {name: "present" if name in remote else "new" for name in files}
    changes |= {name: "deleted" for name in remote if name not in files and replaced(name, stage, before)}
    return changes, None if dry_run else _commit(api, repo_id, changes, files, head, private, message)


def _remote_files(api: HfApi, repo_id: str) -> tuple[list[str], str | None]:
    """Paths in the repository, and its latest commit; ([], None) where there is no repository."""
    try:
        head = api.repo_info(repo_id).sha
    except RepositoryNotFoundError:
        return [], None
    return api.list_repo_files(repo_id, revision=head), head


def _modalities_there(api: HfApi, repo_id: str, remote: list[str], head: str | None) -> list[str]:
    """Further modalities of the model in the repository, which may have ONNX files there."""
    if CONFIG not in remote or not any(name.startswith(f"{ONNX_FOLDER}/") for name in remote):
        return []
    return further_modalities(Path(api.hf_hub_download(repo_id, CONFIG, revision=head)))


def _commit(
    api: HfApi,
    repo_id: str,
    changes: dict[str, str],
    files: dict[str, Path],
    head: str | None,
    private: bool | None,
    message: str | None,
) -> str | None:
    """One commit on top of `head`, which the library makes of what differs there; its URL, None if nothing does."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name) if change == "deleted" else CommitOperationAdd(name, files[name].resolve())
        for name, change in changes.items()
    ]
    message = message or ("Publish the model" if head is None else "Update the model")
    if head is None:
        api.create_repo(repo_id, private=private is not False)
        head = api.repo_info(repo_id).sha
    try:
        # On top of what was listed: a commit that came in between must not be undone unseen.
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head)
    except HTTPError as error:
        # What the Hub refused is not there; a commit that is, of the same message, is somebody else's.
        if is_refusal(error) or not _has_arrived(api, repo_id, head, message):
            raise
        raise OSError(
            f"{repo_id}: the answer was lost ({type(error).__name__}), but the commit has arrived: publish again to "
            "be sure, and it will say so."
        ) from error
    return None if commit.oid == head else commit.commit_url  # with nothing to commit, that of the latest


def _has_arrived(api: HfApi, repo_id: str, head: str, message: str) -> bool:
    """Whether our commit is there although its answer is not."""
    try:
        latest, before = api.list_repo_commits(repo_id)[:2]
    except (HTTPError, ValueError, KeyError, TypeError):
        return False
    return latest.title == message and before.commit_id == head


@contextmanager
def _errors_name(folder: Path, stage: Path) -> Iterator[None]:
    """Errors about the stage, which is gone when they are read, name the folder that it was made of."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(stage) not in str(error):
            raise
        raise ValueError(str(error).replace(str(stage), str(folder))) from error


def _readable(size: int) -> str:
    amount, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
