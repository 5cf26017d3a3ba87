"""Preference models, estimates of P and P-hat, and the pairs that are made of them.

Each import below registers one kind of preference model. For a new kind, add its module's name to
the import and to `__all__`.
"""

from sppo.preferences.base import PreferenceModel, register  # isort: skip

from sppo.preferences import (
    embedded,
    function,
    gpm,
    http,
    llm_blender,
    llm_judge,
    pairrm,
    pairwise_lm,
    population,
    reward_model,
    verifiable,
)

__all__ = [
    "PreferenceModel",
    "embedded",
    "function",
    "gpm",
    "http",
    "llm_blender",
    "llm_judge",
    "pairrm",
    "pairwise_lm",
    "population",
    "register",
    "reward_model",
    "verifiable",
]
