"""Laws of the samplers.   python -m pytest tests/test_sampling.py"""

import itertools
import math

import pytest
import torch

import data
import gumbel_distill as gd
import sample
from conftest import LETTERS, sharpened, tiny_config

pytestmark = pytest.mark.quick

V, T = LETTERS.vocab_size, 6


def draws(n, seed=0):
    return gd.sequence_noise(seed, torch.arange(n), T, Recorder(torch.zeros(T, V)).double())


class Recorder(torch.nn.Module):
    """Stands in for a student: fixed logits (T, V), and remembers what it was shown."""
    mask_id = vocab_size = V
    reads_noise = False

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = torch.nn.Parameter(logits), []

    def forward(self, xt, xi=None):
        self.seen.append(xt == V)
        return self.logits.expand(len(xt), T, V)[xt == V]


@pytest.mark.parametrize("nfe", [1, 2, 5, 6, 40])
def test_nothing_stays_masked_and_known_tokens_stay(nfe, tiny):
    _, _, student = tiny
    xi, u = draws(20)
    xt = torch.full((20, T), V)
    xt[:, 2], xt[:10, 5] = 3, 1
    x = gd.sample(student, xi, u, nfe, temperature=1.0, xt=xt)
    assert (x < V).all() and (x[:, 2] == 3).all() and (x[:10, 5] == 1).all()
    assert (xt == V).sum() == 20 * 5 - 10                       # what is given is not written on


def test_a_step_from_t_to_s_fills_a_masked_token_with_probability_t_minus_s_over_t():
    """Whatever u is, 0 too, a masked token has a step from 1 to `steps`; a known one has none."""
    is_masked = torch.rand(4, 50_000, generator=gd.rng(1)) < 0.7
    u = torch.rand(4, 50_000, generator=gd.rng(2), dtype=torch.float64)
    u[:, :2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for steps in (1, 3, 8):
        step = gd.fill_steps(is_masked, u, steps)
        assert (step[~is_masked] == 0).all() and step[is_masked].min() == 1
        assert step.max() == steps and (step == step.round()).all()
        for k in range(1, steps + 1):
            t, s = 1 - (k - 1) / steps, 1 - k / steps
            open_before = step >= k
            share = (step == k).sum() / open_before.sum()
            error = math.sqrt(0.25 / open_before.sum())
            assert share.item() == pytest.approx((t - s) / t, abs=4 * error)


def test_the_steps_of_the_sampler_have_the_ancestral_law():
    """A text's counts per step are multinomial, each step as likely as another. Time runs from all
    masked to none."""
    student, n = Recorder(torch.zeros(T, V)), 20_000
    gd.sample(student, *draws(n), 4)
    masked = torch.stack(student.seen + [torch.zeros(n, T, dtype=torch.bool)]).double()
    assert masked[0].all()
    share = masked.mean((1, 2))
    assert torch.allclose(share, torch.tensor([1, 0.75, 0.5, 0.25, 0]).double(), atol=0.006)
    variance = masked[2].sum(1).var()  # binomial, not a fixed number
    assert variance == pytest.approx(T * 0.25, rel=0.05)


def test_the_student_is_called_once_a_step_but_never_for_nothing():
    for nfe, n, calls in ((1, 1, 1), (4, 1000, 4), (1000, 1, T)):
        student = Recorder(torch.zeros(T, V))
        gd.sample(student, *draws(n), nfe)
        assert len(student.seen) == calls


def test_temperature_one_draws_the_students_probabilities_and_zero_the_argmax():
    logits = torch.randn(1, V, generator=gd.rng(2)).mul(2).expand(T, V)
    n = 10_000
    x = gd.sample(Recorder(logits), *draws(n), 2, temperature=1.0)
    share = x.flatten().bincount(minlength=V) / x.numel()
    assert (share - logits[0].softmax(0)).abs().max() < 4.5 * math.sqrt(0.25 / x.numel())
    assert (gd.sample(Recorder(logits), *draws(9), 2) == logits[0].argmax()).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_divides_the_logits(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0])
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = gd.draw_tokens(logits.expand(10_000, 3), u, temperature, 1.0)
    share = drawn.bincount(minlength=3) / 10_000
    expected = logits.div(temperature).exp()
    assert torch.allclose(share, expected / expected.sum(), atol=2e-4)


def test_tau_scales_the_noise_once_in_both_samplers(tiny):
    _, teacher, student = tiny
    xi, u = gd.sequence_noise(0, torch.arange(40), 6, student)
    assert gd.sample(student, xi, u, 2, tau=0.5).equal(gd.sample(student, 0.5 * xi, u, 2))
    text = gd.generate(teacher, 40, 6, tau=0.5)
    assert text.equal(gd.serial_extraction(teacher, 0.5 * xi))
    assert not text.equal(gd.serial_extraction(teacher, xi))


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15, 0.0, 0.0])
    u = torch.linspace(0, 1 - 1e-9, 10_001, dtype=torch.float64)
    for top_p, kept in ((0.0, {1}), (0.3, {1}), (0.5, {1, 3}), (0.75, {1, 3, 4}),
                        (1.0, {0, 1, 2, 3, 4})):
        x = gd.draw_tokens(p.log().expand(len(u), V), u, 1.0, top_p)
        assert set(x.tolist()) == kept
        assert (x == 1).double().mean() == pytest.approx(0.4 / p[list(kept)].sum().item(), abs=1e-3)


