"""Shapes of models, and the FLOPs of a forward pass.

Norms and biases are left out, because they are less than 0.1%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A transformer as its config.json describes it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    mlp_matrices: int = 3  # gate, up, down
    softcap: bool = False  # whether logits are bounded by a tanh, as in Gemma-2

    @property
    def body(self) -> int:
        """Number of weights in the layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + self.mlp_matrices * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Number of weights that map a state to logits."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Number of weights: layers, embeddings and output layer, which can be tied."""
        return self.body + self.head * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that a config.json of the Llama, Mistral or Gemma family describes."""
    heads = config["num_attention_heads"]
    gemma = config.get("model_type", "").startswith("gemma")
    return Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or config["hidden_size"] // heads,
        config["vocab_size"],
        config.get("tie_word_embeddings", gemma),
        softcap=config.get("final_logit_softcapping") is not None,
    )


# Shapes from the published config.json of each model.
SHAPES = {
    "embedded": Shape(30, 576, 1536, 9, 3, 64, 49152, True),
    "mistralai/Mistral-7B-Instruct-v0.2": Shape(32, 4096, 14336, 32, 8, 128, 32000, False),
    "meta-llama/Meta-Llama-3-8B-Instruct": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),
    "google/gemma-2-9b-it": Shape(42, 3584, 14336, 16, 8, 256, 256000, True, softcap=True),
    "google/gemma-2-27b-it": Shape(46, 4608, 36864, 32, 16, 128, 256000, True, softcap=True),
}
PAIRRM = Shape(24, 1024, 4096, 16, 16, 64, 128100, True, mlp_matrices=2)  # DeBERTa-v3-large


def forward_flops(shape: Shape, tokens: float, context: float, logits: float) -> float:
    """FLOPs of a forward pass over `tokens` tokens that each attend to `context` other tokens.

    logits: the number of tokens whose logits are computed.
    """
    in_weights = 2 * shape.body * tokens
    in_attention = 4 * shape.layers * shape.heads * shape.head_dim * context * tokens
    in_head = 2 * shape.head * logits
    return in_weights + in_attention + in_head
