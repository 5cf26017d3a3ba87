"""Attention without gathering computes what the class of transformers computes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from sppo.preferences.deberta_attention import AttentionByDistance, attend_by_distance
from sppo.preferences.pairrm_network import DEBERTA_V3_LARGE

SHAPE = DEBERTA_V3_LARGE | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "position_buckets": 16,
    "vocab_size": 100,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_model(**changes) -> DebertaV2Model:
    torch.manual_seed(0)
    model = DebertaV2Model(DebertaV2Config(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large weights, so that attention is not uniform
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def states(model: DebertaV2Model, lengths: list[int]) -> list[torch.Tensor]:
    """The last states of texts of these lengths, without those of padding."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(1, 100, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        found = model(input_ids=ids * mask, attention_mask=mask.long()).last_hidden_state
    return [rows[:length].float() for rows, length in zip(found, lengths, strict=True)]


@pytest.mark.parametrize("lengths", [[1], [2, 2], [9, 5, 1], [70, 64], [150, 33, 149]])
def test_states_equal_those_of_transformers(lengths):
    """Lengths within the exact buckets (8), beyond the logarithmic ones (64), and padded."""
    model = make_model()
    expected = states(model, lengths)
    attend_by_distance(model)
    assert {type(layer.attention.self) for layer in model.encoder.layer} == {AttentionByDistance}
    for ours, theirs in zip(states(model, lengths), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_no_more_than_transformers():
    model, lengths = make_model(), [120, 90]
    exact = torch.cat(states(model, lengths))
    theirs = copy.deepcopy(model).bfloat16()
    ours = copy.deepcopy(theirs)
    attend_by_distance(ours)
    errors = [
        (torch.cat(states(rounded, lengths)) - exact).square().mean().sqrt()
        for rounded in (ours, theirs)
    ]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(
    "changes", [{"share_att_key": False}, {"pos_att_type": ["c2p"]}, {"position_buckets": -1}]
)
def test_other_positions_keep_the_class_of_transformers(changes):
    model = make_model(**changes)
    attend_by_distance(model)
    assert not any(
        isinstance(layer.attention.self, AttentionByDistance) for layer in model.encoder.layer
    )
