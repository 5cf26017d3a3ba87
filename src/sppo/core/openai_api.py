"""What servers with OpenAI's interface want of a request, and whether OpenAI still has a model. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import re
import textwrap
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sppo.core.errors import UserError

OPENAI = "https://api.openai.com/v1"
OPENAI_MODELS = ("gpt-", "o1", "o3", "o4")  # what the names of OpenAI's models begin with
# The model behind an annotators_config of alpaca-eval, of those that the documentation names.
ANNOTATORS = {"weighted_alpaca_eval_gpt4_turbo": "gpt-4-1106-preview"}


def request_forms(max_tokens: int, **sampling: Any) -> list[dict[str, Any]]:
    """Arguments of one chat completion, in the order in which they are tried until a server takes them.

    First as most servers want them; then as OpenAI's models from GPT-5 on, which must be told not to reason before they
    let anybody choose a temperature or read log-probabilities; then for models that always reason, and choose themselves.
    """
    return [
        {"max_tokens": max_tokens, **sampling},
        {"max_completion_tokens": max_tokens, "reasoning_effort": "none", **sampling},
        {},
    ]


# What the openai package and its callers raise where a server's answer is no chat completion:
# broken JSON, missing fields, HTML.
NO_COMPLETION = (
    json.JSONDecodeError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
)


def quoted(text: str | None) -> str:
    """A judge's answer, short and in one line, for a message."""
    short = textwrap.shorten(text or "", 200, placeholder="...")
    return repr(short) if short else "an empty answer"


def judge_failure(judge: str, error: Exception, key: str | None, cache: object) -> UserError:
    """What to tell the user of an error that asking the judge raised, without the key.

    error: one of `NO_COMPLETION`, or of the openai package. cache: where finished judgments are.
    """
    said = str(error).replace(key or "\0", "(key)")
    if isinstance(error, NO_COMPLETION):
        said = (
            f"its answer is no chat completion ({type(error).__name__}: {said}); is the "
            "address right? It often ends in /v1"
        )
    else:
        said = f"{type(error).__name__}: {said}"
    short = textwrap.shorten(said, 500, placeholder="...")
    return UserError(
        f"judge {judge}: {short}; fix it and run again, finished judgments are kept in {cache}"
    )


def check_address(url: str, where: str) -> None:
    """Raise UserError unless `url`, of the configuration key `where`, is the address of a server.

    No server is asked. A name or password in the address would stand in results, records and logs,
    so it is refused, and no message repeats it.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # a port out of range or not a number, brackets without an end
        scheme, host, port = "", None, None
    if re.search(r"(^|//)[^/?#]*@", url):
        raise UserError(
            f"{where} holds a name or password, which would stand in results, records "
            "and logs; leave out what is before the @, and export the key as "
            "OPENAI_API_KEY"
        )
    blank = re.search(r"[\s\x00-\x1f\x7f]", url)
    if scheme not in ("http", "https") or not host or port == 0 or blank:
        raise UserError(
            f"{where} is {url!r}, which is no address of a server; give one such as "
            "http://localhost:8000/v1"
        )


def check_served(
    judge: str, judge_model: str | None, judge_base_url: str | None, where: str
) -> None:
    """Raise UserError if the judge of the configuration section `where` is OpenAI's, and OpenAI does not have that model or refuses the key.

    Asked before hours of work, for models are shut down. What else comes back, or nothing, says nothing: jobs may have the
    network that this machine lacks, and another server may not be up yet.
    """
    if judge == "openai":
        model = judge_model if (judge_base_url or "").startswith(OPENAI) else None
    else:
        model = ANNOTATORS.get(judge, judge if judge.startswith(OPENAI_MODELS) else None)
    if model is None or {"OPENAI_BASE_URL", "OPENAI_API_BASE"} & os.environ.keys():
        return
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError(
            f"judge {model} needs a key; export OPENAI_API_KEY, or choose another {where}.judge"
        )
    request = urllib.request.Request(
        f"{OPENAI}/models/{model}", headers={"Authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10):
            pass
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UserError(
                "OpenAI refuses the key in OPENAI_API_KEY; export a valid one"
            ) from None
        if error.code == 404:
            raise UserError(
                f"{where}.judge is {judge}, but OpenAI has no {model} for this key, or no longer; name another as "
                f"{where}.judge_model, with judge: openai and judge_base_url: {OPENAI}"
            ) from None
    except OSError:
        pass
