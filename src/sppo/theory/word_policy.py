"""A language model as the policy of a word game, trained by the real trainer."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.policies.chats import end_of_turn_id, load_tokenizer, prompt_token_ids
from sppo.policies.models import load_policy
from sppo.theory.games import Array
from sppo.theory.small_policies import score, train
from sppo.theory.word_game import BASE, DOUBLE, MEAN, Step, estimates, pairs_table
from sppo.training.batches import collate
from sppo.training.logps import response_logps
from sppo.training.losses import LOSSES, Loss, sppo

Weights = dict[str, Tensor]


class WordPolicy:
    """A model in float32 on the CPU that answers one few-shot prompt with one of n words.

    Each word is a response of the chat template: its tokens, then the token that ends a turn.
    """

    def __init__(self, folder: Path, words: tuple[str, ...], examples: tuple[str, ...]) -> None:
        """Load the policy; `examples` are the answers of the prompt's earlier turns."""
        self.tokenizer = load_tokenizer(folder)
        end = end_of_turn_id(self.tokenizer)
        if end is None:
            raise UserError(
                f"the chat template of {folder} writes no token after an answer; choose a model "
                "whose template does"
            )
        self.words = words
        self.prompt = prompt_token_ids(self.tokenizer, chat(words, examples))
        self.responses = [
            [*self.tokenizer(word, add_special_tokens=False).input_ids, end] for word in words
        ]
        self.model = load_policy(folder, torch.float32, "cpu")
        self.model.config.use_cache = False

    def log_probabilities(self, examples: tuple[str, ...] | None = None) -> Array:
        """log pi of every word, (n,), nats: the sum over its tokens and the end token.

        With `examples`, after the prompt that has these examples.
        """
        prompt = self.prompt
        if examples is not None:
            prompt = prompt_token_ids(self.tokenizer, chat(self.words, examples))
        batch = collate([prompt] * len(self.words), self.responses)
        with torch.inference_mode():
            return response_logps(self.model, batch).double().numpy()

    def weights(self) -> Weights:
        """A copy of the weights."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def restore(self, weights: Weights) -> None:
        """Set the weights to a copy that `weights` returned."""
        self.model.load_state_dict(weights)


def chat(words: tuple[str, ...], examples: tuple[str, ...]) -> list[dict[str, str]]:
    """The prompt: a system message that names the words, and earlier turns as examples."""
    question = {"role": "user", "content": "Play."}
    listed = f"{', '.join(words[:-1])} or {words[-1]}"
    messages = [{"role": "system", "content": f"Answer with one word: {listed}."}]
    for example in examples:
        messages += [question, {"role": "assistant", "content": example}]
    return [*messages, question]


def play_iteration(
    policy: WordPolicy,
    P: Array,
    eta: float,
    variant: str,
    iteration: int,
    base: Weights,
    learning_rate: float,
    steps: int,
) -> Step:
    """Train the policy in place for one iteration, and return its log-probabilities.

    The pairs are written and read as the workflow's table `pairs`. Then references and training
    are computed by the code of src/score_reference.py and src/train_policy.py. base: the weights
    of the first policy, the reference of the mutant `BASE`.
    """
    before = policy.log_probabilities()
    rows = pairs_table(
        P, estimates(P, before, variant), policy.words, policy.prompt, policy.responses, variant
    )
    with (
        tempfile.TemporaryDirectory() as work,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mean_loss() as loss,
    ):
        write_table(Path(work) / "pairs.parquet", rows, "pairs")
        pairs = read_table(Path(work) / "pairs.parquet", "pairs")
        train(
            policy.model,
            pairs,
            2 * eta if variant == DOUBLE else eta,
            learning_rate,
            steps,
            Path(work),
            optimizer="rmsprop",  # the paper's
            loss=loss if variant == MEAN else "sppo",
            reference=base_scores(policy, pairs, base) if variant == BASE else None,
        )
    policy.model.eval()
    return Step(eta, variant, iteration, P, before, policy.log_probabilities())


def base_scores(
    policy: WordPolicy, pairs: list[dict[str, Any]], base: Weights
) -> list[dict[str, Any]]:
    """Rows of the table `logps` for the pairs under the base."""
    current = policy.weights()
    policy.restore(base)
    rows = score(policy.model, pairs)
    policy.restore(current)
    return rows


@contextlib.contextmanager
def mean_loss() -> Iterator[str]:
    """Within this block, LOSSES has SPPO's loss with log-ratios divided by their tokens.

    It is wrong on purpose; yields its name.
    """

    def mean_of_tokens(
        delta_w: Tensor,
        delta_l: Tensor,
        tokens_w: Tensor,
        tokens_l: Tensor,
        p_hat_w: Tensor,
        p_hat_l: Tensor,
        beta: float,
    ) -> Tensor:
        return sppo(delta_w / tokens_w, delta_l / tokens_l, p_hat_w, p_hat_l, beta)

    name = "sppo, mean of log-probabilities"
    LOSSES[name] = Loss(mean_of_tokens)
    try:
        yield name
    finally:
        del LOSSES[name]
