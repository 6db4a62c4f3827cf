"""Transformer, teacher, student, loss.   python -m pytest tests/test_models.py"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
from conftest import Letters, tiny_config

V, T = Letters.vocab_size, 6


def test_teacher_sees_nothing_of_the_token_it_predicts_or_later(tiny):
    _, teacher, _ = tiny
    x0 = torch.randint(V, (1, T))
    before = teacher(x0)
    for i in range(T):
        changed = x0.clone()
        changed[0, i] = (changed[0, i] + 1) % V
        after = teacher(changed)
        assert after[:, :i + 1].equal(before[:, :i + 1])
        assert i == T - 1 or not torch.allclose(after[:, i + 1:], before[:, i + 1:])


def test_student_sees_both_sides(tiny):
    _, _, student = tiny
    xt = torch.tensor([[1, V, 2, V, 3, 4]])
    xi = gd.sample_gumbel((2, V), gd.rng(0), torch.float64)
    for i in (0, 4):
        changed = xt.clone()
        changed[0, i] = 6
        assert not torch.allclose(student(changed, xi), student(xt, xi))


def test_student_tells_positions_apart_when_all_is_masked():
    student = gd.Student(tiny_config(noise="none"), V).eval()
    logits = student(torch.full((1, T), V))
    assert not torch.allclose(logits[0], logits[3], atol=1e-6)


def test_cached_equals_uncached(tiny):
    _, teacher, _ = tiny
    x = torch.randn(2, T, 16, dtype=torch.float64)
    whole = teacher.net(x)
    for sizes in ([1] * T, [2, 3, 1], [4, 2]):
        cache, parts = gd.KVCache(T), []
        for part in x.split(sizes, dim=1):
            parts.append(teacher.net(part, cache=cache))
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)


def test_a_given_mask_is_obeyed(tiny):
    _, teacher, student = tiny
    x = torch.randn(1, T, 16, dtype=torch.float64)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    first = student.net(x[:, :1])[:, 0]
    assert torch.allclose(student.net(x, mask=causal)[:, 0], first, atol=1e-12)
    assert torch.allclose(teacher.net(x, mask=causal), teacher.net(x), atol=1e-12)


def test_teacher_probabilities_of_all_sequences_sum_to_one():
    torch.manual_seed(0)
    teacher = gd.Teacher(tiny_config(seq_len=4), Letters).double().eval()
    x0 = torch.tensor(list(itertools.product(range(V), repeat=4)))
    logp = teacher(x0).gather(-1, x0[..., None]).sum((1, 2))
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert gd.teacher_loss(teacher, x0).item() == pytest.approx(-logp.mean().item() / 4)


def test_serial_extraction_samples_the_teacher(tiny):
    """Frequencies of the first three tokens against their exact probabilities."""
    _, teacher, _ = tiny
    n = 20_000
    x, gap = gd.serial_extraction(teacher, gd.sample_gumbel((n, T, V), gd.rng(5), torch.float64))
    assert (gap > 0).all()
    prefixes = torch.tensor(list(itertools.product(range(V), repeat=3)))
    padded = F.pad(prefixes, (0, T - 3))
    p = teacher(padded).detach()[:, :3].gather(-1, prefixes[..., None]).sum((1, 2)).exp()
    number = (x[:, :3] * torch.tensor([V * V, V, 1])).sum(1)
    share = number.bincount(minlength=V**3) / n
    assert (share - p).abs().max() < 4.5 * math.sqrt(p.max() * (1 - p.max()) / n)


def test_serial_extraction_is_argmax_of_logp_plus_noise(tiny):
    _, teacher, _ = tiny
    xi = gd.sample_gumbel((50, T, V), gd.rng(6), torch.float64)
    x, gap = gd.serial_extraction(teacher, xi)
    score = teacher(x) + xi
    assert score.argmax(-1).equal(x)
    best = score.topk(2).values
    assert torch.allclose(gap, best[..., 0] - best[..., 1])


def test_posterior_noise_of_a_text_makes_the_serial_teacher_write_that_text(tiny):
    """Parallel extraction (one pass) inverts serial extraction (T passes)."""
    _, teacher, _ = tiny
    x0 = torch.randint(V, (200, T), generator=gd.rng(7))
    xi = gd.posterior_gumbel(teacher(x0), x0, gd.rng(8))
    assert gd.serial_extraction(teacher, xi)[0].equal(x0)


def test_q_sample_masks_with_probability_t():
    x0 = torch.zeros(3, 40_000, dtype=torch.long)
    t = torch.tensor([[0.1], [0.5], [1.0]])
    xt = gd.q_sample(x0, t, V, gd.rng(1))
    share = (xt == V).double().mean(1)
    assert torch.allclose(share, t[:, 0].double(), atol=0.012) and share[2] == 1
    assert (xt[xt != V] == 0).all()


def test_times_are_stratified_over_the_batch_and_reach_from_t_min_to_one():
    t = gd.stratified_time(torch.arange(8), 8, torch.rand(8, generator=gd.rng(2)))
    assert ((t - gd.T_MIN) / (1 - gd.T_MIN) * 8).floor().tolist() == list(range(8))
    assert gd.stratified_time(0, 8, 0.0) == gd.T_MIN and gd.stratified_time(7, 8, 1.0) == 1


def dense_loss(student, x0, xt, xi, t):
    """The loss with everything at all positions, as the official code computes it."""
    is_masked = (xt == student.mask_id)[..., None]

    def add_noise(x):
        return torch.where(is_masked, x + student.embed_noise(xi, x), x)        # (B, T, C)

    x = student.net.embed(xt)
    if student.is_draft:
        h = student.net(x + student.embed_pos.weight, change=add_noise)
    else:
        if student.inject == "replace":
            x = torch.where(is_masked, 0.0, x)
        h = student.net(add_noise(x) + student.embed_pos.weight)
    logp = student.net.head(h).log_softmax(-1)                  # (B, T, V)
    nll = -logp.gather(-1, x0[..., None])[..., 0]
    return (nll * is_masked[..., 0] / t).mean()


@pytest.mark.parametrize("noise_map", ["softmax", "raw", "learned", "draft"])
@pytest.mark.parametrize("inject", ["replace", "add"])
@pytest.mark.parametrize("chunk", [1, 100, 2**23])
def test_masked_only_loss_equals_the_dense_form_in_value_and_gradient(
        noise_map, inject, chunk, tiny, monkeypatch):
    """Also in chunks of 1 and of 2 sequences, whose V-wide tensors are computed twice."""
    monkeypatch.setitem(gd.CHUNK, "cpu", chunk)
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(noise_map=noise_map, inject=inject), V).double()
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    t = gd.stratified_time(torch.arange(8)[:, None], 8, 0.5).double()
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    xt = gd.q_sample(x0, t, V, gd.rng(5, "mask"))
    gradients = []
    for loss in (gd.student_loss(student, teacher, x0, t, (5,), lambda rows: xi[rows]),
                 dense_loss(student, x0, xt, xi, t)):
        student.zero_grad()
        loss.backward()
        gradients.append([loss] + [p.grad.clone() for p in student.parameters()])
    assert len(gradients[0]) > 10
    for ours, dense in zip(*gradients):
        assert torch.allclose(ours, dense, atol=1e-12)


def test_the_dense_step_of_the_benchmark_is_the_same_loss(tiny):
    import bench
    _, teacher, _ = tiny
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.6).double()
    for noise_map in ("softmax", "draft"):
        student = gd.Student(tiny_config(noise_map=noise_map), V).double()
        given = (student, teacher, x0, t, ("bench", 0))
        same = bench.noise_of(lambda: gd.student_loss(*given))
        assert same.shape[1] == V and bench.memory("cpu") > 2**24
        assert torch.allclose(bench.dense_loss(*given, same), gd.student_loss(*given), atol=1e-10)
        assert not torch.allclose(bench.dense_loss(*given), gd.student_loss(*given), atol=1e-4)


def test_a_draft_is_what_the_student_would_draw_by_gumbel_max(tiny):
    """At a large scale s the draft is the embedding of argmax(logits + xi)."""
    student = gd.Student(tiny_config(noise_map="draft"), V).double()
    student.noise_embedding.scale.data.fill_(1e6)
    student.net.head.weight.data.mul_(50.0)
    h = torch.randn(50, 16, generator=gd.rng(1), dtype=torch.float64)
    xi = gd.sample_gumbel((50, V), gd.rng(2), torch.float64)
    token = (student.net.head(student.net.norm(h)) + xi).argmax(-1)
    assert (token != xi.argmax(-1)).any()
    assert torch.allclose(student.embed_noise(xi, h), student.net.embed(token))


def test_loss_draws_posterior_noise_of_the_masked_tokens(tiny):
    """Without recorded noise the loss is that of posterior noise drawn from the same generator."""
    _, teacher, student = tiny
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.6).double()
    drawn = gd.student_loss(student, teacher, x0, t, (9,))
    is_masked = gd.q_sample(x0, t, V, gd.rng(9, "mask")) == V
    xi = torch.zeros(8, T, V, dtype=torch.float64)
    xi[is_masked] = gd.posterior_gumbel(teacher(x0)[is_masked], x0[is_masked],
                                        gd.rng(9, "noise", 0))
    assert torch.allclose(drawn, gd.student_loss(student, teacher, x0, t, (9,), xi.__getitem__))
    assert not torch.allclose(drawn, gd.student_loss(student, teacher, x0, t, (9,),
                                                     (xi * 0).__getitem__))


@pytest.mark.parametrize("noise_map", ["raw", "draft"])
def test_noise_of_unmasked_positions_does_not_matter(noise_map, tiny):
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(noise_map=noise_map), V).double()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.5).double()
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    is_masked = gd.q_sample(x0, t, V, gd.rng(5, "mask")) == V
    other = torch.where(is_masked[..., None], xi, -xi)
    assert gd.student_loss(student, teacher, x0, t, (5,), xi.__getitem__).equal(
        gd.student_loss(student, teacher, x0, t, (5,), other.__getitem__))


def test_loss_of_a_student_that_knows_nothing_is_ln_v():
    """In expectation over t and masks: the weight 1/t times the masked share t is 1."""
    student = gd.Student(tiny_config(noise="none"), V).eval()
    torch.nn.init.zeros_(student.net.head.weight)
    x0 = torch.zeros(20_000, T, dtype=torch.long)
    t = gd.stratified_time(torch.arange(20_000)[:, None], 20_000, 0.5)
    loss = gd.student_loss(student, None, x0, t, (11,)).item()
    assert loss == pytest.approx(math.log(V), rel=0.03)


def test_independent_noise_is_drawn_without_teacher_or_text():
    student = gd.Student(tiny_config(noise="independent"), V).eval()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.5)
    loss = gd.student_loss(student, None, x0, t, (12,))
    xt = gd.q_sample(x0, t, V, gd.rng(12, "mask"))
    logits = student(xt, gd.sample_gumbel(((xt == V).sum(), V), gd.rng(12, "noise", 0)))
    nll = F.cross_entropy(logits, x0[xt == V], reduction="sum")
    assert torch.allclose(loss, nll / 0.5 / x0.numel())


def test_no_student_outputs_the_mask(tiny):
    _, _, student = tiny
    logits = student(torch.full((1, T), V), torch.zeros(T, V, dtype=torch.float64))
    assert logits.shape == (T, V) and student.mask_id == V
