"""The Hugging Face hub: a model's files, the token, and what an error of its client means.

This module imports no large package.
"""

from __future__ import annotations

import os

from sppo.core.errors import UserError

# The factors of a LoRA policy's update (`lora_update.py`), in the form of safetensors. The name
# does not end like that, because vLLM reads every such file.
LORA_FACTORS = "lora_update.factors"
# The files of a model's folder that are fetched, or linked to.
HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    LORA_FACTORS,
]
# What the user can do, by the beginning of the error's class name. The first match counts.
REMEDIES = {
    "GatedRepo": (
        "it is gated; accept its licence on its page, and export HF_TOKEN of the same account"
    ),
    "RepositoryNotFound": (
        "it does not exist or is private; check the name, and export HF_TOKEN if it is private"
    ),
    "RevisionNotFound": "this revision does not exist; correct it",
    "EntryNotFound": "this file does not exist there; check the name",
    "OfflineMode": (
        "HF_HUB_OFFLINE is set and the local cache does not hold it; unset HF_HUB_OFFLINE, or "
        "fetch it once with the network"
    ),
}
# The client raises one of these errors if the hub does not answer; which one depends on how far the
# connection got. LocalEntryNotFoundError is a subclass of EntryNotFoundError, but it means that the
# client did not ask the hub.
NO_ANSWER = {
    "LocalEntryNotFoundError",
    "ConnectError",
    "ConnectionError",
    "TimeoutException",
    "TransportError",
}
NO_ANSWER_REMEDY = (
    "it is not in the local cache, and the hub does not answer or HF_HUB_OFFLINE is set; check "
    "the network, or fetch it on a machine with network"
)


def hub_token() -> str | bool:
    """The token in HF_TOKEN. Without it False, so that the client uses no token stored on disk."""
    return os.environ.get("HF_TOKEN") or False


def hub_failure(error: BaseException) -> str:
    """The name of the client's error and what the user can do, as part of a UserError's text."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if NO_ANSWER & set(kinds):
        return f"({kinds[0]}): {NO_ANSWER_REMEDY}"
    for name, remedy in REMEDIES.items():
        if any(kind.startswith(name) for kind in kinds):
            return f"({kinds[0]}): {remedy}"
    return f"({kinds[0]}: {error}); check the name, the network and HF_TOKEN"


def check_push() -> None:
    """UserError unless HF_TOKEN is set and HF_HUB_OFFLINE is not."""
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "push_to_hub needs a token with write access; export HF_TOKEN, or set push_to_hub to "
            "null"
        )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(
            "push_to_hub and HF_HUB_OFFLINE are both set; unset HF_HUB_OFFLINE, or set push_to_hub "
            "to null"
        )
