"""Requests to servers with OpenAI's interface, their errors, and checks before the first job.

The module imports nothing heavy.
"""

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
OPENAI_MODELS = ("gpt-", "o1", "o3", "o4")  # prefixes of the names of OpenAI's models
# The model of each annotators_config of alpaca-eval that the documentation mentions.
ANNOTATORS = {"weighted_alpaca_eval_gpt4_turbo": "gpt-4-1106-preview"}


def request_forms(max_tokens: int, **sampling: Any) -> list[dict[str, Any]]:
    """Arguments of one chat completion, in the order in which to try them on a server.

    The first form is for most servers. The second is for OpenAI's models since GPT-5, which accept
    a temperature and return log-probabilities only without reasoning. The third is for models that
    always reason and accept no sampling arguments.
    """
    return [
        {"max_tokens": max_tokens, **sampling},
        {"max_completion_tokens": max_tokens, "reasoning_effort": "none", **sampling},
        {},
    ]


def letter_forms(top_logprobs: int, temperature: float, **sampling: Any) -> list[dict[str, Any]]:
    """`request_forms` for an answer of one letter: for its log-probabilities, then for its text.

    temperature: of the log-probabilities. The text is the most probable one. Only the text is asked
    for without any arguments, because such a request returns no log-probabilities.
    """
    with_logprobs = request_forms(
        1, temperature=temperature, **sampling, logprobs=True, top_logprobs=top_logprobs
    )
    with_text = request_forms(8, temperature=0, **sampling)
    return [form for form in with_logprobs if form] + with_text


# The errors of the openai package and its callers if a server's answer is not a chat completion,
# such as broken JSON, missing fields, or HTML.
NO_COMPLETION = (
    json.JSONDecodeError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
)


def quoted(text: str | None) -> str:
    """A judge's answer for an error message, shortened to one line."""
    short = textwrap.shorten(text or "", 200, placeholder="...")
    return repr(short) if short else "an empty answer"


def judge_failure(judge: str, error: Exception, key: str | None, cache: object) -> UserError:
    """The UserError for an error during a request to the judge. Its message does not show the key.

    error: one of `NO_COMPLETION`, or an error of the openai package. cache: the folder of finished
    judgments.
    """
    message = str(error).replace(key or "\0", "(key)")
    if isinstance(error, NO_COMPLETION):
        message = (
            f"its answer is not a chat completion ({type(error).__name__}: {message}); is the "
            "address right? It often ends in /v1"
        )
    else:
        message = f"{type(error).__name__}: {message}"
    short = textwrap.shorten(message, 500, placeholder="...")
    return UserError(
        f"judge {judge}: {short}; fix it and run again, finished judgments are kept in {cache}"
    )


def check_address(url: str, where: str) -> None:
    """Raise UserError unless `url`, of the configuration key `where`, is the address of a server.

    No request is sent. A name or password in the address is refused, because the address is written
    to results, records and logs. No message repeats it.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # an invalid port, or a bracket that is not closed
        scheme, host, port = "", None, None
    if re.search(r"(^|//)[^/?#]*@", url):
        raise UserError(
            f"{where} contains a name or password, which would be written to results, records and "
            "logs; remove what is before the @, and export the key as OPENAI_API_KEY"
        )
    has_blank = re.search(r"[\s\x00-\x1f\x7f]", url)
    if scheme not in ("http", "https") or not host or port == 0 or has_blank:
        raise UserError(
            f"{where} is {url!r}, which is not the address of a server; give one such as "
            "http://localhost:8000/v1"
        )


def check_served(
    judge: str, judge_model: str | None, judge_base_url: str | None, where: str
) -> None:
    """Raise UserError if an OpenAI judge cannot be used: no such model, no key, or a refused key.

    where: the judge's configuration section. The check is made before hours of work, because OpenAI
    shuts models down. Judges on other servers are not checked, because the server may not run yet.
    Any other answer, or no answer, is ignored, because jobs may run on a machine with a network
    even if this one has none.
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
                f"{where}.judge is {judge}, but OpenAI has no model {model} for this key, or has "
                f"shut it down; set {where}.judge_model to another, with judge: openai and "
                f"judge_base_url: {OPENAI}"
            ) from None
    except OSError:
        pass
