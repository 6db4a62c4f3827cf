"""Laws of the samplers.   python -m pytest tests/test_sampling.py"""

import math

import pytest
import torch

import gumbel_distill as gd
from conftest import STUDENTS, T, V, tiny_student

pytestmark = pytest.mark.quick


class Recorder(gd.Student):
    """A student with fixed logits (T, V), which remembers what it was shown: tokens and noise."""

    def __init__(self, logits=torch.zeros(T, V)):
        torch.nn.Module.__init__(self)
        self.vocab_size = self.mask_id = V
        self.logits, self.seen = torch.nn.Parameter(logits.double()), []

    def forward(self, xt, xi=None):
        shown = torch.zeros(*xt.shape, V, dtype=torch.float64)
        shown[xt == V] = xi
        self.seen.append((xt, shown))
        return self.logits.expand(len(xt), T, V)[xt == V]


def draws(n, seed=0):
    return gd.sequence_noise(seed, torch.arange(n), T, Recorder())


def open_texts(n):
    return torch.full((n, T), V)


@pytest.mark.parametrize("nfe", [1, 2, 5, 40])
@pytest.mark.parametrize("name", STUDENTS)
def test_nothing_stays_masked_and_known_tokens_stay(name, nfe):
    student, xt = tiny_student(name), open_texts(20)
    xt[:, 2], xt[:10, 5] = 3, 1
    x = student.write(xt, *draws(20), nfe)
    assert (x < V).all() and (x[:, 2] == 3).all() and (x[:10, 5] == 1).all()
    assert (xt == V).sum() == 20 * 5 - 10                       # what is given is not written on
    known = torch.tensor([V, V, 3, V, V, V])
    assert (gd.generate(student, 20, T, nfe=nfe, known=known)[:, 2] == 3).all()


def test_a_step_from_t_to_s_fills_a_masked_token_with_probability_t_minus_s_over_t():
    """Whatever u is, 0 too, a token has a step from 1 to `steps`."""
    u = torch.rand(4, 50_000, generator=gd.rng(2), dtype=torch.float64)
    u[:, :2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for steps in (1, 3, 8):
        step = gd.fill_steps(u, steps)
        assert step.min() == 1 and step.max() == steps and (step == step.round()).all()
        for k in range(1, steps + 1):
            t, s = 1 - (k - 1) / steps, 1 - k / steps
            open_before = step >= k
            share = (step == k).sum() / open_before.sum()
            error = math.sqrt(0.25 / open_before.sum())
            assert share.item() == pytest.approx((t - s) / t, abs=4 * error)


def test_each_step_fills_the_tokens_that_fill_steps_names_from_the_same_noise():
    """A token that is filled never changes."""
    student, (xi, u) = Recorder(), draws(200)
    x = student.write(open_texts(200), xi, u, 4)
    step = gd.fill_steps(u[:, 0], 4)
    assert len(student.seen) == 4
    for k, (xt, shown) in enumerate(student.seen, start=1):
        assert xt.equal(torch.where(step < k, x, V))
        assert shown.equal(torch.where((step < k)[..., None], 0, xi))


def test_the_student_is_called_once_a_step_but_never_for_nothing():
    for nfe, n, calls in ((1, 1, 1), (4, 1000, 4), (1000, 1, T)):
        student = Recorder()
        student.write(open_texts(n), *draws(n), nfe)
        assert len(student.seen) == calls


def test_a_student_without_noise_draws_its_probabilities_each_token_on_its_own():
    logits, n = torch.randn(T, V, generator=gd.rng(2)).mul(2), 10_000
    x = Recorder(logits).write(open_texts(n), *draws(n), 2)
    one_hot = torch.nn.functional.one_hot(x, V).double()        # (n, T, V)
    p = logits.double().softmax(-1)
    assert (one_hot.mean(0) - p).abs().max() < 4.5 * math.sqrt(0.25 / n)
    joint = torch.einsum("niv,njw->ijvw", one_hot, one_hot) / n
    expected = torch.einsum("iv,jw->ijvw", p, p)
    is_pair = ~torch.eye(T, dtype=torch.bool)
    assert (joint - expected)[is_pair].abs().max() < 5 * math.sqrt(0.25 / n)


def test_a_draw_is_the_inverse_cdf_or_for_a_reader_of_noise_the_argmax():
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.29, 0.31, 1 - 2**-53], dtype=torch.float64)
    drawn = {name: tiny_student(name).draw(p.log().expand(4, 5), u).tolist() for name in STUDENTS}
    assert drawn == {"mdlm": [1, 1, 3, 3], "gumbel": 4 * [3], "gumbel-draft": 4 * [3]}


def test_tau_scales_the_noise_once_for_all_models(teacher):
    for model in (tiny_student("gumbel"), teacher):
        xi, u = gd.sequence_noise(3, torch.arange(40), T, model)
        text = gd.generate(model, 40, T, seed=3, nfe=2, tau=0.5)
        assert text.equal(model.write(open_texts(40), 0.5 * xi, u, 2))
        assert not text.equal(gd.generate(model, 40, T, seed=3, nfe=2))


@pytest.mark.parametrize("name", ["mdlm", "gumbel", "teacher"])
def test_a_text_depends_on_seed_and_number_alone_at_any_batch_size(name, teacher):
    """1,005 texts are written in two batches."""
    model = teacher if name == "teacher" else tiny_student(name)
    whole = gd.generate(model, 1005, T, seed=5, nfe=3)
    assert gd.generate(model, 7, T, seed=5, nfe=3).equal(whole[:7])
    xi, u = gd.sequence_noise(5, torch.tensor([1003, 11]), T, model)
    assert model.write(open_texts(2), xi, u, 3).equal(whole[[1003, 11]])
    assert not gd.generate(model, 7, T, seed=6, nfe=3).equal(whole[:7])
