"""The only changes of other packages at run time, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sppo.evaluation.judges import Client


def fastchat_asks(client: Client) -> None:
    """FastChat 0.2.36 asks judges through `client`.

    Its own function calls an interface of the openai package that no longer exists. It also looks
    up a conversation template, and whether a model is OpenAI's, by a list of model names that is
    older than today's judges.
    """
    from fastchat.conversation import get_conv_template
    from fastchat.llm_judge import common

    common.chat_completion_openai = client
    common.get_conversation_template = lambda _: get_conv_template("chatgpt")
    common.OPENAI_MODEL_LIST = (client.model,)


def alpaca_eval_reads_difficulties(file: Path) -> None:
    """alpaca-eval 0.6.6 reads instruction difficulties from `file`.

    Its length-controlled metric downloads them from the hub, and has no option for another source.
    This is the module's only download.
    """
    from alpaca_eval.metrics import glm_winrate

    glm_winrate.hf_hub_download = lambda **_: str(file)
