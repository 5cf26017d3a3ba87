"""A client for models behind an OpenAI-compatible server, which keeps every finished answer.

It imports nothing heavy until a model is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo.core.artifacts import parse_json
from sppo.core.errors import UserError
from sppo.core.openai_api import NO_COMPLETION, judge_failure, quoted, request_forms

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

CONCURRENT = 4  # requests to a server at once
TIMEOUT = 120  # seconds for one judgment
RETRIES = 6  # of the openai package, with exponential backoff
# Largest share of answers without a grade: with more, the mean of the others says too little.
UNREADABLE = 0.2


def concurrently(
    ask: Callable[[Any], Any], items: list[Any], what: str, at_once: int = CONCURRENT
) -> list[Any]:
    """`ask` of every item, some at once. The first error stops those that have not begun."""
    from sppo.core.progress import progress

    with ThreadPoolExecutor(at_once) as executor:
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

    Args:
        model: the name that the server knows.
        base_url: the server's address; None for OpenAI.
        cache: the file of finished judgments.
        readable: whether an answer has a verdict.
        read: what is kept of a choice of the server's answer; its text if None.
        timeout: seconds to wait for an answer; None for `TIMEOUT`.
    """

    unreadable_answers = "they are left out and counted"  # what happens to them, for the warning

    def __init__(
        self,
        model: str,
        base_url: str | None,
        cache: Path,
        readable: Callable[[str], bool],
        read: Callable[[Any], str] | None = None,
        timeout: float | None = None,
    ) -> None:
        import openai

        # A local server needs no key, but the package insists on one.
        key = os.environ.get("OPENAI_API_KEY") or ("EMPTY" if base_url else None)
        self.api = openai.OpenAI(
            base_url=base_url, api_key=key, timeout=timeout or TIMEOUT, max_retries=RETRIES
        )
        self.model = model
        self.base_url = base_url
        self.cache = cache
        self.lock = threading.Lock()
        self.form = 0  # the first of `request_forms` that the server accepts
        self.readable = readable
        self.read = read or (lambda choice: choice.message.content or "")
        self.unreadable: list[str] = []
        # Older versions kept unreadable answers too.
        self.kept = {key: answer for key, answer in _kept(cache) if readable(answer)}

    def __call__(self, model: str, conversation: Any, temperature: float, max_tokens: int) -> str:
        answer = self.ask(conversation.to_openai_api_messages(), temperature, max_tokens)
        # FastChat must find no rating where we find none.
        return answer if self.readable(answer) else answer.replace("[", "(")

    def ask(
        self,
        messages: list[dict[str, str]],
        temperature: float,
        max_tokens: int,
        forms: list[dict[str, Any]] | None = None,
    ) -> str:
        """The judge's answer to the messages, kept or new.

        forms: of the request, in the order in which to try them; if None, those with this
        temperature and number of tokens.
        """
        import openai

        forms = forms or request_forms(max_tokens, temperature=temperature)
        question = json.dumps([self.model, self.base_url, temperature, max_tokens, messages])
        key = hashlib.sha256(question.encode()).hexdigest()
        if key not in self.kept:
            try:
                text = self._answer(messages, forms)
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
        print(f"warning: {said}; {self.unreadable_answers}", file=sys.stderr, flush=True)

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
                return self.read(answer.choices[0])
            except openai.BadRequestError as error:
                if form + 1 == len(forms) or not self._may_be_the_form(error):
                    raise
                form += 1

    def _may_be_the_form(self, error: Any) -> bool:
        """Whether another form of the request may be accepted."""
        return error.code in ("unsupported_parameter", "unsupported_value")


def _kept(cache: Path) -> Iterator[tuple[str, str]]:
    for line in cache.read_bytes().split(b"\n") if cache.is_file() else []:
        with contextlib.suppress(ValueError, TypeError):  # a kill may tear the last line
            key, answer = parse_json(line)
            yield key, answer
