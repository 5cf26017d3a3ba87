"""Judges and graders: which ones a configuration can name, and the client for those behind an API.

A local judge is a preference model (`sppo.preferences`). Others answer through OpenAI's interface.
This module imports nothing heavy until a judge is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo.core.artifacts import parse_json
from sppo.core.errors import UserError
from sppo.core.openai_api import (
    NO_COMPLETION,
    OPENAI_MODELS,
    check_address,
    judge_failure,
    quoted,
    request_forms,
)
from sppo.preferences.base import local_kind, settings_for
from sppo.preferences.embedded import EMBEDDED

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

CONCURRENT = 4  # requests to a server at once
TIMEOUT = 120  # seconds for one judgment
RETRIES = 6  # of the openai package, with exponential backoff
# Largest share of answers without a grade: with more, the mean of the others says too little.
UNREADABLE = 0.2


def is_openai_model(judge: str) -> bool:
    """Whether the name is one of OpenAI's models."""
    return judge.startswith(OPENAI_MODELS)


def is_annotators_config(judge: str) -> bool:
    """Whether alpaca-eval has an annotators_config of this name; True where the package is absent.

    The package is looked up, not imported: it takes seconds, and the Snakefile's environment may
    lack it.
    """
    package = importlib.util.find_spec("alpaca_eval")
    if package is None or package.origin is None:
        return True
    configs = Path(package.origin).parent / "evaluators_configs"
    return (configs / judge / "configs.yaml").exists()


@dataclass(frozen=True)
class Judging:
    """What the keys judge, judge_model and judge_base_url of a configuration section can name.

    local: whether a preference model can judge. words: names with a meaning of their own.
    is_known: whether a name is one of the judges behind an API. known: what these are, for the
    user.
    """

    section: str
    is_known: Callable[[str], bool]
    known: str
    local: bool = True
    words: tuple[str, ...] = ()

    def check(self, settings: Mapping[str, Any], key: bool = True) -> None:
        """Raise UserError if the judge cannot work. No server is asked; be quick.

        settings: the section, or a program's arguments. key: whether a missing key of the API is an
        error; before the jobs are known it is not.
        """
        judge, address = settings["judge"], settings["judge_base_url"]
        if address is not None:  # also where no server is asked, because records keep it
            check_address(address, f"{self.section}.judge_base_url")
        if judge in self.words:
            return
        kind = local_kind(judge) if self.local else None
        if kind is not None:
            kind.check(settings_for(judge), f"{self.section}.judge")
            for file in kind.files(judge):
                if not file.exists():
                    remedy = "give a folder with its files as" if kind.is_prepared else "correct"
                    raise UserError(
                        f"judge {judge}: {file} is missing; {remedy} {self.section}.judge"
                    )
            return
        if self.local and "/" in judge:
            raise UserError(
                f"judge {judge} is missing, or no preference model; correct {self.section}.judge"
            )
        if judge == "openai":
            for name in ("judge_model", "judge_base_url"):
                if not settings[name]:
                    raise UserError(f"judge openai needs {self.section}.{name}; set it")
            return
        if not self.is_known(judge):
            ours = list(self.words)
            if self.local:
                ours += [*EMBEDDED, "a folder of such an adapter", "a function as file.py:name"]
            raise UserError(
                f"unknown judge {judge}; give {', '.join([*ours, 'openai'])}, or {self.known} as"
                f" {self.section}.judge"
            )
        if key and not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                f"judge {judge} needs a key; export OPENAI_API_KEY, or choose another"
                f" {self.section}.judge"
            )


ALPACA_EVAL = Judging(
    "alpaca_eval",
    is_annotators_config,
    "an annotators_config of alpaca-eval such as weighted_alpaca_eval_gpt4_turbo",
)
MT_BENCH = Judging("mt_bench", is_openai_model, "a model of OpenAI's such as gpt-6-luna")
GRADES = Judging(
    "grades",
    is_openai_model,
    "a model of OpenAI's such as gpt-6-luna",
    local=False,
    words=("preference",),  # the run's preference model
)


