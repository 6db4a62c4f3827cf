"""Transformer, teacher, student, loss.   python -m pytest tests/test_models.py"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
from conftest import STUDENTS, T, V, sharpened, tiny_config, tiny_student

pytestmark = pytest.mark.quick

OPEN = torch.full((50, T), V)           # nothing but [MASK]


def logp_of(teacher, x0):
    return teacher.logp(teacher.hidden(x0))


def noise(n, key=0):
    return gd.sample_gumbel((n, T, V), gd.rng("noise", key), torch.float64)


def test_rotary_attention_sees_distances_but_no_absolute_position():
    net = tiny_student("mdlm").net
    x, pos = torch.randn(2, 4, 16, dtype=torch.float64, generator=gd.rng("x")), torch.arange(4)
    assert torch.allclose(net(x, pos), net(x, pos + 7), atol=1e-4)         # angles are in float32
    assert not torch.allclose(net(x, pos), net(x, 2 * pos), atol=1e-2)


def test_dropout_acts_on_what_attention_and_mlp_add():
    layer = tiny_student("mdlm", dropout=1.0).net.layers[0]
    x, pos = torch.randn(2, 4, 16, generator=gd.rng("x"), dtype=torch.float64), torch.arange(4)
    assert layer.train()(x, pos, None).equal(x)
    assert not layer.eval()(x, pos, None).equal(x)


def test_teacher_sees_nothing_of_the_token_it_predicts_or_later(teacher):
    x0 = torch.randint(V, (1, T), generator=gd.rng(1))
    before = logp_of(teacher, x0)
    for i in range(T):
        changed = x0.clone()
        changed[0, i] = (changed[0, i] + 1) % V
        after = logp_of(teacher, changed)
        assert after[:, :i + 1].equal(before[:, :i + 1])
        assert i == T - 1 or not torch.allclose(after[:, i + 1:], before[:, i + 1:])


def test_teacher_loss_is_the_cross_entropy_of_tokens_after_bos_and_those_before_them(teacher):
    x0 = torch.randint(V, (20, T), generator=gd.rng(1))
    before = F.pad(x0[:, :-1], (1, 0), value=teacher.bos_id)
    logits = teacher.net.head(teacher.net(teacher.net.embed(before)))
    expected = F.cross_entropy(logits.flatten(0, 1), x0.flatten())
    assert torch.allclose(teacher.loss(x0), expected)


def test_teacher_labels_in_its_own_precision_under_autocast(teacher):
    h = teacher.float().hidden(torch.randint(V, (20, T), generator=gd.rng(1)))
    exact = teacher.net.head(h).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher.net.head(h).dtype == torch.bfloat16
        assert torch.allclose(teacher.logp(h), exact, atol=1e-5)


def test_serial_extraction_samples_the_teacher(teacher):
    """Frequencies of the first three tokens against their exact probabilities."""
    n = 20_000
    x = gd.serial_extraction(teacher, torch.full((n, 3), V), noise(n)[:, :3])
    prefixes = torch.tensor(list(itertools.product(range(V), repeat=3)))
    p = logp_of(teacher, prefixes).gather(-1, prefixes[..., None]).sum((1, 2)).exp().detach()
    number = (x * torch.tensor([V * V, V, 1])).sum(1)
    share = number.bincount(minlength=V**3) / n
    assert (share - p).abs().max() < 4.5 * math.sqrt(p.max() * (1 - p.max()) / n)


def test_cached_serial_extraction_is_the_argmax_of_one_parallel_pass(teacher):
    """With known tokens, which stay."""
    xi, xt = noise(50), OPEN.clone()
    xt[:, 0], xt[:25, 3] = 2, 5
    for given in (OPEN, xt):
        x, is_open = gd.serial_extraction(teacher, given, xi), given == V
        assert (logp_of(teacher, x) + xi).argmax(-1)[is_open].equal(x[is_open])
        assert x[~is_open].equal(given[~is_open])


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_reads_both_sides_its_own_noise_and_never_outputs_the_mask(name):
    student, xt = tiny_student(name), torch.tensor([[1, V, 2, V, 3, 4]])
    xi = noise(1)[xt == V]
    logits = student(xt, xi)
    assert logits.shape == (2, V) and student.mask_id == V
    for i in (0, 4):
        changed = xt.clone()
        changed[0, i] = 6
        assert not torch.allclose(student(changed, xi), logits)
    assert student(xt, 2 * xi).equal(logits) == (not student.reads_noise) == (name == "mdlm")


def test_times_are_stratified_over_the_batch_and_reach_from_t_min_to_one():
    for t_min in (1e-3, 0.3):
        t = gd.stratified_times(torch.rand(4, 1, generator=gd.rng(2)), t_min)
        part = (t - t_min) / (1 - t_min) * 4
        assert t.shape == (4, 1) and part.floor()[:, 0].tolist() == [0, 1, 2, 3]
        assert len(set(part.frac()[:, 0].tolist())) == 4        # each has its own place
        assert gd.stratified_times(torch.zeros(4, 1), t_min).min() == pytest.approx(t_min)
        assert gd.stratified_times(torch.ones(4, 1), t_min).max() == 1


def dense_logits(student, xt, xi):
    """Logits (B, T, V) as the official code computes them, with noise xi (B, T, V)."""
    x = student.net.embed(xt)                                   # (B, T, C)
    if student.reads_noise:
        x = torch.where((xt == V)[..., None], student.embed_noise(xi.softmax(-1)), x)
    return student.net.head(student.net(x + student.embed_pos.weight))


def losses_and_gradients(student, teacher, dense_logits):
    """Two lists of the student's loss and its gradients, the second by hand and at all positions:
    noise of the masked ones is drawn from the loss's own generator, that of the others is fresh."""
    x0, g = torch.randint(V, (8, T), generator=gd.rng(3)), gd.rng(5)
    t = gd.stratified_times(torch.full((8, 1), 0.5)).double()
    xt = gd.q_sample(x0, t, V, g)
    is_masked, logp, xi = xt == V, logp_of(teacher, x0).detach(), noise(8)
    xi[is_masked] = gd.posterior_gumbel(logp[is_masked], x0[is_masked], g)
    nll = -dense_logits(student, xt, xi).log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    both = []
    for loss in (student.loss(x0, t, gd.rng(5), teacher), (nll * is_masked / t).mean()):
        student.zero_grad()
        loss.backward()
        both.append([loss] + [p.grad.clone() for p in student.parameters()])
    assert all(p.grad is None for p in teacher.parameters())
    return both


