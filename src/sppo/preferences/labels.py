"""Controls of an experiment with preferences: labels that say less, or the opposite.

A label is what the preference model says of two responses. The texts of the responses stay as they
are, and so do K, the prompts and the logits themselves; only which response a logit is about
changes. A method that gains as much with permuted labels as with the annotated ones has not gained
it from the preferences.
"""

from __future__ import annotations

import random

import numpy as np

from sppo.preferences.estimates import Array

ANNOTATED = "annotated"


def relabelled(logits: Array, labels: str, prompt_id: str, seed: int) -> Array:
    """The logits of one prompt under other labels, shape (K, K), C order.

    logits: (K, K), L[i, j] is the logit that response i beats response j in the order (i, j).
    labels: a value of the configuration key `pairs.labels`.

    `annotated`: L. `permuted`: L[r, r], rows and columns in the same random order r, so that P-hat
    has the same values within the prompt. r depends on the seed and the prompt's id only, not on
    other prompts or shards. All K! orders are equally probable, and r can be the identity: if it
    were excluded, a response would get its own label less often than another's, and the label
    would still depend on the text. `flipped`: L^T, so that P becomes P^T exactly, because P is
    computed from L - L^T. -L would give the same P. L^T keeps each logit, and with it how much the
    model prefers the response that it reads first.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if labels == ANNOTATED:
        return logits
    if labels == "permuted":
        order = list(range(len(logits)))
        random.Random(f"labels/{seed}/{prompt_id}").shuffle(order)
        return logits[np.ix_(order, order)]
    if labels == "flipped":
        # In C order, as a table's logits are: sums in another order would round differently.
        return logits.T.copy()
    raise ValueError(f"labels are {labels!r}, not annotated, permuted or flipped")
