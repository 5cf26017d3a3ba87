"""What a preference model reads as the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.preferences.base import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptReader:
    """Turns a chat into the text that preference models read as the prompt.

    source: `instruction`, the user's last words, or `chat_template`, the whole chat as the policy's
    template renders it. policy: the folder whose template that is.
    """

    def __init__(
        self,
        source: str,
        policy: Path | None,
        chat_template_kwargs: dict[str, Any],
        template_date: str,
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if source == "chat_template":
            from sppo.policies.chats import load_tokenizer

            assert policy is not None  # the programs' --policy
            self.tokenizer = load_tokenizer(policy, chat_template_kwargs, template_date)

    def text(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a chat."""
        if self.tokenizer is None:
            return messages[-1]["content"]
        from sppo.policies.chats import render_chat

        return render_chat(self.tokenizer, messages)

    def group(self, messages: list[dict[str, str]], responses: list[str]) -> Group:
        """The responses to a chat, for a preference model."""
        return Group(self.text(messages), responses, messages)
