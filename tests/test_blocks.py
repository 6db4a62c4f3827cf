"""Block diffusion, the clipped schedule, the baselines.   python -m pytest tests/test_blocks.py"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
from conftest import Letters, sharpened, tiny_config

V, T = Letters.vocab_size, 6
MAPS = [("none", "raw"), ("gumbel", "softmax"), ("gumbel", "draft")]


def block_student(noise="gumbel", noise_map="draft", **more):
    torch.manual_seed(0)
    cfg = tiny_config(noise=noise, noise_map=noise_map, **{"block_size": 2, **more})
    return sharpened(gd.Student(cfg, V).double())


def noisy_logits(student, xt, xi, x0):
    """The training pass over xt and x0 side by side: (B, T, V), with noise xi (B, T, V)."""
    is_masked = xt == V
    return student.net.logits(student.hidden(
        xt, lambda x: student.embed_noise(xi[is_masked], x[is_masked]), x0))


@pytest.mark.parametrize("noise, noise_map", MAPS)
def test_a_noisy_block_sees_the_clean_blocks_before_it_and_nothing_else(noise, noise_map):
    student = block_student(noise, noise_map)
    x0 = torch.randint(V, (1, T), generator=gd.rng(1))
    xt = torch.tensor([[V, V, 3, V, V, V]])
    xi = gd.sample_gumbel((1, T, V), gd.rng(2), torch.float64)
    before = noisy_logits(student, xt, xi, x0)
    for i in range(T):
        changed = x0.clone()
        changed[0, i] = (changed[0, i] + 1) % V
        moved = (noisy_logits(student, xt, xi, changed) != before).any(-1)[0]
        assert moved.tolist() == [j // 2 > i // 2 for j in range(T)]       # clean token i
        other = xi.clone()
        other[0, i] += torch.randn(V, generator=gd.rng(3), dtype=torch.float64)
        moved = (noisy_logits(student, xt, other, x0) != before).any(-1)[0]
        is_read = noise != "none" and xt[0, i] == V
        assert moved.tolist() == [is_read and j // 2 == i // 2 for j in range(T)]     # noise i
    changed = xt.clone()
    changed[0, 2] = 4                                                      # a known token of xt
    moved = (noisy_logits(student, changed, xi, x0) != before).any(-1)[0]
    assert moved.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("noise, noise_map", MAPS)
def test_one_block_of_the_whole_length_is_mdlm_in_loss_and_gradient(noise, noise_map, tiny):
    """The pass over two copies, forced at L' = T, and the pass over one."""
    _, teacher, _ = tiny
    student = block_student(noise, noise_map, block_size=T)
    assert not student.is_block
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    t = gd.stratified_time(torch.arange(8)[:, None], 8, 0.5).double()
    both = []
    for student.is_block in (False, True):
        student.zero_grad()
        loss = gd.student_loss(student, teacher, x0, t, (5,))
        loss.backward()
        both.append([loss] + [p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert len(both[0]) > 10
    for one, two in zip(*both):
        assert torch.allclose(one, two, atol=1e-12)


def test_blocks_of_one_token_at_time_one_are_an_ar_model():
    """The NELBO is then the likelihood, here computed token by token in passes over one copy."""
    student = block_student("none", block_size=1)
    x0 = torch.randint(V, (5, T), generator=gd.rng(3))
    loss = gd.block_losses(student, None, x0, torch.ones(5, T, dtype=torch.float64), (1,))
    for i in range(T):
        xt = x0[:, :i + 1].clone()
        xt[:, i] = V
        nll = F.cross_entropy(student(xt), x0[:, i], reduction="none")
        assert torch.allclose(loss[:, i], nll)


def test_a_bound_is_the_mean_over_masks_of_each_block():
    """At t = 1 a block of two tokens is fully masked: its loss is the sum over both, halved."""
    student = block_student("none")
    x0 = torch.randint(V, (5, T), generator=gd.rng(3))
    losses = gd.block_losses(student, None, x0, torch.ones(5, 3, dtype=torch.float64), (1,))
    logp = noisy_logits(student, torch.full_like(x0, V), None, x0).log_softmax(-1)
    nll = -logp.gather(-1, x0[..., None])[..., 0]
    assert torch.allclose(losses, nll.view(5, 3, 2).mean(-1))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_masks_of_flex_attention_and_of_scaled_dot_product_attention_agree():
    """The GPU's form of the mask, here on the CPU, where torch has its forward pass only."""
    block = gd.Block(32, 2, 0.0)
    x, rope = torch.randn(2, 12, 32), gd.rotary(torch.arange(6).repeat(2), 16)
    dense = gd.block_mask(6, 2, torch.device("cpu"))
    assert dense.shape == (12, 12) and dense.sum() == 3 * 4 + 3 * 4 + 2 * 3 * 4

    class Cuda:
        type = "cuda"
    real = gd.create_block_mask
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(gd, "create_block_mask", lambda *args: real(*args[:-1], "cpu"))
        sparse = gd.block_mask.__wrapped__(6, 2, Cuda())
        assert isinstance(sparse, gd.BlockMask)
        assert torch.allclose(block(x, rope, sparse, False, None),
                              block(x, rope, dense, False, None), atol=1e-6)


@pytest.mark.parametrize("noise, noise_map", MAPS)
@pytest.mark.parametrize("length, order", [(6, "random"), (6, "confidence"), (14, "left")])
def test_the_cached_sampler_equals_the_uncached_one(noise, noise_map, length, order):
    """Also beyond seq_len, where the window moves on by half, and with known tokens."""
    student = block_student(noise, noise_map)
    xi, u = gd.sequence_noise(1, torch.arange(30), length, student)
    xt = torch.full((30, length), V)
    xt[:10, 1], xt[5:, 4] = 3, 5
    both = [gd.sample(student, xi, u, 2, order=order, temperature=1.0, xt=xt, use_cache=use)
            for use in (True, False)]
    assert both[0].equal(both[1]) and (both[0] < V).all()
    assert (both[0][:10, 1] == 3).all() and (both[0][5:, 4] == 5).all()


def test_the_benchmark_of_the_cache_finds_equal_texts(capsys):
    import bench
    bench.sampler("cpu", 64, 1, 24)
    assert "cached " in capsys.readouterr().out


def test_a_long_text_reads_at_most_seq_len_tokens_and_at_least_half_of_it():
    student = block_student("none", seq_len=8)
    seen = []
    real = student.forward
    student.forward = lambda xt, *rest: seen.append(xt.size(1)) or real(xt, *rest)
    x = gd.generate(student, 3, 20, nfe=1, use_cache=False)
    assert x.shape == (3, 20)
    assert seen == [2, 4, 6, 8, 6, 8, 6, 8, 6, 8]


@pytest.mark.parametrize("length", [7, 12])
def test_lengths_that_no_window_fits_are_refused(length):
    with pytest.raises(ValueError, match=f"a text of {length} tokens"):
        gd.generate(block_student("none", block_size=2 if length == 7 else 6), 3, length, nfe=1)


def test_the_first_block_of_a_text_does_not_depend_on_the_noise_of_later_ones():
    student = block_student()
    xi, u = gd.sequence_noise(1, torch.arange(40), T, student)
    other = xi.clone()
    other[:, 4:] = xi[:, 4:].flip(0)
    a, b = (gd.sample(student, noise, u, 2) for noise in (xi, other))
    assert a[:, :4].equal(b[:, :4]) and not a[:, 4:].equal(b[:, 4:])


def test_times_are_stratified_over_blocks_and_batch():
    cfg = gd.resolve(gd.Config(dataset="maze", batch_size=8, grad_accum=2, block_size=5))
    data = gd.load_data(cfg)
    s = torch.cat([gd.batch(data, cfg, 0, piece)[1] for piece in (0, 1)])
    assert s.shape == (8, 2)
    assert (s * 16).floor().flatten().tolist() == list(range(16))


def test_clipped_schedule_finds_the_times_of_least_variance():
    """Losses that vary only outside [a, b] leave that interval, and no wider one."""
    t = torch.linspace(1e-3, 1, 8000).view(4000, 2)
    wild = torch.randn(t.shape, generator=gd.rng(1))
    for a, b in ((0.3, 0.8), (0.5, 1.0), (0.001, 0.501)):
        losses = torch.where((t > a - 0.005) & (t < b + 0.005), 1 + 0.01 * wild, 10 * wild)
        low, high, least, full = gd.clipped_schedule(t, losses)
        assert (low, high) == pytest.approx((a, b), abs=0.005) and least < 0.001 and full > 10
    few = torch.tensor([[0.05, 0.99]])                          # no interval has two of them
    assert gd.clipped_schedule(few, few)[:2] == (1e-3, 1.0)


def test_clip_trains_in_the_interval_and_validates_over_all_times(tmp_path, capsys, monkeypatch):
    times = []
    real = gd.block_losses

    def spy(student, teacher, x0, t, key, *rest):
        times.append((key[1] if len(key) > 1 else key[0], t.min().item(), t.max().item()))
        return real(student, teacher, x0, t, key, *rest)
    monkeypatch.setattr(gd, "block_losses", spy)
    given = dict(dataset="maze", noise="none", n_layer=1, n_embd=8, batch_size=16, max_steps=4,
                 eval_every=2, clip=True, block_size=5, out_dir=str(tmp_path))
    cfg, data = gd.prepare(gd.Config(**given))
    teacher = gd.train_teacher(cfg, data)
    student = gd.train_student(cfg, teacher, data)
    low, high = student.t_range.tolist()
    out = capsys.readouterr().out
    assert f"clipped schedule: t in [{low:.2f}, {high:.2f}], variance of the loss" in out
    with pytest.raises(gd.UserError, match="eval_every 2 there, 4 now"):
        gd.train_student(dataclasses.replace(cfg, eval_every=4), teacher, data)
    assert 0.5 - 1e-6 <= high - low <= 0.9 + 1e-6
    trained = [(a, b) for key, a, b in times if key == "loss"]
    validated = [(a, b) for key, a, b in times if key in (0, 1, 2, 3, 4, 5, 6, 7)]
    assert trained[0][0] < 0.1 and trained[0][1] > 0.9          # before the first validation
    assert all(b - a < 0.9 for a, b in trained[2:])
    assert all(a < 0.05 and b > 0.95 for a, b in validated)


def test_kd_is_the_cross_entropy_with_the_teachers_distribution(tiny):
    _, teacher, _ = tiny
    student = gd.Student(tiny_config(noise="none"), V).double()
    x0, t = torch.randint(V, (8, T), generator=gd.rng(3)), torch.full((8, 1), 0.6).double()
    loss = gd.student_loss(student, teacher, x0, t, (9,), loss="kd")
    is_masked = gd.q_sample(x0, t, V, gd.rng(9, "mask")) == V
    xt = torch.where(is_masked, V, x0)
    p, logq = teacher(x0).exp()[is_masked], student(xt).log_softmax(-1)
    assert torch.allclose(loss, -(p * logq).sum() / 0.6 / x0.numel())
    assert not torch.allclose(loss, gd.student_loss(student, teacher, x0, t, (9,)))
    loss.backward()
    assert student.net.head.weight.grad.abs().sum() > 0


def reference_apd(student, teacher, xi, ratio, lookahead):
    """One text at a time, one position at a time, in probabilities."""
    text, rounds = [], 0
    while len(text) < T:
        rounds += 1
        xt = torch.tensor([text + [V] * (T - len(text))])
        noise = xi[len(text):]
        logq = student(xt, noise).log_softmax(-1)
        draft = logq + (noise if student.noise == "none" else 0)
        draft = draft.argmax(-1).tolist()
        for k in range(min(lookahead, T - len(text))):
            before = text + draft[:k] if k else text
            logp = teacher(torch.tensor([before[:len(text) + k] + [0] * (T - len(text) - k)]))
            logp = logp[0, len(text) + k]
            q = logq[k] if student.noise == "none" else logq[k] - noise[k]
            mixture = (ratio * q + (1 - ratio) * logp).log_softmax(-1)
            target = (mixture + noise[k]).argmax().item()
            if target != draft[k] or k == min(lookahead, T - len(text)) - 1:
                text = text + draft[:k] + [target]
                break
    return text, rounds


@pytest.mark.parametrize("noise", ["none", "gumbel"])
@pytest.mark.parametrize("ratio, lookahead", [(0.5, 10), (0.5, 2), (0.9, 3), (0.0, 2), (1.0, 4)])
def test_apd_keeps_the_prefix_where_draft_and_target_agree(noise, ratio, lookahead, tiny):
    _, teacher, student = tiny
    if noise == "none":
        torch.manual_seed(1)
        student = sharpened(gd.Student(tiny_config(noise="none"), V).double(), 5.0)
    xi = gd.sample_gumbel((40, T, V), gd.rng(2), torch.float64)
    x, rounds = gd.draft_and_verify(student, teacher, xi, None, ratio, lookahead)
    for i in range(40):
        text, n = reference_apd(student, teacher, xi[i], ratio, lookahead)
        assert (x[i].tolist(), rounds[i].item()) == (text, n)
    if ratio == 1:
        assert (rounds == math.ceil(T / lookahead)).all()
    if ratio == 0:
        assert x.equal(gd.serial_extraction(teacher, xi)[0])


def test_init_from_starts_from_the_mdlm_and_refuses_what_does_not_fit(tmp_path):
    small = dict(dataset="maze", n_layer=1, n_embd=8, batch_size=16, max_steps=2, eval_every=2)
    cfg, data = gd.prepare(gd.Config(**small, noise="none", out_dir=str(tmp_path)))
    teacher = gd.train_teacher(cfg, data)
    mdlm = gd.train_student(cfg, teacher, data)
    path = str(tmp_path / "student-none.pt")
    model = gd.Student(gd.resolve(gd.Config(**small, noise="gumbel", block_size=5)), 36)
    gd.start_from(model, path, data.tokenizer)
    assert model.net.head.weight.equal(mdlm.net.head.weight) and model.is_block
    cfg2, _ = gd.prepare(gd.Config(**small, noise="none", block_size=5, init_from=path, lr=0.0,
                                   out_dir=str(tmp_path / "b")))
    student = gd.train_student(cfg2, teacher, data)             # with no learning rate: as it began
    assert student.net.head.weight.equal(mdlm.net.head.weight)
    for changed in (dict(n_embd=12), dict(n_layer=2)):
        wrong = gd.Student(gd.resolve(gd.Config(**{**small, **changed}, noise="none")), 36)
        with pytest.raises(gd.UserError, match="--init-from .*student-none.pt"):
            gd.start_from(wrong, path, data.tokenizer)
    wrong = gd.Student(gd.resolve(gd.Config(**small, n_head=1, noise="none")), 36)
    with pytest.raises(gd.UserError, match="has --n-head 2"):
        gd.start_from(wrong, path, data.tokenizer)
    with pytest.raises(gd.UserError, match="knows other tokens"):
        gd.start_from(model, path, gd.Tokenizer(list("abc")))
    with pytest.raises(gd.UserError, match="holds a teacher"):
        gd.start_from(model, str(tmp_path / "teacher.pt"), data.tokenizer)


def test_a_block_size_that_does_not_divide_the_length_is_refused():
    with pytest.raises(gd.UserError, match="--block-size 3: must divide --seq-len 10"):
        gd.resolve(gd.Config(block_size=3))
