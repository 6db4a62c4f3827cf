"""Transformer, teacher, student, loss.   python -m pytest tests/test_models.py"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
from config import STUDENTS
from conftest import LETTERS, tiny_config

pytestmark = pytest.mark.quick

V, T = LETTERS.vocab_size, 6


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
    student = gd.Student(tiny_config(), "mdlm", V).eval()
    logits = student(torch.full((1, T), V))
    assert not torch.allclose(logits[0], logits[3], atol=1e-6)


def test_rotary_attention_sees_order_and_distances_but_no_absolute_position():
    """One causal layer sums over what it sees: only its rotary angles can tell "ab" from "ba"."""
    torch.manual_seed(0)
    teacher = gd.Teacher(tiny_config(n_layer=1), LETTERS).double().eval()
    ab, ba = teacher(torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]))[:, -1]
    assert (ab - ba).abs().max() > 1e-6
    net, x = teacher.net, torch.randn(2, 4, 16, dtype=torch.float64, generator=gd.rng("x"))
    pos = torch.arange(4)
    assert torch.allclose(net(x, pos=pos), net(x, pos=pos + 7))
    assert not torch.allclose(net(x, pos=pos), net(x, pos=2 * pos))


class OnCard(torch.Tensor):
    """A tensor of the CPU that says it lies on a card."""
    is_cuda = True


def test_on_a_card_rows_are_filled_up_with_zeros_to_64_and_on_a_cpu_they_are_not():
    x = torch.randn(70, 64, generator=gd.rng("x"))
    assert gd.aligned(x, 0).equal(x) and gd.aligned(x, 1).equal(x)
    for dim, given in ((0, x), (1, x.T)):
        filled = gd.aligned(given.as_subclass(OnCard), dim).as_subclass(torch.Tensor)
        assert filled.shape[dim] == 128 and filled.narrow(dim, 0, 70).equal(given)
        assert (filled.narrow(dim, 70, 58) == 0).all()
    assert gd.aligned(x.as_subclass(OnCard), 1).shape == (70, 64)


@pytest.mark.parametrize("name", STUDENTS)
def test_zeros_in_filled_up_rows_change_no_logits(name, monkeypatch):
    student = gd.Student(tiny_config(), name, V).double().eval()
    given = torch.full((1, T), V), gd.sample_gumbel((T, V), gd.rng(0), torch.float64)
    plain, real = student(*given), gd.aligned
    monkeypatch.setattr(gd, "aligned", lambda x, dim: real(x.as_subclass(OnCard), dim)
                        .as_subclass(torch.Tensor))
    filled = student(*given)
    assert filled.shape == (T, V) and torch.allclose(filled, plain, atol=1e-12)


def test_nll_is_the_cross_entropy_in_float32_at_least():
    net, x0 = gd.Transformer(tiny_config(), V, causal=True), torch.randint(V, (50,))
    logits = 9 * torch.randn(50, V, dtype=torch.float64, generator=gd.rng("logits"))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        given = logits.to(dtype)
        expected = -given.double().log_softmax(-1).gather(-1, x0[:, None])[:, 0]
        nll = net.nll(given, x0)
        assert nll.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.allclose(nll.double(), expected, rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_what_attention_and_mlp_add():
    layer = gd.Layer(16, 2, dropout=1.0)
    x = torch.randn(2, 4, 16, generator=gd.rng("x"))
    rope = gd.rotary(torch.arange(4), 8, x.dtype)
    assert layer.train()(x, rope, None, True, None).equal(x)
    assert not layer.eval()(x, rope, None, True, None).equal(x)


@pytest.mark.parametrize("n_layer, before", [(4, [1, 2, 3]), (8, [2, 4, 6])])
def test_drafts_are_read_at_each_quarter_of_the_layers(n_layer, before):
    student = gd.Student(tiny_config(n_layer=n_layer), "gumbel-draft", LETTERS.vocab_size)
    events, real = [], student.add_drafts

    def add_drafts(h, **given):
        events.append(h)
        return real(h, **given)
    student.add_drafts = add_drafts
    for layer in student.net.layers:
        layer.register_forward_hook(lambda *_: events.append("layer"))
    xi = gd.sample_gumbel((6, 7), gd.rng("xi"))
    student(torch.full((1, 6), 7), xi)
    drafts = [i for i, event in enumerate(events) if isinstance(event, torch.Tensor)]
    assert [i - n for n, i in enumerate(drafts)] == before      # layers that ran before each draft
    a, b, c = (events[i] for i in drafts)
    assert not a.equal(b) and not b.equal(c)


def test_cached_equals_uncached(tiny):
    _, teacher, _ = tiny
    x, cache, parts = torch.randn(2, T, 16, dtype=torch.float64), gd.KVCache(), []
    for i in range(T):
        cache.start = i
        parts.append(teacher.net(x[:, i:i + 1], cache=cache))
    assert torch.allclose(torch.cat(parts, 1), teacher.net(x), atol=1e-12)


def test_a_given_mask_is_obeyed(tiny):
    _, _, student = tiny
    x = torch.randn(1, T, 16, dtype=torch.float64)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for n in (1, 3):
        assert torch.allclose(student.net(x, mask=causal)[:, :n],
                              student.net(x[:, :n], mask=causal[:n, :n]), atol=1e-12)
    assert not torch.allclose(student.net(x, mask=causal)[:, 0], student.net(x)[:, 0])


def test_teacher_probabilities_of_all_sequences_sum_to_one():
    torch.manual_seed(0)
    teacher = gd.Teacher(tiny_config(seq_len=4), LETTERS).double().eval()
    x0 = torch.tensor(list(itertools.product(range(V), repeat=4)))
    logp = teacher(x0).gather(-1, x0[..., None]).sum((1, 2))
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_teacher_loss_is_the_cross_entropy_of_the_logits(tiny):
    _, teacher, _ = tiny
    x0 = torch.randint(V, (20, T), generator=gd.rng(1))
    before = F.pad(x0[:, :-1], (1, 0), value=LETTERS.bos_id)
    logits = teacher.net.logits(teacher.net(teacher.net.embed(before)))
    expected = F.cross_entropy(logits.flatten(0, 1), x0.flatten())
    assert torch.allclose(gd.teacher_loss(teacher, x0), expected)


def test_teacher_gives_the_same_at_the_masked_positions_alone(tiny):
    _, teacher, _ = tiny
    x0, is_masked = torch.randint(V, (20, T)), torch.rand(20, T) < 0.5
    assert torch.allclose(teacher(x0, is_masked), teacher(x0)[is_masked])


def test_serial_extraction_samples_the_teacher(tiny):
    """Frequencies of the first three tokens against their exact probabilities."""
    _, teacher, _ = tiny
    n = 20_000
    x = gd.serial_extraction(teacher, gd.sample_gumbel((n, T, V), gd.rng(5), torch.float64))
    prefixes = torch.tensor(list(itertools.product(range(V), repeat=3)))
    padded = F.pad(prefixes, (0, T - 3))
    p = teacher(padded).detach()[:, :3].gather(-1, prefixes[..., None]).sum((1, 2)).exp()
    number = (x[:, :3] * torch.tensor([V * V, V, 1])).sum(1)
    share = number.bincount(minlength=V**3) / n
    assert (share - p).abs().max() < 4.5 * math.sqrt(p.max() * (1 - p.max()) / n)


def test_serial_extraction_is_argmax_of_logp_plus_noise(tiny):
    _, teacher, _ = tiny
    xi = gd.sample_gumbel((50, T, V), gd.rng(6), torch.float64)
    x = gd.serial_extraction(teacher, xi)
    assert (teacher(x) + xi).argmax(-1).equal(x)


def test_serial_extraction_keeps_the_known_tokens_and_decides_the_others(tiny):
    _, teacher, _ = tiny
    xi = gd.sample_gumbel((50, T, V), gd.rng(6), torch.float64)
    xt = torch.full((50, T), V)
    xt[:, 0], xt[:25, 3] = 2, 5
    x = gd.serial_extraction(teacher, xi, xt)
    is_known = xt != V
    assert x[is_known].equal(xt[is_known])
    assert (teacher(x) + xi).argmax(-1)[~is_known].equal(x[~is_known])


def test_posterior_noise_of_a_text_makes_the_serial_teacher_write_that_text(tiny):
    """Parallel extraction (one pass) inverts serial extraction (T passes)."""
    _, teacher, _ = tiny
    x0 = torch.randint(V, (200, T), generator=gd.rng(7))
    xi = gd.posterior_gumbel(teacher(x0), x0, gd.rng(8))
    assert gd.serial_extraction(teacher, xi).equal(x0)


def test_q_sample_masks_with_probability_t():
    x0 = torch.zeros(3, 40_000, dtype=torch.long)
    t = torch.tensor([[0.1], [0.5], [1.0]])
    xt = gd.q_sample(x0, t, V, gd.rng(1))
    share = (xt == V).double().mean(1)
    assert torch.allclose(share, t[:, 0].double(), atol=0.012) and share[2] == 1
    assert (xt[xt != V] == 0).all()


def test_times_are_stratified_over_the_batch_and_reach_from_t_min_to_one():
    for t_min in (gd.T_MIN, 0.3):
        t = gd.stratified_times(torch.rand(4, 2, generator=gd.rng(2)), t_min)
        assert t.shape == (4, 2)
        part = ((t - t_min) / (1 - t_min) * 4).floor()
        assert part[:, 0].tolist() == [0, 1, 2, 3] and part[:, 1].tolist() == [2, 3, 0, 1]
        assert gd.stratified_times(torch.zeros(4, 1), t_min).min() == pytest.approx(t_min)
        assert gd.stratified_times(torch.ones(4, 1), t_min).max() == 1


@pytest.mark.parametrize("n_texts", [1, 2, 3, 64])
def test_each_block_sees_all_times_however_small_a_piece_is(n_texts):
    u = torch.rand(1000, n_texts, 2, generator=gd.rng(3))
    t = torch.stack([gd.stratified_times(one) for one in u])    # (1000, n_texts, 2)
    for block in t.view(-1, 2).T:
        counts = torch.histc(block, 10, gd.T_MIN, 1) / len(block)
        assert torch.allclose(counts, torch.full((10,), 0.1), atol=0.04)


def dense_loss(student, x0, xt, xi, t):
    """The loss with everything at all positions, as the official code computes it."""
    net, is_masked = student.net, (xt == student.mask_id)[..., None]

    def add_drafts(h):
        score = net.head(net.norm(h)) + xi                      # (B, T, V)
        least = score.topk(min(gd.DRAFT_TOKENS, V)).values[..., -1:]
        weight = (student.scale * score).masked_fill(score < least, -math.inf).softmax(-1)
        return h + is_masked * (weight @ net.embed.weight[:V])

    x = net.embed(xt)                                           # (B, T, C)
    if student.is_draft:
        h = net(x + student.embed_pos.weight, add_drafts=add_drafts)
    else:
        x = torch.where(is_masked, xi.softmax(-1) @ student.embed_noise, x)
        h = net(x + student.embed_pos.weight)
    logp = net.head(h).log_softmax(-1)                          # (B, T, V)
    nll = -logp.gather(-1, x0[..., None])[..., 0]
    return (nll * is_masked[..., 0] / t).mean()


def assert_equals_the_dense_form(student, change=lambda xi: xi):
    """The student's loss from recorded noise, in value and gradient, against dense_loss. The dense
    form reads the noise as `change` makes it."""
    if student.is_draft:
        student.scale.data.fill_(0.7)
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    t = gd.stratified_times(torch.full((8, 1), 0.5)).double()
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    xt = gd.q_sample(x0, t, V, gd.rng(5))
    gradients = []
    for loss in (gd.student_loss(student, None, x0, t, gd.rng(5), xi),
                 dense_loss(student, x0, xt, change(xi), t)):
        student.zero_grad()
        loss.backward()
        gradients.append([loss] + [p.grad.clone() for p in student.parameters()])
    assert len(gradients[0]) > 10
    for ours, dense in zip(*gradients):
        assert torch.allclose(ours, dense, atol=1e-12)


@pytest.mark.parametrize("n_draft", [2, V])
@pytest.mark.parametrize("name", ["gumbel", "gumbel-draft"])
def test_masked_only_loss_equals_the_dense_form_in_value_and_gradient(name, n_draft, monkeypatch):
    monkeypatch.setattr(gd, "DRAFT_TOKENS", n_draft)
    assert_equals_the_dense_form(gd.Student(tiny_config(), name, V).double())


def draft_student():
    student = gd.Student(tiny_config(), "gumbel-draft", V).double()
    student.net.head.weight.data.mul_(50.0)
    return student


def drafts(student, h, z):
    """What add_drafts adds to hidden states h (M, C), all masked: (M, C)."""
    is_masked = torch.ones(1, len(h), dtype=torch.bool)
    return student.add_drafts(h[None], is_masked, z)[0] - h


@pytest.mark.parametrize("n_draft, scale", [(1, 1.0), (1, 0.1), (V, 1e6)])
def test_a_draft_is_what_the_student_would_draw_by_gumbel_max(n_draft, scale, monkeypatch):
    """With one best token, or at a large scale s, it is the embedding of argmax(logits + z)."""
    monkeypatch.setattr(gd, "DRAFT_TOKENS", n_draft)
    student = draft_student()
    student.scale.data.fill_(scale)
    h = torch.randn(50, 16, generator=gd.rng(1), dtype=torch.float64)
    z = gd.sample_gumbel((50, V), gd.rng(2), torch.float64)
    logits = student.net.head(student.net.norm(h))
    token = (logits + z).argmax(-1)
    assert (token != z.argmax(-1)).any() and (token != logits.argmax(-1)).any()
    assert torch.allclose(drafts(student, h, z), student.net.embed(token))


def test_a_draft_of_all_tokens_is_the_dense_softmax_mixture(monkeypatch):
    """In value and in the gradient of the head, the embedding, the scale and the hidden states."""
    monkeypatch.setattr(gd, "DRAFT_TOKENS", V)
    student = draft_student()
    net = student.net
    student.scale.data.fill_(0.7)
    h = torch.randn(50, 16, generator=gd.rng(1), dtype=torch.float64, requires_grad=True)
    z = gd.sample_gumbel((50, V), gd.rng(2), torch.float64)
    weight = (student.scale * (net.head(net.norm(h)) + z)).softmax(-1)
    dense, ours = weight @ net.embed.weight[:V], drafts(student, h, z)
    assert torch.allclose(ours, dense)
    into = [h, student.scale, net.head.weight, net.embed.weight]
    direction = torch.randn(50, 16, generator=gd.rng(3), dtype=torch.float64)
    for a, b in zip(*[torch.autograd.grad((x * direction).sum(), into) for x in (ours, dense)]):
        assert b.abs().sum() > 0 and torch.allclose(a, b, atol=1e-12)


def test_a_draft_sends_its_gradient_to_the_rows_of_the_best_tokens_alone(monkeypatch):
    monkeypatch.setattr(gd, "DRAFT_TOKENS", 3)
    student = draft_student()
    h = torch.randn(1, 16, generator=gd.rng(1), dtype=torch.float64)
    z = gd.sample_gumbel((1, V), gd.rng(2), torch.float64)
    best = (student.net.head(student.net.norm(h)) + z)[0].topk(3).indices.tolist()
    drafts(student, h, z).square().sum().backward()
    for rows in (student.net.head.weight.grad, student.net.embed.weight.grad):
        assert rows.abs().sum(1).nonzero()[:, 0].tolist() == sorted(best)


def test_loss_draws_posterior_noise_of_the_masked_tokens(tiny):
    """Without recorded noise the loss is that of posterior noise drawn from the same generator."""
    _, teacher, student = tiny
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.6).double()
    drawn = gd.student_loss(student, teacher, x0, t, gd.rng(9))
    g = gd.rng(9)
    is_masked = gd.q_sample(x0, t, V, g) == V
    xi = torch.zeros(8, T, V, dtype=torch.float64)
    xi[is_masked] = gd.posterior_gumbel(teacher(x0)[is_masked], x0[is_masked], g)
    assert torch.allclose(drawn, gd.student_loss(student, None, x0, t, gd.rng(9), xi))
    assert not torch.allclose(drawn, gd.student_loss(student, None, x0, t, gd.rng(9), xi * 0))


@pytest.mark.parametrize("name", ["gumbel", "gumbel-draft"])
def test_noise_of_unmasked_positions_does_not_matter(name):
    student = gd.Student(tiny_config(), name, V).double()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.5).double()
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    is_masked = gd.q_sample(x0, t, V, gd.rng(5)) == V
    loss = gd.student_loss(student, None, x0, t, gd.rng(5), xi)
    other = torch.where(is_masked[..., None], xi, -xi)
    assert gd.student_loss(student, None, x0, t, gd.rng(5), other).equal(loss)
    other = torch.where(is_masked[..., None], -xi, xi)
    assert not gd.student_loss(student, None, x0, t, gd.rng(5), other).equal(loss)


def test_loss_of_a_student_that_knows_nothing_is_ln_v():
    """In expectation over t and masks: the weight 1/t times the masked share t is 1."""
    student = gd.Student(tiny_config(), "mdlm", V)
    student.net.head.weight.data.zero_()
    x0 = torch.randint(V, (20_000, T))
    t = gd.stratified_times(torch.full((20_000, 1), 0.5))
    loss = gd.student_loss(student, None, x0, t, gd.rng(11)).item()
    assert loss == pytest.approx(math.log(V), rel=0.03)


@pytest.mark.parametrize("name", ["mdlm", "gumbel", "gumbel-draft"])
def test_a_batch_in_which_no_token_is_masked_has_loss_zero_and_a_gradient(name, tiny):
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(), name, V).double()
    x0, t = torch.randint(V, (1, T)), torch.full((1, 1), 1e-300).double()
    loss = gd.student_loss(student, teacher if student.reads_noise else None, x0, t, gd.rng(0))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_reads_the_noise_it_is_named_after_and_never_outputs_the_mask(name):
    student = gd.Student(tiny_config(), name, V).eval()
    xt = torch.full((1, T), V)
    logits = student(xt, gd.sample_gumbel((T, V), gd.rng(0)))
    other = student(xt, gd.sample_gumbel((T, V), gd.rng(1)))
    assert logits.shape == (T, V) and student.mask_id == V
    assert logits.equal(other) == (not student.reads_noise) == (name in ("mdlm", "bd3lm"))