def test_text_depends_on_seed_and_number_alone_at_any_batch_size(tiny, monkeypatch):
    _, teacher, student = tiny
    for model, settings in ((student, dict(nfe=3, temperature=1.0, top_p=0.9)), (teacher, {})):
        whole = gd.generate(model, 12, T, seed=5, **settings)
        monkeypatch.setattr(gd, "sampling_batches", lambda n, *_: torch.arange(n).split(5))
        assert gd.generate(model, 12, T, seed=5, **settings).equal(whole)
        assert gd.generate(model, 7, T, seed=5, **settings).equal(whole[:7])
        assert not gd.generate(model, 12, T, seed=6, **settings).equal(whole)
        monkeypatch.undo()


def test_tau_zero_and_temperature_zero_give_one_text_in_one_step(tiny):
    _, _, student = tiny
    x = gd.generate(student, 30, T, nfe=1, tau=0.0)
    assert (x == x[0]).all()
    assert not (gd.generate(student, 30, T, nfe=1) == x[0]).all()


def test_teacher_and_student_write_what_serial_extraction_and_sample_make(tiny):
    _, teacher, student = tiny
    xi, u = gd.sequence_noise(0, torch.arange(40), T, student)
    xt = torch.full((40, T), V)
    xt[:20, 1] = 3
    for known in (None, xt):
        assert teacher.write(xi, u, xt=known).equal(gd.serial_extraction(teacher, xi, known))
        assert teacher.write(xi, xt=known, tau=0.5).equal(
            gd.serial_extraction(teacher, 0.5 * xi, known))
        settings = dict(nfe=3, tau=0.8, temperature=0.7, top_p=0.9)
        assert student.write(xi, u, xt=known, **settings).equal(
            gd.sample(student, xi, u, xt=known, **settings))


def test_the_settings_of_the_sampler_are_all_combinations_but_none_twice_without_effect():
    """More calls than tokens, or than the blocks can share, are as many; mdlm reads no tau."""
    def settings(name, block_size=T, **more):
        cfg = tiny_config(block_size=block_size, temperature=[0.0, 1.0], tau=[1.0, 0.5], **more)
        rows = list(gd.sampler_settings(gd.new_student(cfg, name, V), cfg))
        assert all(row.pop("top_p") == cfg.top_p for row in rows)
        return [(row["nfe"], row["tau"], row["temperature"]) for row in rows]

    every = itertools.product([1, 6], [1.0, 0.5], [0.0, 1.0])
    rows = settings("gumbel", nfe=[1, 6, 7, 64], top_p=0.9)
    assert len(rows) == 8 and set(rows) == set(every)
    assert set(settings("mdlm", nfe=[6, 1])) == set(itertools.product([1, 6], [1.0], [0.0, 1.0]))
    assert len(settings("mdlm", nfe=[6, 6])) == 2
    assert {nfe for nfe, _, _ in settings("gumbel", 2, nfe=[1, 3, 6, 64])} == {3, 6}
    assert len(settings("gumbel", 2, nfe=[1, 3, 6, 64])) == 8


@pytest.mark.parametrize("name", ["mdlm", "gumbel"])
def test_the_settings_of_the_sampler_are_what_write_takes(name):
    cfg = tiny_config(nfe=[2], tau=[0.5], temperature=[0.7], top_p=0.8)
    student = gd.Student(cfg, name, V).eval()
    (settings,) = gd.sampler_settings(student, cfg)
    xi, u = gd.sequence_noise(0, torch.arange(9), T, student)
    tau = 0.5 if name == "gumbel" else 1.0
    assert student.write(xi, u, **settings).equal(
        gd.sample(student, xi, u, 2, tau=tau, temperature=0.7, top_p=0.8))