def concurrently(ask: Callable[[Any], Any], items: list[Any], what: str) -> list[Any]:
    """`ask` of every item, some at once. The first error stops those that have not begun."""
    from sppo.core.progress import progress

    with ThreadPoolExecutor(CONCURRENT) as executor:
        futures = [executor.submit(ask, item) for item in items]
        try:
            return [future.result() for future in progress(futures, what)]
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


class Client:
    """A judge behind an OpenAI-compatible server.

    Called, it has the signature of FastChat's chat_completion_openai. Finished judgments are kept
    in `cache` by model, server and the whole prompt, so that a run resumes where it stopped and an
    old judgment is never used for another judge, prompt or answer. The openai package repeats
    requests after 429, time-outs and server failures, with backoff; what still fails is a
    UserError.

    An answer that is not `readable` is not kept, so that a repaired judge is asked again.
    `unreadable` holds those of this run.
    """

    def __init__(
        self, model: str, base_url: str | None, cache: Path, readable: Callable[[str], bool]
    ) -> None:
        import openai

        # A local server needs no key, but the package insists on one.
        key = os.environ.get("OPENAI_API_KEY") or ("EMPTY" if base_url else None)
        self.api = openai.OpenAI(
            base_url=base_url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES
        )
        self.model = model
        self.base_url = base_url
        self.cache = cache
        self.lock = threading.Lock()
        self.form = 0  # the first of `request_forms` that the server accepts
        self.readable = readable
        self.unreadable: list[str] = []
        # Older versions kept unreadable answers too.
        self.kept = {key: answer for key, answer in _kept(cache) if readable(answer)}

    def __call__(self, model: str, conversation: Any, temperature: float, max_tokens: int) -> str:
        answer = self.ask(conversation.to_openai_api_messages(), temperature, max_tokens)
        # FastChat must find no rating where we find none.
        return answer if self.readable(answer) else answer.replace("[", "(")

    def ask(self, messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        """The judge's answer to the messages, kept or new."""
        import openai

        question = json.dumps([self.model, self.base_url, temperature, max_tokens, messages])
        key = hashlib.sha256(question.encode()).hexdigest()
        if key not in self.kept:
            try:
                text = self._answer(messages, request_forms(max_tokens, temperature=temperature))
            except (openai.OpenAIError, *NO_COMPLETION) as error:
                raise judge_failure(
                    self.base_url or self.model, error, self.api.api_key, self.cache
                ) from None
            if not self.readable(text):
                self.unreadable.append(text)
                return text
            with self.lock:
                self.kept[key] = text
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([key, self.kept[key]]) + "\n")
        return self.kept[key]

    def check_unreadable(self, asked: int) -> None:
        """Say how many of the `asked` answers have no grade, quoting one.

        UserError if they are a larger share than `UNREADABLE`.
        """
        failed = len(self.unreadable)
        if not failed:
            return
        said = (
            f"{failed} of {asked} answers of the judge {self.model} have no grade, such as "
            f"{quoted(self.unreadable[0])}"
        )
        if failed > UNREADABLE * asked:
            raise UserError(
                f"{said}; at most {UNREADABLE:.0%} may have none; fix the judge or "
                "name another and run again, the other judgments are kept in "
                f"{self.cache}"
            )
        print(f"warning: {said}; they are left out and counted", file=sys.stderr, flush=True)

    def _answer(self, messages: list[dict[str, str]], forms: list[dict[str, Any]]) -> str:
        """The server's answer. The first form of the request that it accepts is kept."""
        import openai

        form = self.form
        while True:
            try:
                answer = self.api.chat.completions.create(
                    model=self.model,
                    messages=cast("list[ChatCompletionMessageParam]", messages),
                    **forms[form],
                )
                self.form = form
                return answer.choices[0].message.content or ""
            except openai.BadRequestError as error:
                if form + 1 == len(forms) or error.code not in (
                    "unsupported_parameter",
                    "unsupported_value",
                ):
                    raise
                form += 1


def _kept(cache: Path) -> Iterator[tuple[str, str]]:
    for line in cache.read_bytes().split(b"\n") if cache.is_file() else []:
        with contextlib.suppress(ValueError, TypeError):  # a kill may tear the last line
            key, answer = parse_json(line)
            yield key, answer
