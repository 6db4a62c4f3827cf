"""A position's own noise buys no better text.   python -m pytest tests/test_noise_law.py"""

import itertools

import pytest
import torch

import gumbel_distill as gd

pytestmark = pytest.mark.quick
N_TEXTS = 40_000


class TwoTokens(gd.Student):
    """Texts of two tokens, V = 3. Token i is argmax(table[i, other token] + xi_i): it depends on
    its own noise alone. With `listens` the second token also knows what the first noise says."""
    reads_noise = True
    draw = gd.GumbelStudent.draw

    def __init__(self, listens=False):
        torch.nn.Module.__init__(self)
        self.vocab_size = self.mask_id = 3
        self.listens = listens
        table = torch.randn(2, 4, 3, generator=gd.rng("two tokens"), dtype=torch.float64)
        self.table = torch.nn.Parameter(2 * table)              # (i, other token or 3, V)

    def forward(self, xt, xi):
        is_masked, other = xt == 3, xt.flip(1)
        noise = torch.zeros(*xt.shape, 3, dtype=xi.dtype)
        noise[is_masked] = xi
        if self.listens:
            first = (self.table[0, 3] + noise[:, 0]).argmax(dim=-1)
            other[:, 1] = torch.where(is_masked[:, 0], first, xt[:, 0])
        return (self.table[torch.arange(2), other] + noise)[is_masked]


def law_without_noise(table, steps):
    """P (3, 3) of texts of an MDLM whose conditionals are the student's, averaged over the noise:
    softmax(table). Each order in which two tokens can fill is weighed."""
    p = table.softmax(dim=-1)                                   # (i, other, V)
    together = p[0, 3][:, None] * p[1, 3]
    first_then_second = p[0, 3][:, None] * p[1, :3]
    second_then_first = (p[1, 3][:, None] * p[0, :3]).T
    law = torch.zeros(3, 3, dtype=p.dtype)
    for a, b in itertools.product(range(steps), repeat=2):      # the steps that fill the tokens
        law += [together, first_then_second, second_then_first][(a < b) + 2 * (a > b)] / steps**2
    return law


def frequencies(student, steps):
    g = gd.rng("texts", steps)
    xi = gd.sample_gumbel((N_TEXTS, 2, 3), g, torch.float64)
    u = torch.rand(N_TEXTS, 2, 2, generator=g, dtype=torch.float64)
    x = student.write(torch.full((N_TEXTS, 2), 3), xi, u, steps)
    return (3 * x[:, 0] + x[:, 1]).bincount(minlength=9).view(3, 3) / N_TEXTS


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_own_noise_gives_the_texts_of_an_mdlm_with_the_averaged_conditionals(steps):
    student = TwoTokens()
    law = law_without_noise(student.table.detach(), steps)
    assert law.sum().item() == pytest.approx(1)
    assert (frequencies(student, steps) - law).abs().max() < 4.5 * (0.25 / N_TEXTS)**0.5


def test_a_neighbours_noise_gives_what_no_such_mdlm_can():
    """In one step the student that listens writes the serial law."""
    student = TwoTokens(listens=True)
    p = student.table.detach().softmax(dim=-1)
    serial = p[0, 3][:, None] * p[1, :3]
    error = 4.5 * (0.25 / N_TEXTS)**0.5
    found = frequencies(student, 1)
    assert (found - serial).abs().max() < error
    assert (found - law_without_noise(student.table.detach(), 1)).abs().max() > 5 * error
