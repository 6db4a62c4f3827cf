"""Block diffusion (BD3-LM).   python -m pytest tests/test_blocks.py"""

import pytest
import torch
import torch.nn.functional as F

import gumbel_distill as gd
from conftest import CPU, LETTERS, sharpened, tiny_config

pytestmark = pytest.mark.quick

V, T = LETTERS.vocab_size, 6
NAMES = ["bd3lm", "gumbel", "gumbel-draft"]


def block_student(name="gumbel-draft", block_size=2):
    torch.manual_seed(0)
    return sharpened(gd.BlockStudent(tiny_config(block_size=block_size), name, V).double())


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
    """The Student reads one copy of the text, the BlockStudent two."""
    _, teacher, _ = tiny
    blocks = block_student(name, block_size=T)
    plain = gd.Student(tiny_config(), name, V).double().eval()
    plain.load_state_dict(blocks.state_dict())
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    t = gd.stratified_times(torch.full((8, 1), 0.5)).double()
    lengths, both = [], []
    for student in (plain, blocks):
        student.net.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
        labeller = teacher if student.reads_noise else None
        loss = gd.student_loss(student, labeller, x0, t, gd.rng(5))
        loss.backward()
        both.append([loss] + [p.grad for p in student.parameters()])
    assert lengths == [T, 2 * T] and len(both[0]) > 10
    for one, two in zip(*both, strict=True):
        assert torch.allclose(one, two, atol=1e-12)


def test_blocks_shorter_than_the_text_make_a_block_student():
    for block_size, kind in ((T, gd.Student), (3, gd.BlockStudent), (1, gd.BlockStudent)):
        student = gd.new_student(tiny_config(block_size=block_size), "gumbel", V)
        assert type(student) is kind and student.block_size == block_size


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
def test_each_block_is_masked_and_weighted_by_its_own_time(name):
    student = block_student(name)
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    xi = gd.sample_gumbel((8, T, V), gd.rng(4), torch.float64)
    t = torch.tensor([[0.2, 0.6, 1.0]] * 8, dtype=torch.float64)
    g = gd.rng(1)
    is_masked = torch.rand(8, T, generator=g) < torch.tensor([0.2, 0.2, 0.6, 0.6, 1.0, 1.0])
    logp = noisy_logits(student, torch.where(is_masked, V, x0), xi, x0).log_softmax(-1)
    nll = -logp.gather(-1, x0[..., None])[..., 0] * is_masked
    bound = sum(nll[:, 2 * b:2 * b + 2].sum() / t[0, b] for b in range(3)) / x0.numel()
    assert torch.allclose(gd.student_loss(student, None, x0, t, gd.rng(1), xi), bound)


def written(student, nfe, xt=None):
    """30 texts, and for each block and step: start, xt, noise, tokens in the cache, logits."""
    xi, u = gd.sequence_noise(1, torch.arange(30), T, student)
    steps = nfe * student.block_size // T                       # of a block
    calls, forward = [], student.forward

    def spy(xt, xi=None, cache=None):
        n_cached, xt_before = cache.start, xt.clone()
        logits = forward(xt, xi, cache=cache)
        if xi is not None:
            start = len(calls) // steps * student.block_size
            calls.append((start, xt_before, xi, n_cached, logits))
        return logits
    student.forward = spy
    text = student.write(xi, u, nfe=nfe, xt=xt, temperature=1.0)
    student.forward = forward
    assert len(calls) == nfe                                    # with 30 texts no step is empty
    return text, calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size, nfe", [(1, 6), (2, 6), (3, 2), (3, 4), (6, 4)])
def test_each_step_of_the_cached_sampler_equals_the_training_pass(name, block_size, nfe):
    """Also with known tokens."""
    student = block_student(name, block_size)
    xt = torch.full((30, T), V)
    xt[:10, 1], xt[5:20, 4] = 3, 5
    text, calls = written(student, nfe, xt)
    assert (text < V).all() and (text[:10, 1] == 3).all() and (text[5:20, 4] == 5).all()
    for start, xt_block, xi, n_cached, logits in calls:
        assert n_cached == start
        noisy = text.clone()
        noisy[:, start:start + block_size] = xt_block
        assert torch.allclose(student(noisy, xi, x0=text), logits)


def test_texts_of_one_block_are_those_of_the_student_without_blocks():
    blocks, plain = block_student(block_size=T), gd.Student(tiny_config(), "gumbel-draft", V)
    plain.double().eval().load_state_dict(blocks.state_dict())
    xi, u = gd.sequence_noise(1, torch.arange(30), T, plain)
    settings = dict(nfe=3, tau=0.8, temperature=0.7, top_p=0.9)
    assert blocks.write(xi, u, **settings).equal(plain.write(xi, u, **settings))


@pytest.mark.parametrize("block_size, nfe, calls", [
    (6, 4, 4), (6, 40, 6), (3, 4, 4), (3, 5, 4), (3, 1, 2), (3, 99, 6), (2, 3, 3), (2, 7, 6),
    (1, 1, 6), (1, 12, 6)])
def test_the_calls_for_a_text_are_shared_out_evenly_among_its_blocks(block_size, nfe, calls):
    """As many calls as possible_nfe says, each block an equal number: one at least, and at most
    one a token."""
    student = block_student("gumbel", block_size)
    assert student.possible_nfe(nfe) == student.possible_nfe(calls) == calls
    _, made = written(student, student.possible_nfe(nfe))
    starts = [start for start, *_ in made]
    assert len(starts) == calls
    assert {starts.count(b) for b in range(0, T, block_size)} == {calls * block_size // T}


@pytest.mark.parametrize("block_size", [2, 6])
def test_what_is_shown_after_each_step_is_the_whole_text(block_size):
    """The text as it stands: known and earlier tokens in place, [MASK] where nothing is yet."""
    student = block_student(block_size=block_size)
    xi, u = gd.sequence_noise(1, torch.arange(30), T, student)
    xt = torch.full((30, T), V)
    xt[:, 5] = 3
    seen = []
    text = student.write(xi, u, nfe=T, xt=xt, on_step=seen.append)
    assert len(seen) == T                                       # with 30 texts no step is empty
    before = xt
    for shown in seen:
        is_new = (before == V) & (shown != V)
        assert shown.shape == (30, T) and is_new.any()
        assert shown[~is_new].equal(before[~is_new]) and shown[is_new].equal(text[is_new])
        before = shown
    assert before.equal(text)


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
    a, b = (student.write(noise, u, nfe=T) for noise in (xi, other))
    assert a[:, :4].equal(b[:, :4]) and not a[:, 4:].equal(b[:, 4:])


def test_a_block_size_that_does_not_divide_the_length_is_refused():
    with pytest.raises(gd.UserError, match="--block-size 3"):
        gd.resolve(gd.Config(**CPU, block_size=3))