@pytest.mark.parametrize("name", ["mdlm", "gumbel"])
def test_masked_only_loss_equals_the_dense_form_in_value_and_gradient(name, teacher):
    """So neither noise of unmasked positions nor that of another position is read."""
    for ours, dense in zip(*losses_and_gradients(tiny_student(name), teacher, dense_logits)):
        assert torch.allclose(ours, dense, rtol=1e-6, atol=1e-9)


def test_loss_is_the_bound_that_enumeration_gives():
    """V = 3, T = 2, all texts and masks: the NELBO, and the likelihood that it bounds, which is
    that of writing in a random order."""
    torch.manual_seed(0)
    student = sharpened(gd.Student(tiny_config(seq_len=2), 3), scale=1.0)
    texts, bounds, likelihood = list(itertools.product(range(3), repeat=2)), [], 0.0
    for a, b in texts:
        both, first, second = (student(torch.tensor([xt])).log_softmax(-1).detach()
                               for xt in ([3, 3], [3, b], [a, 3]))
        order = torch.stack([both[0, a] + second[0, b], both[1, b] + first[0, a]])
        p = order.exp().mean()
        likelihood += p.item()
        bounds.append(-order.mean())
        assert bounds[-1] > -p.log()
    assert likelihood == pytest.approx(1)
    x0 = torch.tensor(texts).repeat(3000, 1)
    t = gd.stratified_times(torch.full((27_000, 1), 0.5)).double()
    with torch.no_grad():
        loss = student.loss(x0, t, gd.rng("bound"), None).item()
    assert loss == pytest.approx(torch.stack(bounds).mean().item() / 2, rel=0.04)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_batch_in_which_no_token_is_masked_has_loss_zero_and_a_gradient(name, teacher):
    """Other processes wait for this gradient."""
    student = tiny_student(name)
    loss = student.loss(torch.zeros(1, T).long(), torch.full((1, 1), 1e-300).double(), gd.rng(0),
                        teacher)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())
