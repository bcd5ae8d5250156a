"""What a loss hears of the forward passes it makes."""

from __future__ import annotations

import torch
from torch import nn

from luthier.core.heard import answered, aside, heard, logits
from tests.tiny import tiny


def test_every_pass_inside_is_heard_and_none_after():
    model, tokens = tiny("bert"), torch.tensor([[3, 4, 5]])
    with heard(model) as logits:
        first = model(input_ids=tokens).logits
        second = model(input_ids=tokens + 1).logits
    model(input_ids=tokens)
    assert [torch.equal(one, other) for one, other in zip(logits, (first, second), strict=True)] == [True, True]
    assert logits[0].requires_grad


def test_plain_tensors_and_tuples_are_heard():
    for model in (nn.Linear(2, 3), nn.MultiheadAttention(2, 1)):
        given = (torch.ones(1, 2),) if isinstance(model, nn.Linear) else (torch.ones(1, 1, 2),) * 3
        with heard(model) as logits:
            out = model(*given)
        assert torch.equal(logits[0], out if isinstance(out, torch.Tensor) else out[0])


def test_the_hook_is_gone_when_the_pass_fails():
    model = nn.Linear(2, 3)
    try:
        with heard(model):
            model(torch.ones(1, 5))
    except RuntimeError:
        pass
    assert not model._forward_hooks


def test_a_pass_that_is_made_aside_is_heard_only_by_who_listens_from_inside():
    model = nn.Linear(1, 1)
    with heard(model) as outer, heard(model) as other:
        model(torch.zeros(1, 1))
        with aside(model), heard(model) as inner:
            model(torch.ones(1, 1))
            with aside(model):
                model(torch.ones(1, 1))
            model(torch.ones(1, 1))
        model(torch.zeros(1, 1))
    assert [len(outer), len(other), len(inner)] == [2, 2, 2]


def test_whole_outputs_are_answered():
    model, tokens = tiny("bert"), torch.tensor([[3, 4, 5]])
    with answered(model) as outs:
        out = model(input_ids=tokens, labels=torch.tensor([1]))
    assert outs[0].loss is out.loss
    assert logits(outs[0]) is out.logits
