"""Block diffusion, token-level KD, APD, --init-from.   python -m pytest tests/test_blocks.py"""

import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
import sample
from conftest import CPU, LETTERS, sharpened, tiny_config

V, T = LETTERS.vocab_size, 6
NAMES = ["bd3lm", "gumbel", "gumbel-draft"]


def block_student(name="gumbel-draft", **more):
    torch.manual_seed(0)
    return sharpened(gd.Student(tiny_config(**{"block_size": 2, **more}), name, V).double())


def noisy_logits(student, xt, xi, x0):
    """The training pass, with noise xi (B, T, V): (B, T, V), 0 where nothing is masked."""
    is_masked = xt == V
    logits = torch.zeros(*xt.shape, V, dtype=torch.float64)
    logits[is_masked] = student(xt, None if xi is None else xi[is_masked], x0)
    return logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("xt", [[V, V, V, V, V, V], [V, V, 3, V, V, V]])
def test_a_noisy_block_sees_the_clean_blocks_before_it_and_nothing_else(name, xt):
    student, xt = block_student(name), torch.tensor([xt])
    x0 = torch.randint(V, (1, T), generator=gd.rng(1))
    xi = gd.sample_gumbel((1, T, V), gd.rng(2), torch.float64)
    before = noisy_logits(student, xt, xi, x0)
    is_masked = (xt == V)[0].tolist()
    for i in range(T):
        changed = x0.clone()
        changed[0, i] = (changed[0, i] + 1) % V
        moved = (noisy_logits(student, xt, xi, changed) != before).any(-1)[0]
        assert moved.tolist() == [is_masked[j] and j // 2 > i // 2 for j in range(T)]   # clean i
        other = xi.clone()
        other[0, i] += torch.randn(V, generator=gd.rng(3), dtype=torch.float64)
        moved = (noisy_logits(student, xt, other, x0) != before).any(-1)[0]
        is_read = name != "bd3lm" and is_masked[i]
        assert moved.tolist() == [is_read and is_masked[j] and j // 2 == i // 2
                                  for j in range(T)]                                    # noise i
    if not is_masked[2]:
        changed = xt.clone()
        changed[0, 2] = 4                                       # a known token of xt
        moved = (noisy_logits(student, changed, xi, x0) != before).any(-1)[0]
        assert moved.tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_one_block_of_the_whole_length_is_mdlm_in_loss_and_gradient(name, tiny):
    """The pass over one copy, and the pass over two, which a larger seq_len forces."""
    _, teacher, _ = tiny
    student = block_student(name, block_size=T)
    lengths = []
    student.net.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    t = gd.stratified_times(torch.full((8, 1), 0.5)).double()
    both = []
    for student.seq_len in (T, 2 * T):
        student.zero_grad()
        loss = gd.student_loss(student, teacher, x0, t, gd.rng(5))
        loss.backward()
        both.append([loss] + [p.grad.clone() for p in student.parameters()])
    assert lengths == [T, 2 * T] and len(both[0]) > 10
    for one, two in zip(*both):
        assert torch.allclose(one, two, atol=1e-12)


def test_blocks_of_one_token_at_time_one_are_an_ar_model():
    """The NELBO is then the likelihood, here computed token by token in passes over one copy."""
    student = block_student("bd3lm", block_size=1)
    for x0 in torch.randint(V, (5, 1, T), generator=gd.rng(3)):
        loss = gd.student_loss(student, None, x0, torch.ones(1, T).double(), gd.rng(1))
        nll = 0.0
        for i in range(T):
            xt = x0[:, :i + 1].clone()
            xt[:, i] = V
            causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()
            x = student.net.embed(xt) + student.embed_pos.weight[:i + 1]
            nll += F.cross_entropy(student.net.logits(student.net(x, causal)[:, i]), x0[:, i])
        assert torch.allclose(loss, nll / T)


@pytest.mark.parametrize("name", NAMES)
def test_each_block_is_masked_and_weighted_by_its_own_time(name, tiny):
    _, teacher, _ = tiny
    student = block_student(name)
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    t = torch.tensor([[0.2, 0.6, 1.0]] * 8, dtype=torch.float64)
    g = gd.rng(1)
    is_masked = torch.rand(8, T, generator=g) < torch.tensor([0.2, 0.2, 0.6, 0.6, 1.0, 1.0])
    logp = noisy_logits(student, torch.where(is_masked, V, x0), xi, x0).log_softmax(-1)
    nll = -logp.gather(-1, x0[..., None])[..., 0] * is_masked
    bound = sum(nll[:, 2 * b:2 * b + 2].sum() / t[0, b] for b in range(3)) / x0.numel()
    assert torch.allclose(gd.student_loss(student, teacher, x0, t, gd.rng(1), xi), bound)


def sampled(student, length, nfe, xt=None, **settings):
    """30 texts, and for each block and step: start, xt, noise, tokens in the cache, logits."""
    xi, u = gd.sequence_noise(1, torch.arange(30), length, student)
    calls, forward = [], student.forward

    def spy(xt, xi=None, cache=None):
        n_cached, xt_before = cache.start, xt.clone()
        logits = forward(xt, xi, cache=cache)
        if xi is not None:
            start = len(calls) // nfe * student.block_size
            calls.append((start, xt_before, xi, n_cached, logits))
        return logits
    student.forward = spy
    text = gd.sample(student, xi, u, nfe, xt=xt, temperature=1.0, **settings)
    student.forward = forward
    assert len(calls) == nfe * length // student.block_size     # with 30 texts no step is empty
    return text, calls


def training_pass(student, window, i, xt_block, xi):
    """Logits of a block, from position i of `window` on, beside the clean text of the window."""
    xt = window.clone()
    xt[:, i:i + student.block_size] = xt_block
    return student(xt, xi, x0=window)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size, nfe", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_each_step_of_the_cached_sampler_equals_the_training_pass(name, block_size, nfe, order):
    """Also with known tokens."""
    student = block_student(name, block_size=block_size)
    xt = torch.full((30, T), V)
    xt[:10, 1], xt[5:20, 4] = 3, 5
    text, calls = sampled(student, T, nfe, xt, order=order)
    assert (text < V).all() and (text[:10, 1] == 3).all() and (text[5:20, 4] == 5).all()
    for start, xt_block, xi, n_cached, logits in calls:
        assert n_cached == start
        assert torch.allclose(training_pass(student, text, start, xt_block, xi), logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_long_text_is_written_in_a_window_that_moves_by_half_of_seq_len(name, block_size):
    """When it moves, its cache is a fresh one that has read the last seq_len / 2 tokens."""
    student = block_student(name, block_size=block_size, seq_len=8)
    text, calls = sampled(student, 20, 1, order="left")
    for start, xt_block, xi, n_cached, logits in calls:
        begin = 0 if start < 8 else start // 4 * 4 - 4
        assert n_cached == start - begin
        window = text[:, begin:begin + 8]
        assert torch.allclose(training_pass(student, window, start - begin, xt_block, xi), logits)
        if start in (8, 12, 16):
            cache = gd.KVCache()
            for block in text[:, start - 4:start].split(block_size, dim=1):
                student(block, cache=cache)
                cache.start += block_size
            assert torch.allclose(student(xt_block, xi, cache=cache), logits)


def test_a_cache_holds_the_tokens_that_are_counted_as_final_and_no_others():
    student, cache = block_student("bd3lm"), gd.KVCache()
    block, final, other = torch.tensor([[[1, V]], [[1, 2]], [[3, 4]]])
    first = student(block, cache=cache)
    student(other, cache=cache)
    assert student(block, cache=cache).equal(first)             # nothing is counted so far
    student(final, cache=cache)
    cache.start = 2
    second = student(block, cache=cache)
    student(other, cache=cache)
    assert not second.equal(first) and student(block, cache=cache).equal(second)


def test_the_first_block_of_a_text_does_not_depend_on_the_noise_of_later_ones():
    student = block_student()
    xi, u = gd.sequence_noise(1, torch.arange(40), T, student)
    other = xi.clone()
    other[:, 4:] = xi[:, 4:].flip(0)
    a, b = (gd.sample(student, noise, u, 2) for noise in (xi, other))
    assert a[:, :4].equal(b[:, :4]) and not a[:, 4:].equal(b[:, 4:])


@pytest.mark.parametrize("name", ["mdlm", "gumbel-draft"])
def test_kd_is_the_cross_entropy_with_the_teachers_distribution(name, tiny):
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(), name, V).double()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.6).double()
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    loss = gd.student_loss(student, teacher, x0, t, gd.rng(9), xi, loss="kd")
    is_masked = gd.q_sample(x0, t, V, gd.rng(9)) == V
    xt = torch.where(is_masked, V, x0)
    p, logq = teacher(x0).exp()[is_masked], student(xt, xi[is_masked]).log_softmax(-1)
    assert torch.allclose(loss, -(p * logq).sum() / 0.6 / x0.numel())
    loss.backward()
    assert student.net.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def reference_apd(student, teacher, xi, ratio):
    """One text at a time, one position at a time, in probabilities."""
    text, rounds = [], 0
    while len(text) < T:
        rounds += 1
        n = T - len(text)
        noise = xi[len(text):]
        logq = student(torch.tensor([text + [V] * n]), noise).log_softmax(-1)
        draft = (logq if student.noise else logq + noise).argmax(-1).tolist()
        for k in range(n):
            logp = teacher(torch.tensor([text + draft[:k] + [0] * (n - k)]))[0, len(text) + k]
            q = logq[k] - noise[k] if student.noise else logq[k]
            mixture = (ratio * q + (1 - ratio) * logp).log_softmax(-1)
            target = (mixture + noise[k]).argmax().item()
            if target != draft[k] or k == n - 1:
                text = text + draft[:k] + [target]
                break
    return text, rounds


