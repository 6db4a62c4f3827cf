"""Other noise, other ways to read it, and one uniform number a token in place of V Gumbel numbers.

    python couplings.py                                    # the paper's student and six others
    python couplings.py --students linear one-uniform      # two of them

A student differs from the paper's in how it finds noise for a text (`label`) or reads it (`read`):

    gaussian, uniform   the noise of the text, sent through its CDF to N(0,1) or U(0,1), and
    independent         Gumbel noise that knows nothing of the text: the paper's noise ablation
    linear              the noise as N(0,1), through a linear map, beside [MASK]
    one-uniform         the token is F^-1(u), where F is the teacher's CDF in the order of ids, as
                        in Parallel Token Prediction (arXiv 2512.21323)
    one-sorted          the same, where F goes from the likely tokens to the rare ones
"""

import math

import torch
import torch.nn as nn

from gumbel_distill import GumbelStudent, Student, main, sample_gumbel

N_SINES = 16


# --- V numbers a token ----------------------------------------------------------------------------
def to_uniform(xi):
    """Gumbel noise, sent through its CDF to U(0,1), in float64."""
    return torch.exp(-torch.exp(-xi.double()))


def to_gaussian(xi):
    """Gumbel noise, sent through its CDF to N(0,1). Where the teacher did not expect a token, its
    noise is far larger than fresh noise. So this computes P(larger noise), which stays precise."""
    larger = -torch.expm1(-torch.exp(-xi.double()))
    return -torch.special.ndtri(larger.clamp(1e-300, 1 - 1e-16)).to(xi.dtype)


class GaussianStudent(GumbelStudent):
    def read(self, xi):
        return super().read(to_gaussian(xi))


class UniformStudent(GumbelStudent):
    def read(self, xi):
        return super().read(to_uniform(xi).to(xi.dtype))


class IndependentStudent(GumbelStudent):
    @staticmethod
    def label(logp, x0, generator):
        return sample_gumbel(logp.shape, generator, logp.dtype)


class LinearStudent(GumbelStudent):
    """The paper's softmax leaves little of the noise but its largest numbers. Here all V numbers
    count alike. [MASK] stays; W begins at zero, so the noise comes in only as it proves useful."""

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net)
        nn.init.zeros_(self.embed_noise.weight)

    def read(self, xi):
        return self.net.embed.weight[self.mask_id] + self.embed_noise(to_gaussian(xi))


# --- One number a token ---------------------------------------------------------------------------
def posterior_uniform(logp, x0, generator):
    """Draw u with which the teacher would have picked x0 = F^-1(u). Token x has the interval
    [F(x - 1), F(x)), as long as its probability. All its points are equally likely.
    Args:    logp (..., V) float, nats;  x0 (...) long in [0, V)
    Returns: u (...) float64; F^-1(u) == x0; u is uniform on [0, 1) when x0 ~ p"""
    at_x0 = x0[..., None]
    p = logp.double().exp()
    F = p.cumsum(dim=-1)                                        # ends at 1, but for rounding
    high, length = F.gather(-1, at_x0) / F[..., -1:], p.gather(-1, at_x0) / F[..., -1:]
    r = torch.rand(at_x0.shape, generator=generator, dtype=p.dtype, device=p.device)
    return (high - (1 - r) * length).clamp(0, 1)[..., 0]


def sines(u):
    """Sines and cosines of pi k u (M, 2 N_SINES), k = 1 to N_SINES, of u (M,)."""
    angle = math.pi * u[:, None] * torch.arange(1, N_SINES + 1, device=u.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class OneUniformStudent(GumbelStudent):
    """It reads one number of a token's noise, the first. The CDF of the noise makes it u."""

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net)
        self.embed_noise = nn.Linear(2 * N_SINES, cfg.n_embd, bias=False)

    @staticmethod
    def label(logp, x0, generator):
        u = posterior_uniform(logp, x0, generator)
        return -(-u.log()).log()[:, None]                       # (M, 1), as Gumbel noise

    def read(self, xi):
        u = to_uniform(xi[:, 0])                                # (M,)
        return self.embed_noise(sines(u).to(self.embed_noise.weight.dtype))


class OneSortedStudent(OneUniformStudent):
    @staticmethod
    def label(logp, x0, generator):
        logp, order = logp.sort(dim=-1, descending=True)
        rank = (order == x0[:, None]).long().argmax(dim=-1)     # (M,)
        return OneUniformStudent.label(logp, rank, generator)


@torch.no_grad()
def serial_by_cdf(teacher, xt, xi):
    """As serial_extraction, where token i is F^-1(u_i) for the u that OneUniformStudent reads."""
    u = to_uniform(xi[..., 0])                                  # (B, T)
    is_open = xt == teacher.vocab_size
    x0 = xt.masked_fill(is_open, 0)
    for i in range(xt.size(1)):
        logp = teacher.logp(teacher.hidden(x0)[:, i])           # (B, V), reads the tokens before i
        token = Student.draw(None, logp, u[:, i])               # the inverse CDF
        x0[:, i] = torch.where(is_open[:, i], token, x0[:, i])
    return x0


COUPLINGS = {"gaussian": GaussianStudent, "uniform": UniformStudent,
             "independent": IndependentStudent, "linear": LinearStudent,
             "one-uniform": OneUniformStudent, "one-sorted": OneSortedStudent}

if __name__ == "__main__":
    main({"gumbel": GumbelStudent, **COUPLINGS})
