"""What a card computes: the same as a CPU.   python -m pytest -n0 -m gpu tests/test_gpu.py

Where that is quick a test is rehearsed on the CPU, so that it runs when a card is there at last.
"""

import copy
import functools
import math

import pytest
import torch

import bench
import blocks
import gumbel_distill as gd
from conftest import STUDENTS, TINY, sharpened, tiny_config
from test_gumbel import GUMBEL, KS_LIMIT, ks
from test_training import stop_at

V, T = 512, 32
MODELS = {"teacher": gd.Teacher, **STUDENTS, **blocks.BLOCK_STUDENTS}
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def models(name, **more):
    """Settings, a teacher and a model on the CPU, both with sharp outputs, in float32."""
    cfg = tiny_config(blocks.BlockConfig, block_size=8, seq_len=T, n_embd=64, **more)
    torch.manual_seed(0)
    teacher = sharpened(gd.Teacher(cfg, V, V)).float()
    given = (V, V) if name == "teacher" else (V,)
    return cfg, teacher, sharpened(MODELS[name](cfg, *given)).float()


def draw_on_the_cpu(patch):
    """The generators of card and CPU differ: draw noise and masks on the CPU, and move them."""
    draw, mask, key = gd.sample_exponential, gd.q_sample, []

    def generator():
        key.append(1)
        return gd.rng("draws", len(key))
    patch.setattr(gd, "sample_exponential", lambda shape, g, dtype=torch.float32: draw(
        shape, generator(), dtype).to(g.device))
    patch.setattr(gd, "q_sample", lambda x0, t, mask_id, g: mask(
        x0.cpu(), t.cpu(), mask_id, generator()).to(g.device))


def test_posterior_noise_of_the_teachers_own_tokens_is_gumbel_and_gives_the_tokens(device):
    g = gd.rng("posterior", device=device)
    shape = (2000, 50257) if device == "cuda" else (2000, V)
    logp = (3 * torch.randn(shape, generator=g, device=device)).log_softmax(dim=-1)
    x0 = (logp + gd.sample_gumbel(shape, g)).argmax(dim=-1)
    xi = gd.posterior_gumbel(logp, x0, g)
    assert ((logp + xi).argmax(dim=-1) != x0).double().mean() < 1e-3
    assert ks(xi.flatten()[:200_000].cpu(), GUMBEL) < KS_LIMIT
    winners = xi.gather(1, x0[:, None])[:, 0]                   # they are larger
    assert ks(winners.cpu(), GUMBEL) > 5 * KS_LIMIT


def test_the_noise_has_31_bits_of_tail(device):
    """The largest of n draws lies within 3 of log n, but once in 1e9. On a card that is 17."""
    n_pieces, n = (16, 2**25) if device == "cuda" else (1, 2**21)
    g = gd.rng("tail", device=device)
    largest = max(gd.sample_gumbel((n,), g).max().item() for _ in range(n_pieces))
    assert math.log(n_pieces * n) - 3 < largest < 22.5


def loss_and_gradient(name, device, dtype):
    cfg, teacher, model = models(name)
    teacher, model = teacher.requires_grad_(False).to(device), model.to(device)
    g = gd.rng("batch")
    x0 = torch.randint(V, (16, T), generator=g).to(device)
    t = gd.stratified_times(torch.rand(16, 1, generator=g)).to(device)
    with pytest.MonkeyPatch.context() as patch:
        draw_on_the_cpu(patch)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(x0, t, gd.rng("loss", device=device), teacher)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_cpu_and_near_them_in_bfloat16(name, device):
    loss, gradient = loss_and_gradient(name, "cpu", torch.float32)
    for dtype, limit, limit_gradient in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.05, 0.4)):
        other, here = loss_and_gradient(name, device, dtype)
        assert other == pytest.approx(loss, rel=limit)
        assert (gradient - here).norm() < limit_gradient * gradient.norm()


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_the_cpu(name, device):
    """A near-tie may break either way, and all after it."""
    _, _, model = models(name)
    xi, u = gd.sequence_noise(0, torch.arange(32), T, model)
    xt = torch.full((32, T), V)
    xt[:, 3] = 5
    x = model.write(xt, xi, u, 8)
    there = copy.deepcopy(model).to(device)
    same = there.write(xt.to(device), xi.to(device), u.to(device), 8).cpu()
    assert (x != same).double().mean() < 0.01
    known = torch.full((T,), V)
    assert gd.generate(there, 3, T, nfe=2, known=known).device.type == device


class Texts:
    """Random texts, of which each occurs often."""
    n_train, fingerprint, tokenizer = 8, "texts", {}
    val = torch.randint(V, (45, T), generator=gd.rng("texts"))          # the last piece is smaller

    def rows(self, index):
        return self.val[index]


def trained(name, device, folder, **more):
    """The checkpoint of a short training."""
    folder.mkdir(exist_ok=True)
    cfg, teacher, model = models(name, device=device, dropout=0.1, out_dir=str(folder), **more)
    gd.train(name, model, Texts(), cfg, 8, teacher.requires_grad_(False).to(device))
    return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)


def distance(a, b):
    """The relative distance of two checkpoints' weights."""
    a, b = (torch.cat([p.flatten() for p in saved["model"].values()]) for saved in (a, b))
    return ((a - b).norm() / a.norm()).item()


@NO_CARD
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gumbel", "gumbel-draft", "bd3lm-draft"])
def test_a_run_goes_on_from_its_checkpoint(name, tmp_path, monkeypatch):
    """Up to rounding: a card adds up in changing order. tests/test_training.py: on a CPU."""
    whole = trained(name, "cuda", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 6)
        trained(name, "cuda", tmp_path / "cut")
    assert distance(whole, trained(name, "cuda", tmp_path / "cut")) < 1e-4


def n_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["gumbel", "gumbel-draft", "bd3lm"])
def test_compiled_training_ends_near_the_other_and_compiles_nothing_late(
        name, device, tmp_path, monkeypatch):
    """Though the number of masked tokens changes every step. On a CPU the compiler's front end
    alone: it sees what would be compiled."""
    plain, real, counts = trained(name, device, tmp_path / "plain"), gd.mean_loss, []
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def mean_loss(*of):
        loss = real(*of)
        counts.append(n_graphs())
        return loss
    monkeypatch.setattr(gd, "mean_loss", mean_loss)
    torch.compiler.reset()
    before = n_graphs()
    compiled = trained(name, device, tmp_path / "compiled", compile=True)
    assert distance(plain, compiled) < 0.05
    assert before < counts[0] and len(set(counts[1:])) == 1


@NO_CARD
@pytest.mark.gpu
def test_the_default_run_on_a_card_ends_in_a_table(cli, tmp_path):
    words = [word for word in TINY if word not in ("--device", "cpu", "--no-compile")]
    status, out, err = cli(gd.main, *words, "--out-dir", tmp_path)
    assert status == 0 and "teacher_nll" in out, err


def test_the_bench_measures_every_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "--tiny"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "teacher", *STUDENTS]
