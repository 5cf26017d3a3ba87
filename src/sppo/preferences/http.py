"""A preference model behind an HTTP address of the user's own.

`preference: {model: "http://host:port/path"}`. For each prompt it receives a POST request of JSON

    {"prompt": text, "messages": [{"role": ..., "content": ...}], "responses": [K texts]}

and answers with one of

    {"probabilities": K x K}    P[i, j]: the probability that response i is preferred to response j
    {"scores": K}               P[i, j] = sigma(s_i - s_j)

A request is repeated up to three times if the server cannot be reached, does not answer in time, or
returns status 429 or 5xx. The workflow cannot detect a change of the server.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.errors import UserError
from sppo.core.openai_api import check_address
from sppo.core.progress import progress
from sppo.preferences.base import (
    ComparisonCost,
    ComparisonError,
    Group,
    PreferenceModel,
    Settings,
    register,
)
from sppo.preferences.function import SymmetryWarning, probabilities_of

if TYPE_CHECKING:
    import numpy as np

WAITS = (1.0, 4.0, 16.0)  # seconds before each repetition


@register
class HttpModel(PreferenceModel):
    """A server that compares the responses to one prompt in a request."""

    kind = "http"
    form = "http://host:port/path of a server"
    options = ("timeout", "concurrency")
    uses_torch = False

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        return settings["model"].startswith(("http://", "https://"))

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        check_address(settings["model"], key)

    @classmethod
    def cost(
        cls, settings: Settings, prompts: float, prompt: float, samples: int, response: float
    ) -> ComparisonCost:
        """A request for each prompt, with all of its responses."""
        tokens = prompts * (prompt + samples * response)
        return ComparisonCost(flops=0, tokens=tokens, weights=0, requests=prompts)

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        check_address(settings["model"], "preference.model")
        self.name = settings["model"]
        self.timeout = settings["timeout"]
        self.concurrency = settings["concurrency"]
        self.warning = SymmetryWarning(self.name)

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        from sppo.preferences.estimates import logits_of

        found: list[np.ndarray] = []
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = [pool.submit(self._ask, *item) for item in enumerate(groups)]
            shown = progress(asked, "compare") if len(groups) > 1 else asked
            found = [request.result() for request in shown]
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, nothing more is asked
        self.warning.check(found)
        return [logits_of((P + 1.0 - P.T) / 2) for P in found]

    def _ask(self, index: int, group: Group) -> np.ndarray:
        """P of one prompt's responses, (K, K)."""
        question = {"prompt": group.prompt, "messages": group.chat, "responses": group.responses}
        answer = self._post(index, json.dumps(question).encode())
        keys = [key for key in ("probabilities", "scores") if key in answer]
        if len(keys) != 1:
            raise ComparisonError(
                index,
                f"the server's answer has the keys {sorted(answer)}; it must have either"
                " probabilities or scores",
            )
        k = len(group.responses)
        shape = (k, k) if keys[0] == "probabilities" else (k,)
        try:
            return probabilities_of(answer[keys[0]], shape)
        except ValueError as error:
            raise ComparisonError(index, f"the server returned {error}") from None

    def _post(self, index: int, body: bytes) -> dict[str, Any]:
        """The JSON object that the server answers with."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.name, data=body, headers=headers)
        for wait in (*WAITS, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    answer = json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace")
                reason = f"status {error.code} ({' '.join(said.split()) or error.reason})"
                if error.code != 429 and error.code < 500:
                    wait = None  # the same request would be refused again
            except ValueError:  # of json
                raise ComparisonError(
                    index, "the server's answer is not JSON; is the address right?"
                ) from None
            # Of connecting, of a timeout, or of an answer that breaks off.
            except (OSError, HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = str(cause) or type(cause).__name__
            else:
                if not isinstance(answer, dict):
                    raise ComparisonError(index, "the server's answer is not a JSON object")
                return answer
            if wait is None:
                raise UserError(
                    f"preference model {self.name} failed: {reason}; start or correct the server"
                    " and run again"
                )
            time.sleep(wait)
        raise AssertionError("the last wait is None")