@pytest.mark.parametrize("n_known", [0, 2, T])
@pytest.mark.parametrize("drafter", ["student", "no noise", "none"])
def test_exact_mode_equals_serial_decoding_token_for_token(drafter, n_known, tiny):
    """In float64, KV-cached serial decoding against full verification; no difference allowed."""
    _, teacher, student = tiny
    torch.manual_seed(1)
    plain = gd.Student(tiny_config(), "mdlm", V).double().eval()
    xi, _ = draws(500)
    xt = torch.full((500, T), V)
    xt[:, :n_known] = torch.randint(V, (500, n_known), generator=gd.rng(1))
    kept = torch.zeros(500, dtype=torch.long)

    def on_round(live, draft, answer, n_keep):
        assert (n_keep > kept[live]).all()                      # each round one token more at least
        kept[live] = n_keep
    student = {"student": student, "no noise": plain, "none": None}[drafter]
    x, rounds = sample.draft_and_verify(student, teacher, xi, xt, on_round=on_round)
    assert (kept == (T if n_known < T else 0)).all()
    assert x.equal(gd.serial_extraction(teacher, xi, xt))
    assert x[:, :n_known].equal(xt[:, :n_known])
    assert rounds.max() <= T - n_known and rounds.min() >= (n_known < T)


def test_exact_mode_takes_one_round_with_a_perfect_student_and_t_with_one_always_wrong(tiny):
    _, teacher, _ = tiny
    xi, _ = draws(50)
    truth = gd.serial_extraction(teacher, xi)

    class Oracle(Recorder):
        reads_noise = True

        def forward(self, xt, xi):
            return torch.nn.functional.one_hot((truth + self.error) % V, V)[xt == V]

    oracle = Oracle(torch.zeros(T, V))
    oracle.error = 0
    x, rounds = sample.draft_and_verify(oracle, teacher, xi)
    assert x.equal(truth) and (rounds == 1).all()
    oracle.error = 1  # always wrong: each round still yields the teacher's own next token
    x, rounds = sample.draft_and_verify(oracle, teacher, xi)
    assert x.equal(truth) and (rounds == T).all()


def reference_apd(student, teacher, xi, ratio):
    """One text at a time, one position at a time, in probabilities."""
    text, rounds = [], 0
    while len(text) < T:
        rounds += 1
        n = T - len(text)
        noise = xi[len(text):]
        logq = student(torch.tensor([text + [V] * n]), noise).log_softmax(-1)
        draft = (logq if student.reads_noise else logq + noise).argmax(-1).tolist()
        for k in range(n):
            logp = teacher(torch.tensor([text + draft[:k] + [0] * (n - k)]))[0, len(text) + k]
            q = logq[k] - noise[k] if student.reads_noise else logq[k]
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


def test_exact_report_counts_a_difference_as_equal_only_at_a_near_tie(tiny, monkeypatch):
    """Texts 0-3 differ at a near-tie, 4 where there is none, 5 already before its near-tie."""
    _, teacher, student = tiny
    _, report = sample.compare_exact(student, teacher, 40, T, 0)
    assert report["equal"] == pytest.approx(1) and report["near_ties"] == 0
    xi, u = draws(40)
    serial = gd.serial_extraction(teacher, xi)
    score = teacher(serial)[:, 3] + xi[:, 3]                    # (40, V)
    best, token = score.topk(2, dim=-1)
    tie = torch.tensor([0, 1, 2, 3, 5])
    xi[tie, 3, token[tie, 1]] += best[tie, 0] - best[tie, 1] - 1e-5
    assert gd.serial_extraction(teacher, xi).equal(serial)
    assert (best[4, 0] - best[4, 1]) > 1e-3
    drafted = serial.clone()
    drafted[:6, 3] = token[:6, 1]
    drafted[5, 1] = (serial[5, 1] + 1) % V
    rounds = torch.full((40,), 2)
    rounds[:10] = 4
    monkeypatch.setattr(sample, "sequence_noise", lambda *_: (xi, u))
    monkeypatch.setattr(sample, "draft_and_verify", lambda *_: (drafted, rounds))
    x, report = sample.compare_exact(student, teacher, 40, T, 0)
    assert x.equal(drafted) and report["rounds"] == pytest.approx(2.5)
    assert report["near_ties"] == 4 and report["equal"] == pytest.approx(38 / 40)


def test_agreement_of_the_teacher_with_itself_is_one_and_other_noise_shows_the_floor(tiny):
    _, teacher, _ = tiny
    text = gd.generate(teacher, 300, T, seed=2)
    scores = gd.compare_with_teacher(text, text, teacher)
    assert (scores["agree_token"], scores["agree_seq"]) == (1, 1)
    logp = teacher(text).gather(-1, text[..., None])
    assert scores["teacher_nll"] == pytest.approx(-logp.mean().item())
    floor = gd.compare_with_teacher(text.roll(1, 0), text, teacher)
    assert floor["agree_token"] < 0.8 and floor["agree_seq"] < 0.3
    assert floor["teacher_nll"] == pytest.approx(scores["teacher_nll"])
    wrong = text.clone()
    wrong[:, 2] = (wrong[:, 2] + 1) % V
    scores = gd.compare_with_teacher(wrong, text, teacher)
    assert scores["agree_token"] == pytest.approx(5 / 6) and scores["agree_seq"] == 0


def test_token_entropy_is_that_of_the_counts_in_each_text():
    x = torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4]])
    assert data.token_entropy(x) == pytest.approx(math.log(4) / 2)
