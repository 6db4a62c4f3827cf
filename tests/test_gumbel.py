"""Laws of the noise.   python -m pytest tests/test_gumbel.py"""

import math

import numpy as np
import pytest
import torch

import gumbel_distill as gd

pytestmark = pytest.mark.quick

LOGP = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64).log()
GUMBEL = -np.log(-np.log((np.arange(400_000) + 0.5) / 400_000))    # quantiles of Gumbel(0,1)
KS_LIMIT = 1.95                         # a Kolmogorov-Smirnov statistic exceeds it in 1 of 1000


def ks(a, b):
    """sqrt(nm / (n + m)) sup |empirical a - empirical b|"""
    a, b = np.sort(np.asarray(a)), np.sort(np.asarray(b))
    both = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, both, "right") / len(a)
                      - np.searchsorted(b, both, "right") / len(b)).max()
    return math.sqrt(len(a) * len(b) / (len(a) + len(b))) * distance


def pinned_coupling(logp, x0, generator):
    """The biased way: free losers, then a winner pinned above them. Right token, wrong law."""
    xi = gd.sample_gumbel(logp.shape, generator, logp.dtype)
    best = (logp + xi).amax(-1)
    winner = x0[..., None]
    pinned = best[..., None] + 0.1 - logp.gather(-1, winner)
    return xi.scatter(-1, winner, torch.maximum(pinned, xi.gather(-1, winner)))


def one_clock(logp, x0, generator):
    """Theorem 4.1 with one E for all losers: right token, right law of each token, wrong joint."""
    E, E0 = gd.sample_exponential((2, *x0.shape, 1), generator, logp.dtype)
    xi = -(E + logp.exp() * E0).log()
    winner = x0[..., None]
    return xi.scatter(-1, winner, -E0.log() - logp.gather(-1, winner))


def rejection_statistics(coupling, token):
    """KS statistics of a coupling's noise against prior noise with argmax = token: one for each
    token, and the last of a difference of two losers."""
    g = gd.rng("rejection", token)
    xi = gd.sample_gumbel((400_000, 5), g, torch.float64)
    kept = xi[(LOGP + xi).argmax(-1) == token][:20_000]
    x0 = torch.full((20_000,), token)
    drawn = coupling(LOGP.expand(len(x0), 5), x0, g)
    statistics = [ks(kept[:, k], drawn[:, k]) for k in range(5)]
    a, b = [k for k in range(5) if k != token][:2]
    return statistics + [ks(kept[:, a] - kept[:, b], drawn[:, a] - drawn[:, b])]


def test_gumbel_noise_has_the_gumbel_law():
    xi = gd.sample_gumbel((200_000,), gd.rng("law"))
    assert xi.dtype == torch.float32
    assert ks(xi, GUMBEL) < KS_LIMIT


def test_float32_noise_has_its_far_tail_and_no_infinities():
    """-log(-log(U)) of a float32 uniform ends at 16.6, or jumps far beyond where U is 0."""
    g, largest, n = gd.rng("tail"), -math.inf, 0
    for _ in range(4):
        xi = gd.sample_gumbel((10_000_000,), g)
        assert xi.isfinite().all()
        largest, n = max(largest, xi.max().item()), n + (xi > 15).sum().item()
    assert 16.7 < largest < 30
    assert abs(n - 4e7 * math.exp(-15)) < 4 * math.sqrt(4e7 * math.exp(-15))


def test_posterior_noise_always_gives_the_token_and_in_float32_but_for_rounding():
    g = gd.rng("always")
    logp = torch.randn(100_000, 5, generator=g, dtype=torch.float64).mul(5).log_softmax(-1)
    x0 = torch.randint(5, (100_000,), generator=g)
    for dtype, most in ((torch.float64, 0), (torch.float32, 8)):
        wrong = (logp + gd.posterior_gumbel(logp.to(dtype), x0, g)).argmax(-1) != x0
        assert wrong.sum() <= most
    logp = torch.tensor([[0.0, -1e4]])                          # all but excluded
    xi = gd.posterior_gumbel(logp, torch.tensor([1]), g)
    assert xi.isfinite().all() and (logp + xi).argmax() == 1


@pytest.mark.parametrize("token", [0, 1, 4])
def test_posterior_is_what_rejection_keeps(token):
    assert max(rejection_statistics(gd.posterior_gumbel, token)) < KS_LIMIT


def test_rejection_catches_the_pinned_coupling_and_losers_that_move_together():
    assert max(rejection_statistics(pinned_coupling, 1)) > 5 * KS_LIMIT
    *each, together = rejection_statistics(one_clock, 1)        # a token alone does not show it
    assert max(each) < KS_LIMIT and together > 5 * KS_LIMIT


def test_posterior_noise_of_the_teachers_own_tokens_is_iid_gumbel():
    """Also between neighbouring positions."""
    g = gd.rng("marginal")
    logp = LOGP.expand(100_000, 5)
    x0 = (logp + gd.sample_gumbel(logp.shape, g, torch.float64)).argmax(-1)
    xi = gd.posterior_gumbel(logp, x0, g)
    assert max(ks(xi[:, k], GUMBEL) for k in range(5)) < KS_LIMIT
    together = torch.cat([xi[:-1], xi[1:]], dim=1)              # (n, 10)
    off_diagonal = torch.corrcoef(together.T) - torch.eye(10)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(100_000)


def test_the_key_of_a_generator_decides_its_draws_and_a_number_is_one_whatever_its_type():
    def draw(*key):
        return gd.sample_gumbel((5,), gd.rng(*key))
    assert draw(3, "x").equal(draw(3, "x")) and draw(3).equal(draw(np.int64(3)))
    assert not draw(3, "x").equal(draw(4, "x")) and not draw(3, "x").equal(draw(3, "y"))
