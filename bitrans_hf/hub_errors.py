"""Errors of the Hugging Face Hub as one sentence that says what to do."""

import urllib.error
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def hub_error_sentence(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """Say in one sentence why talking to the Hub failed, and what to do.

    Args:
        error: The caught error; its causes are inspected too, since transformers and datasets wrap these errors.
        repo_id: The repository concerned.
        revision: The requested branch, tag or commit; None for main.

    Returns:
        A sentence without a period, so that more can follow; None if the error is unrelated to the Hub. It never
        contains a token.
    """
    for cause in causes(error):
        sentence = _sentence(cause, repo_id, revision or "main")
        if sentence is not None:
            return sentence
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, the nearest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _sentence(error: BaseException, repo_id: str, revision: str) -> str | None:
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so {endpoint} was not asked for {repo_id}; unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return f"{endpoint} wants a token for this; set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no name of a repository; use owner/name"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision!r} at {endpoint}; look at its list of versions"
    if isinstance(error, RepositoryNotFoundError):
        hidden = "the token may not see it" if get_token() else "it is private and no token is set (HF_TOKEN)"
        return f"there is no repository {repo_id} at {endpoint}, or {hidden}; check the name, which is owner/name"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{repo_id} lacks a file that was asked for: {str(error).splitlines()[-1].strip()}"
    if isinstance(error, HfHubHTTPError):
        return _status_sentence(error.response.status_code, repo_id, endpoint)
    if is_connection_error(error):
        return f"the connection to {endpoint} broke or could not be made ({type(error).__name__})"
    return None


def is_connection_error(error: BaseException) -> bool:
    """Return whether a connection failed, for any HTTP library that the Hub client uses.

    huggingface_hub uses httpx2 or, in older versions, httpx. Neither is a dependency of ours, so their errors are
    recognized by name.
    """
    transport = ("httpx", "httpx2")
    names = {(base.__module__.partition(".")[0], base.__name__) for base in type(error).__mro__}
    return any((library, "TransportError") in names for library in transport) or isinstance(
        error, ConnectionError | TimeoutError | urllib.error.URLError
    )


def _status_sentence(status: int, repo_id: str, endpoint: str) -> str:
    if status == 401 and get_token():
        return f"{endpoint} does not accept the token; set HF_TOKEN to a valid one, or run `hf auth login`"
    if status == 401:
        return f"{endpoint} wants a token for this; set HF_TOKEN, or run `hf auth login`"
    if status == 403:
        return f"the token may not write to {repo_id} at {endpoint}; use one that may, or another owner"
    if status in (409, 412):
        return f"somebody else changed {repo_id} at the same moment"
    if status == 429 or status >= 500:
        return f"{endpoint} is busy or has a fault (HTTP {status}); try again later"
    return f"{endpoint} refused a request for {repo_id} (HTTP {status})"
