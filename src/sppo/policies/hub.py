"""The Hugging Face hub: the token, and what an error of its client means. Imports nothing heavy."""

from __future__ import annotations

import os

from sppo.core.errors import UserError

# What the user can do, by the client's error; the first whose name fits.
REMEDIES = {
    "GatedRepo": "it is gated: accept its licence on its page, and export HF_TOKEN of that account",
    "RepositoryNotFound": "there is none of that name, or it is private: check the name, and export HF_TOKEN where it is private",
    "RevisionNotFound": "it has no such revision: correct that",
    "EntryNotFound": "it has no such file: check the name",
    "OfflineMode": "HF_HUB_OFFLINE is set and the local cache lacks it: fetch it once with the network, or unset that",
}
# What the client says of a hub that does not answer depends on where it was cut off.
SILENT = "it is not in the local cache, and the hub does not answer or HF_HUB_OFFLINE is set: check the network, or fetch it on a machine that has one"


def hub_token() -> str | bool:
    """The token of the environment; False, which is none, where there is none: never one stored on disk."""
    return os.environ.get("HF_TOKEN") or False


def hub_failure(error: BaseException) -> str:
    """The error's name and what to do, for a UserError."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    # A missing entry of the local cache is one of the client's EntryNotFound errors, but means that the hub was not asked.
    if "LocalEntryNotFoundError" in kinds or {
        "ConnectError",
        "ConnectionError",
        "TimeoutException",
        "TransportError",
    } & set(kinds):
        return f"({kinds[0]}): {SILENT}"
    for name, remedy in REMEDIES.items():
        if any(kind.startswith(name) for kind in kinds):
            return f"({kinds[0]}): {remedy}"
    return f"({kinds[0]}: {error}): check the name, the network and HF_TOKEN"


def check_push() -> None:
    """UserError unless a token is exported and the hub may be asked."""
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "push_to_hub needs a token that may write; export HF_TOKEN, or set push_to_hub to null"
        )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(
            "push_to_hub is set, and so is HF_HUB_OFFLINE; unset that, or set push_to_hub to null"
        )
