"""Laws of other couplings.   python -m pytest tests/test_couplings.py"""

import functools

import numpy as np
import pytest
import torch

import couplings
import gumbel_distill as gd
from conftest import TINY, T, V, tiny_config
from test_gumbel import GUMBEL, KS_LIMIT, LOGP, ks

pytestmark = pytest.mark.quick
N = 20_000


@pytest.mark.parametrize("change, quantiles", [
    (couplings.to_uniform, lambda u: u),
    (couplings.to_gaussian, lambda u: torch.special.ndtri(torch.from_numpy(u)).numpy())])
def test_changed_noise_has_its_law(change, quantiles):
    xi = gd.sample_gumbel((200_000,), gd.rng("change"))
    law = quantiles((np.arange(400_000) + 0.5) / 400_000)
    assert ks(change(xi), law) < KS_LIMIT < ks(xi, law)


def test_gaussian_noise_tells_apart_the_large_noise_of_rare_tokens():
    xi = torch.linspace(-3, 300, 5000)      # a token of probability 1e-100 has noise of about 230
    assert couplings.to_gaussian(xi).diff().min() > 0


@pytest.mark.parametrize("name, weights", [
    ("gaussian", lambda xi: couplings.to_gaussian(xi).softmax(-1)),
    ("uniform", lambda xi: couplings.to_uniform(xi).softmax(-1)),
    ("independent", lambda xi: xi.softmax(-1)), ("linear", couplings.to_gaussian)])
def test_each_student_reads_its_noise_and_linear_reads_the_embedding_of_mask_too(name, weights):
    model = couplings.COUPLINGS[name](tiny_config(), V).double()
    xi = gd.sample_gumbel((9, V), gd.rng(1), torch.float64)
    mask = model.net.embed.weight[V] if name == "linear" else 0.0
    assert torch.allclose(model.read(xi), weights(xi) @ model.embed_noise.weight.T + mask)


def test_independent_noise_knows_neither_text_nor_teacher():
    x0 = LOGP.exp().multinomial(N, replacement=True, generator=gd.rng("text"))
    logp = LOGP.expand(N, 5)
    xi = couplings.IndependentStudent.label(logp, x0, gd.rng("noise"))
    assert ks(xi.flatten(), GUMBEL) < KS_LIMIT
    equal = ((logp + xi).argmax(-1) == x0).double().mean()
    assert equal.item() == pytest.approx(LOGP.exp().square().sum().item(), abs=4 * N**-0.5)


@pytest.mark.parametrize("token", [0, 2, 4])
def test_posterior_uniform_is_what_rejection_keeps(token):
    """Squeezed into the middle of the interval it still gives the token, and has another law."""
    fresh = torch.rand(400_000, generator=gd.rng("u", token), dtype=torch.float64)
    kept = fresh[gd.Student.draw(None, LOGP.expand(len(fresh), 5), fresh) == token]
    logp, x0 = LOGP.expand(N, 5), torch.full((N,), token)
    u = couplings.posterior_uniform(logp, x0, gd.rng("posterior", token))
    middle = u.mean() + 0.5 * (u - u.mean())
    assert all(gd.Student.draw(None, logp, point).equal(x0) for point in (u, middle))
    assert ks(u, kept) < KS_LIMIT < ks(middle, kept)


@pytest.mark.parametrize("name", ["one-uniform", "one-sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_label_gives_the_token_back_and_is_gumbel_noise(name, dtype):
    logp = (4 * torch.randn(N, 50, generator=gd.rng("logits"))).to(dtype).log_softmax(-1)
    x0 = logp.exp().multinomial(1, generator=gd.rng("tokens"))[:, 0]
    xi = couplings.COUPLINGS[name].label(logp, x0, gd.rng("label"))
    assert xi.shape == (N, 1) and ks(xi[:, 0], GUMBEL) < KS_LIMIT
    order = torch.arange(50).expand(N, 50)
    if name == "one-sorted":
        logp, order = logp.sort(descending=True)
    place = gd.Student.draw(None, logp, couplings.to_uniform(xi[:, 0]))
    assert order.gather(1, place[:, None])[:, 0].equal(x0)


def test_one_uniform_reads_the_first_number_alone():
    model = couplings.OneUniformStudent(tiny_config(), V)
    xi = gd.sample_gumbel((9, V), gd.rng(1))
    assert model.read(xi).equal(model.read(xi[:, :1])) and model.read(xi).std(dim=0).min() > 0


def test_the_teacher_writes_from_the_u_of_its_own_text(teacher):
    """Label a text, hand the labels to serial_by_cdf: it writes the text. A known token stays."""
    x0 = gd.generate(teacher, 50, T)
    logp = teacher.logp(teacher.hidden(x0)).flatten(0, 1)
    xi = couplings.OneUniformStudent.label(logp, x0.flatten(), gd.rng("label")).view(50, T, 1)
    xt = torch.full_like(x0, V)
    assert couplings.serial_by_cdf(teacher, xt, xi).equal(x0)
    xt[:, 2] = (x0[:, 2] + 1) % V
    x = couplings.serial_by_cdf(teacher, xt, xi)
    assert x[:, 2].equal(xt[:, 2]) and x[:, :2].equal(x0[:, :2])


def test_the_program_trains_them_and_refuses_a_name_it_does_not_know(cli, tmp_path):
    main = functools.partial(gd.main, couplings.COUPLINGS)
    status, said, err = cli(main, *TINY, "--out-dir", tmp_path)
    assert status == 0, err
    assert all(f"{name}, 3 steps, by argmax" in said for name in couplings.COUPLINGS)
    status, _, err = cli(main, *TINY, "--students", "laplace", "--out-dir", tmp_path / "a")
    assert status and not (tmp_path / "a").exists()