@pytest.mark.parametrize("name", ["mdlm", "gumbel", "gumbel-draft"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
def test_apd_keeps_the_prefix_where_draft_and_target_agree(name, ratio, tiny):
    _, teacher, _ = tiny
    torch.manual_seed(1)
    student = sharpened(gd.Student(tiny_config(), name, V).double(), 5.0)
    xi = gd.sample_gumbel((40, T, V), gd.rng(2), torch.float64)
    x, rounds = sample.draft_and_verify(student, teacher, xi, None, ratio)
    for i in range(40):
        text, n = reference_apd(student, teacher, xi[i], ratio)
        assert (x[i].tolist(), rounds[i].item()) == (text, n)
    if ratio == 1:
        assert (rounds == 1).all()
    if ratio == 0:
        assert x.equal(gd.serial_extraction(teacher, xi))


def test_init_from_starts_from_the_mdlm_and_refuses_what_does_not_fit(tmp_path):
    """With no learning rate a student ends as it began."""
    small = dict(CPU, n_layer=1, n_head=2, n_embd=8, batch_size=16, max_steps=2, eval_every=2,
                 lr=0.0, labels="data")
    cfg, data = gd.prepare(gd.Config(**small, out_dir=str(tmp_path)))
    teacher = gd.get_teacher(cfg, data)
    mdlm = gd.get_student("mdlm", cfg, teacher, data)

    def started(name, data=data, **changed):
        path = str(tmp_path / "mdlm.pt")
        given = {**small, "init_from": path, "out_dir": str(tmp_path / "b"), **changed}
        cfg, _ = gd.prepare(gd.Config(**given))
        return gd.get_student(name, cfg, teacher, data)
    for name in ("bd3lm", "gumbel", "gumbel-draft"):
        student = started(name, block_size=5, seed=1)
        assert all(p.equal(student.state_dict()[k]) for k, p in mdlm.state_dict().items())
    for changed in (dict(n_embd=12), dict(n_layer=2), dict(n_head=1)):
        with pytest.raises(gd.UserError, match=f"mdlm.pt .*{list(changed)[0]}"):
            started("bd3lm", **changed)
    other = gd.Data(data.train % 3, data.val % 3, 10, gd.Tokenizer(list("abc")), stride=10)
    with pytest.raises(gd.UserError, match="mdlm.pt .*tokens"):
        started("bd3lm", other, out_dir=str(tmp_path / "c"))


def test_a_block_size_that_does_not_divide_the_length_is_refused():
    with pytest.raises(gd.UserError, match="--block-size 3"):
        gd.resolve(gd.Config(**CPU, block_size=3))


def test_a_text_is_written_in_nfe_steps_a_block_but_at_most_one_a_token():
    for block_size, nfe, calls in ((6, 4, 4), (3, 2, 4), (2, 5, 6), (1, 1, 6)):
        assert block_student("bd3lm", block_size=block_size).nfe_of_text(nfe) == calls
