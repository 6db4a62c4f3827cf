"""Block diffusion (BD3-LM).   python -m pytest tests/test_blocks.py"""

import pytest
import torch

import blocks
import gumbel_distill as gd
import shifted
from conftest import STUDENTS, T, V, sharpened, tiny_config, tiny_student

pytestmark = pytest.mark.quick

NAMES = list(blocks.BLOCK_STUDENTS)
PLAIN = dict(zip(NAMES, STUDENTS))      # the same student without blocks


def block_student(name="bd3lm-draft", block_size=2):
    torch.manual_seed(0)
    cfg = tiny_config(blocks.BlockConfig, block_size=block_size)
    return sharpened(shifted.SHIFTED_STUDENTS[name](cfg, V))


def training_logits(student, xt, xi, x0):
    """The training pass, with noise xi (B, T, V): logits (B, T, V), 0 where nothing is masked."""
    is_masked = xt == V
    logits = torch.zeros(*xt.shape, V, dtype=torch.float64)
    student.x0 = x0
    logits[is_masked] = student(xt, xi[is_masked])
    student.x0 = None
    return logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2])
def test_a_noisy_block_sees_the_clean_blocks_before_it_and_nothing_else(name, size):
    """Of six positions the third is known, the others are masked. With blocks of one token it is
    an autoregressive model."""
    student, xt = block_student(name, size), torch.tensor([[V, V, 3, V, V, V]])
    x0 = torch.randint(V, (1, T), generator=gd.rng(1))
    xi = gd.sample_gumbel((1, T, V), gd.rng(2), torch.float64)
    before = training_logits(student, xt, xi, x0)
    is_masked = (xt == V)[0].tolist()
    for i in range(T):
        changed = x0.clone()
        changed[0, i] = (changed[0, i] + 1) % V
        moved = (training_logits(student, xt, xi, changed) != before).any(-1)[0]
        assert moved.tolist() == [is_masked[j] and j // size > i // size for j in range(T)]
        other = xi.clone()
        other[0, i] += torch.randn(V, generator=gd.rng(3), dtype=torch.float64)
        moved = (training_logits(student, xt, other, x0) != before).any(-1)[0]
        is_read = name != "bd3lm" and is_masked[i]
        assert moved.tolist() == [is_read and is_masked[j] and j // size == i // size
                                  for j in range(T)]
    changed = torch.where(xt == 3, 4, xt)                       # the known token
    moved = (training_logits(student, changed, xi, x0) != before).any(-1)[0]
    assert moved.tolist() == [size == 2 and j == 3 for j in range(T)]


@pytest.mark.parametrize("name", NAMES)
def test_one_block_of_the_whole_length_is_the_student_without_blocks(name, teacher):
    """In loss, gradient and texts, though one reads a copy of the text and the other two."""
    in_blocks, plain = block_student(name, block_size=T), tiny_student(PLAIN[name])
    plain.load_state_dict(in_blocks.state_dict())
    x0 = torch.randint(V, (8, T), generator=gd.rng(3))
    t = gd.stratified_times(torch.full((8, 1), 0.5)).double()
    lengths, both = [], []
    for student in (plain, in_blocks):
        hook = student.net.register_forward_pre_hook(
            lambda _, args: lengths.append(args[0].size(1)))
        loss = student.loss(x0, t, gd.rng(5), teacher)
        hook.remove()
        loss.backward()
        both.append([loss] + [p.grad for p in student.parameters()])
    assert lengths == [T, 2 * T]
    for one, two in zip(*both, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-9)
    assert gd.generate(plain, 30, T, nfe=3).equal(gd.generate(in_blocks, 30, T, nfe=3))


@pytest.mark.parametrize("name", shifted.SHIFTED_STUDENTS)
def test_each_block_is_masked_and_weighted_by_a_time_of_its_own(name, teacher):
    """The times of each block are those of the batch, in another order: stratified, too."""
    student, g = block_student(name), gd.rng(1)
    x0 = torch.randint(V, (6, T), generator=gd.rng(3))
    t = gd.stratified_times(torch.full((6, 1), 0.5)).double()
    times = torch.stack([t[:, 0], t[[2, 3, 4, 5, 0, 1], 0], t[[4, 5, 0, 1, 2, 3], 0]], dim=1)
    times = times.repeat_interleave(2, dim=1)                   # (6, T)
    is_masked = torch.rand(6, T, generator=g) < times
    xi = torch.zeros(6, T, V, dtype=torch.float64)
    logp = teacher.logp(teacher.hidden(x0))[is_masked]
    xi[is_masked] = gd.posterior_gumbel(logp.detach(), x0[is_masked], g)
    logits = training_logits(student, torch.where(is_masked, V, x0), xi, x0)
    nll = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    loss = student.loss(x0, t, gd.rng(1), teacher)
    assert torch.allclose(loss, (nll * is_masked / times).mean())
    assert student.x0 is None


def written(student, nfe, xt):
    """30 texts, and for each call of the student: start of the block, its tokens, noise, logits."""
    xi, u = gd.sequence_noise(1, torch.arange(30), T, student)
    calls, forward = [], student.forward

    def spy(xt, xi=None):
        logits = forward(xt, xi)
        if len(logits):                                         # else it is read into the cache
            calls.append((student.start, xt.clone(), xi, logits))
        return logits
    student.forward = spy
    text = student.write(xt, xi, u, nfe)
    student.forward = forward
    return text, calls


@pytest.mark.parametrize("name", shifted.SHIFTED_STUDENTS)
@pytest.mark.parametrize("block_size, nfe", [(1, 6), (2, 6), (3, 2), (3, 4), (6, 4)])
def test_each_step_of_the_cached_sampler_equals_the_training_pass(name, block_size, nfe):
    """With known tokens, which stay."""
    student, xt = block_student(name, block_size), torch.full((30, T), V)
    xt[:10, 1], xt[5:20, 4] = 3, 5
    text, calls = written(student, nfe, xt)
    assert (text < V).all() and text[xt != V].equal(xt[xt != V])
    student.x0 = text
    for start, shown, xi, logits in calls:
        noisy = text.clone()
        noisy[:, start:start + block_size] = shown
        assert torch.allclose(student(noisy, xi), logits)


@pytest.mark.parametrize("block_size, nfe, calls", [
    (6, 4, 4), (3, 4, 4), (3, 5, 4), (3, 1, 2), (2, 3, 3), (2, 7, 6), (1, 1, 6), (1, 12, 12)])
def test_the_calls_for_a_text_are_shared_out_evenly_among_its_blocks(block_size, nfe, calls):
    """Each block has an equal number, one at least. A step with nothing to fill needs no call."""
    student = block_student("bd3lm-gumbel", block_size)
    _, made = written(student, nfe, torch.full((30, T), V))
    starts = [start for start, *_ in made]
    assert len(starts) == calls
    assert {starts.count(start) for start in starts} == {calls * block_size // T}
    assert sorted(set(starts)) == list(range(0, T, block_size))


# -----------------------------------------------------------------------------
# Shifted drafts
def test_with_its_teachers_weights_and_one_token_a_block_it_writes_the_teachers_texts(teacher):
    student = block_student("bd3lm-shifted", 1)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.embed_pos.weight)
    xt, (xi, u) = torch.full((30, T), V), gd.sequence_noise(1, torch.arange(30), T, teacher)
    assert student.write(xt, xi, u, T).equal(gd.serial_extraction(teacher, xt, xi))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_before_a_block_there_is_clean_text_and_inside_it_the_next_token_reads_a_draft(size):
    student = block_student("bd3lm-shifted", size)
    xt = torch.full((1, T), V)
    x0 = torch.randint(V, (1, T), generator=gd.rng(1))
    xi = gd.sample_gumbel((1, T, V), gd.rng(2), torch.float64)
    masked = training_logits(student, xt, xi, x0)
    for i in range(T):
        known, others = xt.clone(), torch.arange(T) // size != i // size
        known[:, i] = x0[:, i]                                  # in xt; x0 has it anyway
        assert torch.allclose(training_logits(student, known, xi, x0)[:, others], masked[:, others])
    # the draft of token i is read at the position that token i + 1 is guessed from, and there alone
    student.net.is_masked = torch.ones(1, T, dtype=torch.bool)
    student.embed(xt, None)
    drafts = torch.eye(T)[None]                                 # (1, T, C): row i is draft i
    placed = student.net.place(drafts)[0]
    for i in range(T):
        from_before = i % size != 0
        assert placed[i].equal(drafts[0, i - 1] if from_before else torch.zeros(T))
