"""The Hub's errors in one line each: what it says, and what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)."
UNCHANGED = "Nothing in the repository has changed: publish again"
REMEDIES = {
    401: LOG_IN,
    403: "The token may not write there: choose another owner, or a token with write access.",
    409: "It was made in the meantime, or this token may not see it: publish again, or with a token that may read it.",
    412: "Somebody else has pushed in the meantime: look at it, then publish again.",
    429: f"{UNCHANGED} in a while.",
}


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """The Hub's errors as one line each that says what to do."""
    try:
        yield
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        # hf_xet, which sends and fetches weights, has Python's ConnectionError. The last one only tells that a file is
        # not in the cache; its cause is why it was not fetched.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise OSError(f"{repo_id}: {_in_a_line(cause)}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise OSError(
            f"{repo_id}: what answers is not the Hub ({type(error).__name__}: {error}). Is there a proxy or a login "
            "page in between? Is HF_ENDPOINT right?"
        ) from error


def is_refusal(error: Exception) -> bool:
    """Whether the Hub has answered that it does not do what was asked."""
    return isinstance(error, HfHubHTTPError) and 400 <= error.response.status_code < 500


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be published. Unset it."
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refused, {_reason(error)}. {_remedy(error)}"
    return f"the Hub can't be reached ({type(error).__name__}: {error}). {UNCHANGED} when the network is back."


def _reason(error: HfHubHTTPError) -> str:
    """The first line of the library's message, which names the status; and what the Hub itself says."""
    line = str(error).strip().splitlines()[0].rstrip(".:").removesuffix(": None")
    said = " ".join((error.server_message or "").split()).rstrip(".")
    return line if not said or said.lower() in line.lower() else f"{line}: {said}"


def _remedy(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return "Ask for access on its page, or use a token of somebody who has it."
    if isinstance(error, RepositoryNotFoundError):
        return "Correct the name; or use a token that may read it, if it is private."
    if isinstance(error, RevisionNotFoundError):
        return "Name a revision that is there."
    if status == 403 and "storage" in (error.server_message or "").lower():
        return "Make room there, or choose another owner."
    wrong = f"{UNCHANGED} when that is put right." if is_refusal(error) else f"{UNCHANGED}."
    return REMEDIES.get(status, wrong)


__all__ = ["LOG_IN", "hub_errors", "is_refusal"]
