"""Reasons and advice for the errors of the hubs' clients.

A rule is a set of keys and a message. Keys are names of exception classes, HTTP statuses, or words
for a situation. The first rule with a key of the error applies. The clients are not imported here.
"""

from typing import Any

Rule = tuple[set[str | int], str]

NETWORK_ERRORS: set[str | int] = {
    *("ConnectionError", "Timeout", "TimeoutError"),  # requests and Python
    *("NetworkError", "TimeoutException", "ProxyError", "SSLError"),  # httpx
}

ANY_STATUS = "any status"
OFFLINE = "offline"
NO_CREDENTIALS = "no credentials"

KAGGLE_LOGIN = "set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or run kagglehub.login()"
KAGGLE_TOKEN = (
    "create a token at https://www.kaggle.com/settings, and set KAGGLE_API_TOKEN or call "
    "kagglehub.login()"
)
HUGGING_FACE_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
HUGGING_FACE_TOKEN = (
    "create a token that may write at https://huggingface.co/settings/tokens, and set HF_TOKEN or "
    "run `hf auth login`"
)
BY_HAND = "or download the folder by other means and pass its path"

KAGGLE_DOWNLOAD: list[Rule] = [
    (
        {"CredentialError", "UnauthenticatedError", NO_CREDENTIALS},
        f"Kaggle requires a login: {KAGGLE_LOGIN}, and accept the license at {{page}}",
    ),
    (
        {401, 403},
        "Kaggle refuses this account ({status}): accept the license at {page} with the account "
        f"whose credentials are set here; if they have expired, {KAGGLE_LOGIN}",
    ),
    ({404}, "Kaggle has no such model (404): look for it at {page}"),
    (
        NETWORK_ERRORS,
        f"no network: Kaggle cannot be reached. Connect, {BY_HAND}{{hint}}",
    ),
    ({"Exception"}, "Kaggle's client failed with {kind}: {first_line}. Try again"),
]

HUGGING_FACE_DOWNLOAD: list[Rule] = [
    (
        {"GatedRepoError"},
        f"the model is gated: accept the license at {{page}}, then {HUGGING_FACE_LOGIN}",
    ),
    (
        {"RevisionNotFoundError"},
        "it has no revision {revision!r}: its branches are at {page}/tree/main",
    ),
    (
        {"RepositoryNotFoundError"},
        "Hugging Face has no such model, or it is private: look at {page}; then "
        + HUGGING_FACE_LOGIN,
    ),
    (
        {"LocalTokenNotFoundError", 401, 403},
        f"Hugging Face refuses this account: {HUGGING_FACE_LOGIN}, and accept the license at "
        "{page}",
    ),
    ({ANY_STATUS}, "Hugging Face answered {status}: {first_line}. Try again later"),
    ({OFFLINE}, f"HF_HUB_OFFLINE is set, and the cache does not hold it: unset it, {BY_HAND}"),
    (
        {"Exception"},
        "no network: Hugging Face cannot be reached, and the cache does not hold it. Connect, "
        + BY_HAND,
    ),
]

UPLOAD: list[Rule] = [
    (
        {"CredentialError", "UnauthenticatedError", "LocalTokenNotFoundError"},
        "you are not logged in: {log_in}",
    ),
    ({"OfflineModeIsEnabled"}, "HF_HUB_OFFLINE is set: unset it"),
    ({401}, "{hub} requires a login (401): {log_in}"),
    (
        {403, 404},
        "{hub} refuses this account ({status}): the account must be {owner!r} or a member with "
        "write access, and its token must allow writing; {log_in}. {hub}'s message: {message}",
    ),
    ({ANY_STATUS}, "{hub} answered {status}: {message}. Try again later"),
    (
        NETWORK_ERRORS,
        "no network: {hub} cannot be reached. Connect, and call again. Message: {message}",
    ),
    (
        {"Exception"},
        "{kind}: {message}. Call again: files that were already sent are skipped",
    ),
]


def advice(
    rules: list[Rule], error: Exception, situations: set[str] | None = None, **values: Any
) -> str:
    """Returns the reason of a failure and the remedy, on one line.

    `situations` are further keys, such as `OFFLINE`; `values` fill the message's placeholders.
    """
    status = status_of(error)
    keys: set[str | int] = {cls.__name__ for cls in type(error).__mro__} | (situations or set())
    if status is not None:
        keys |= {status, ANY_STATUS}
    template = next(template for rule, template in rules if rule & keys)
    return template.format(
        status=status,
        kind=type(error).__name__,
        message=" ".join(str(error).split()),
        first_line=str(error).strip().partition("\n")[0].rstrip("."),
        **values,
    )


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status that a hub answered, if it did."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return getattr(error, "error_code", None) or status
