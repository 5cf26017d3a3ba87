"""Chats as tokens: the tokenizer, the chat template, control and stop tokens, the context."""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError, first_line
from sppo.policies.folders import no_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT, THOUGHT_END = "<think>", "</think>"
ANSWER = "PLACEHOLDER-OF-AN-ANSWER"  # the assistant's text in a rendered chat
HIGHEST_REWARD = 10  # asked of a reward-conditioned policy in sampling and evaluation


def load_tokenizer(
    folder: Path, template_kwargs: dict[str, Any] | None = None, template_date: str | None = None
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    template_kwargs and template_date are keys of the section `policy` of the configuration, for
    programs that render chats: variables of the chat template, and the date (YYYY-MM-DD) that it
    takes as today. They are written into the chat template of the returned tokenizer, so that every
    rendering uses them. A tokenizer that will be saved with weights is loaded without them.
    UserError if the tokenizer cannot be read, or if its chat template is missing or broken: without
    a chat template, the policy cannot be prompted.
    """
    import jinja2

    try:
        tokenizer = tokenizer_class(folder).from_pretrained(
            folder, padding_side="left", trust_remote_code=False
        )
    except Exception as error:  # the package tokenizers raises the class Exception itself
        raise UserError(
            f"cannot load the tokenizer of {folder} ({first_line(error)}); copy its "
            "files, tokenizer.json and tokenizer_config.json, again from its base model"
        ) from error
    template = tokenizer.chat_template
    if not template:
        raise no_chat_template(folder)
    if template_kwargs or template_date:
        variables = template_kwargs or {}
        if isinstance(template, str):
            tokenizer.chat_template = _with_variables(template, variables, template_date)
        else:  # several templates by name
            tokenizer.chat_template = {
                name: _with_variables(each, variables, template_date)
                for name, each in template.items()
            }
    try:
        render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    except UserError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise UserError(
                f"the chat template of {folder} is broken (line {error.__cause__.lineno}: "
                f"{error.__cause__}); correct it, or copy the template of its base model"
            ) from error
        # Any other refusal may concern this test chat only.
    return tokenizer


def tokenizer_class(folder: Path) -> Any:
    """The class that loads the folder's tokenizer.

    AutoTokenizer reads the model's configuration too, for which it imports PyTorch. That takes two
    seconds in programs that need no model. It is not needed if the folder names the class that
    serves every tokenizer.json.
    """
    import transformers

    settings = Path(folder) / "tokenizer_config.json"
    written = read_json(settings) if settings.is_file() else {}
    name = "TokenizersBackend"  # transformers 4 does not have it
    is_named = written.get("tokenizer_class") == name and "auto_map" not in written
    if not is_named or not hasattr(transformers, name):
        name = "AutoTokenizer"
    return getattr(transformers, name)


def _with_variables(template: str, variables: dict[str, Any], date: str | None) -> str:
    """The chat template with these variables set, and with this date (YYYY-MM-DD) as today."""
    if date:
        today = datetime.date.fromisoformat(date)
        template = re.sub(
            r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)",
            lambda call: repr(today.strftime(call[2])),
            template,
        )
        if re.search(r"strftime_now\s*\(", template):
            raise UserError(
                "the policy's chat template computes the format of today's date, so that "
                "policy.template_date cannot replace the date; write the format as a string into "
                "strftime_now(...)"
            )
    assignments = (f"{{% set {name} = {value!r} %}}\n" for name, value in variables.items())
    return "".join(assignments) + template


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    name: str = "this chat",
    answer_next: bool = True,
) -> str:
    """The text of a chat in the policy's chat template.

    With `answer_next` it ends where the assistant's answer begins. `name` identifies the chat in an
    error. UserError with the template's message if the template refuses the chat.
    """
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=answer_next, tokenize=False
        )
    except Exception as error:  # an expression in a template may raise any type
        raise UserError(
            f"the policy's chat template refuses {name} ({type(error).__name__}: "
            f"{error}); change it to a form that the template accepts, such as a chat without a "
            "system message"
        ) from error
    return cast(str, rendered)  # a string, because it is one chat and tokenize is False


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], name: str = "this chat"
) -> list[int]:
    """Token ids of the chat up to the beginning of the assistant's answer; see `render_chat`.

    The template writes all special tokens; the tokenizer adds none.
    """
    return tokenizer(render_chat(tokenizer, messages, name), add_special_tokens=False).input_ids


def with_target_reward(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], reward: float
) -> list[dict[str, str]]:
    """The chat with a system message that asks for an answer with this reward, from 1 to 10.

    A chat that begins with a system message gets the request before that message's text. If the
    chat template refuses system messages or leaves them out, the request is written before the
    first message's text.
    Source: RA-DPO (2410.08067). Wording and both forms are those of its authors' code.
    """
    request = (
        "You are an assistant that generates responses for the instruction while implicitly"
        " achieving the following target scores (on a scale of 1-10, where 1 is lowest and 10 is"
        f" highest):\nOverall score: {reward:g}."
    )
    first, *rest = messages
    before_first = [first | {"content": f"{request}\n\n{first['content']}"}, *rest]
    if first["role"] == "system":
        return before_first
    as_system = [{"role": "system", "content": request}, *messages]
    try:
        takes_it = request in render_chat(tokenizer, as_system)
    except UserError:
        takes_it = False
    return as_system if takes_it else before_first


def context_length(folder: Path) -> int | None:
    """The most tokens of prompt and response together; None if the model's config does not say."""
    config = read_json(Path(folder) / "config.json")
    return config.get("max_position_embeddings") or config.get("n_positions")


def check_fits(name: str, tokens: int, max_new_tokens: int, context: int | None) -> None:
    """Raise a UserError if a prompt and its answer do not fit the policy's context.

    Args:
        name: the prompt, for the error line.
        tokens: the number of the prompt's tokens.
        max_new_tokens: the longest answer of the evaluation that asks.
        context: from `context_length`.
    """
    if context is None or tokens + max_new_tokens <= context:
        return
    remedy = f"set this evaluation's max_new_tokens to at most {context - tokens}"
    if tokens >= context:
        remedy = "take a policy with a longer context, or other instructions"
    raise UserError(
        f"{name} has {tokens} tokens, and the answer may have {max_new_tokens}, but the policy's"
        f" context has {context}; {remedy}"
    )


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Strings that the tokenizer would read as control tokens in a text, the longest first.

    They are the special tokens, and the added tokens that the chat template uses. White space and
    words are left out; some tokenizers have them as added tokens.
    """
    added = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content in str(tokenizer.chat_template) and not token.content.isalnum())
    }
    controls = (token for token in added | set(tokenizer.all_special_tokens) if token.strip())
    return sorted(controls, key=lambda token: (-len(token), token))


def check_no_control_tokens(controls: list[str], text: str, name: str) -> None:
    """UserError if a text of an evaluation, called `name`, contains one of the control tokens."""
    if contained := next((token for token in controls if token in text), None):
        raise UserError(
            f"{name} contains {contained}, which the policy would read as a control token "
            "and not as text; remove it there"
        )


def without_control_tokens(controls: list[str], text: str) -> str:
    """A policy's answer for use in a later turn, with a space inserted into each control token.

    <think> and </think> are not changed, because templates use them to remove thoughts.
    """
    for token in controls:
        if token not in (THOUGHT, THOUGHT_END):
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, for records."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first control token that the chat template writes after an assistant's answer, if any."""
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, answer, after = render_chat(tokenizer, chat, answer_next=False).rpartition(ANSWER)
    except UserError:
        return None
    if not answer:
        return None
    # For a list of tokens, the method returns a list of ids.
    controls = set(cast(list[int], tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))))
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return next((token_id for token_id in ids if token_id in controls), None)


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end a response, without repetition.

    They are, in this order, the token that the chat template writes after an assistant's answer,
    the EOS tokens of the generation config, and the tokenizer's EOS token. A policy may have
    learned to end its answer with any of them, and would invent the user's next turn after it.
    UserError if there is none.
    """
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        configured = None
    if not isinstance(configured, list):
        configured = [configured]
    candidates = (end_of_turn_id(tokenizer), *configured, tokenizer.eos_token_id)
    stop_ids = [token_id for token_id in candidates if token_id is not None]
    if not stop_ids:
        raise UserError(
            f"the model in {folder} has no EOS token; add eos_token_id to its "
            "generation_config.json"
        )
    return list(dict.fromkeys(stop_ids))
