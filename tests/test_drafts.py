"""The student that drafts.   python -m pytest tests/test_drafts.py"""

import math

import pytest
import torch

import drafts
import gumbel_distill as gd
from conftest import T, V, tiny_student
from test_models import losses_and_gradients

pytestmark = pytest.mark.quick

@pytest.mark.parametrize("n_draft, scale", [(1, 1.0), (1, 0.1), (V, 1e6)])
def test_a_draft_is_the_embedding_of_what_gumbel_max_would_draw(n_draft, scale, monkeypatch):
    """With one best token, or at a large scale s."""
    monkeypatch.setattr(drafts, "DRAFT_TOKENS", n_draft)
    net = tiny_student("gumbel-draft").net
    net.scale.data.fill_(scale)
    net.xi = gd.sample_gumbel((50, V), gd.rng("noise"), torch.float64)
    h = torch.randn(50, 16, generator=gd.rng("hidden"), dtype=torch.float64)
    logits = net.head(net.norm(h))
    token = (logits + net.xi).argmax(-1)
    assert (token != net.xi.argmax(-1)).any() and (token != logits.argmax(-1)).any()
    assert torch.allclose(net.draft(h), net.embed(token))


def dense_logits(student, xt, xi):
    """Logits (B, T, V) with everything at all positions: noise xi (B, T, V)."""
    net, is_masked = student.net, (xt == V)[..., None]
    x, n = net.embed(xt) + student.embed_pos.weight, len(net.layers)
    for i, layer in enumerate(net.layers):
        if i in (n // 4, n // 2, n * 3 // 4):
            score = net.head(net.norm(x)) + xi
            least = score.topk(2).values[..., -1:]
            weight = (net.scale * score).masked_fill(score < least, -math.inf).softmax(-1)
            x = x + is_masked * (weight @ net.embed.weight[:V])
        x = layer(x, torch.arange(T), None)
    return net.head(net.norm(x))


def test_masked_only_loss_equals_the_dense_form_in_value_and_gradient(teacher, monkeypatch):
    """So noise has no other way in, and gradients reach the rows of the best tokens alone."""
    monkeypatch.setattr(drafts, "DRAFT_TOKENS", 2)
    student = tiny_student("gumbel-draft", n_layer=8)
    student.net.scale.data.fill_(0.7)
    for ours, dense in zip(*losses_and_gradients(student, teacher, dense_logits)):
        assert torch.allclose(ours, dense, rtol=1e-6, atol=1e-8)
