"""Speed and memory of one student training step against a dense one, at the shapes of LM1B.

    python tests/bench.py                                     # the paper's map; minutes on a CPU
    python tests/bench.py --student gumbel-draft              # ours
    python tests/bench.py --batch-size 128 --dtype bfloat16   # on a GPU

ours    gumbel_distill.student_loss: everything V-wide at masked positions only
dense   as the official code does it: full (B, L, V) float32 noise, teacher log-probabilities, noise
        embedding, logits and loss at all positions

Both have the same Transformer, teacher, dtype, compilation, optimiser, texts, times and masks. In
the first step they have the same noise, too, and the losses must be equal to 1e-4. Each side runs
in a process of its own. Memory is the peak of the process less what was held after the imports,
less 16 bytes for each parameter of the student (weight, gradient, two moments) and 4 for each of
the teacher. On a CPU a second run measures the memory: there the C library hands freed memory back
at once. Utilisation (on a GPU) is 6 N FLOPs a token for the student and 2 N for the teacher, N
without the input embeddings, over the vendor's dense bfloat16 peak.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gumbel_distill as gd  # noqa: E402

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}     # FLOP/s, dense bfloat16


class Words:
    """GPT-2's vocabulary, without its words."""
    vocab_size, bos_id = 50257, 50256


def memory(device):
    """Largest number of bytes held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def noise_of(loss_fn):
    """The posterior noise (M, V) that a call of student_loss draws."""
    drawn, real = [], gd.posterior_gumbel

    def recording(*args):
        drawn.append(real(*args))
        return drawn[-1]
    gd.posterior_gumbel = recording
    with torch.no_grad():
        loss_fn()
    gd.posterior_gumbel = real
    return drawn[0]


def dense_noise(logp, x0, generator):
    """Theorem 4.1 at every position, in float32: (B, L, V)."""
    def gumbel(shape):
        u = torch.rand(shape, generator=generator, device=logp.device)
        return -torch.log(-torch.log(u + 1e-20) + 1e-20)

    zeta, zeta0 = gumbel(logp.shape), gumbel((*x0.shape, 1))
    xi = -torch.log(torch.exp(-zeta) + logp.exp() * torch.exp(-zeta0))
    return xi.scatter(-1, x0[..., None], zeta0 - logp.gather(-1, x0[..., None]))


def dense_loss(student, teacher, x0, t, key, same=None):
    """The loss of gumbel_distill.student_loss; `same`: noise (M, V) to put at masked positions."""
    xt = gd.q_sample(x0, t, student.mask_id, gd.rng(*key, device=x0.device))
    is_masked = (xt == student.mask_id)[..., None]
    with torch.no_grad():
        xi = dense_noise(teacher(x0), x0, gd.rng(*key, "dense", device=x0.device))   # (B, L, V)
        if same is not None:
            xi = xi.masked_scatter(is_masked, same)

    def add_drafts(h):
        everywhere = torch.ones_like(xt, dtype=torch.bool)
        return torch.where(is_masked, student.add_drafts(h, everywhere, xi.flatten(0, 1)), h)

    x, between = student.net.embed(xt), None
    if student.is_draft:
        between = add_drafts
    else:
        x = torch.where(is_masked, student.embed_noise(xi.softmax(dim=-1)), x)
    h = student.net(x + student.embed_pos.weight, between=between)
    logits = student.net.logits(h)                              # (B, L, V)
    logp = logits - logits.logsumexp(dim=-1, keepdim=True)
    # SUBS: what is not masked is carried over, as a distribution on its one token
    carried = torch.full_like(logp, -1e6).scatter(-1, x0[..., None], 0.0)
    logp = torch.where(is_masked, logp, carried)
    nll = -logp.gather(-1, x0[..., None])[..., 0]
    return (nll / t).mean()


def our_loss(student, teacher, x0, t, key):
    return gd.student_loss(student, teacher, x0, t, gd.rng(*key, device=x0.device))


def measure(side, args):
    """Train args.steps steps; returns what the table shows, as a dict."""
    base = memory(args.device)
    cfg = gd.resolve(gd.Config(dataset="lm1b", batch_size=args.batch_size, grad_accum=1,
                               device=args.device, dtype=args.dtype))
    torch.manual_seed(0)
    teacher = gd.Teacher(cfg, Words).to(args.device).eval().requires_grad_(False)
    student = gd.Student(cfg, args.student, Words.vocab_size).to(args.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, fused=True)
    if args.device == "cuda":
        for block in [*teacher.net.blocks, *student.net.blocks]:
            block.compile()

    def step(i):
        key = ("bench", i)
        x0 = torch.randint(Words.vocab_size, (cfg.batch_size, cfg.seq_len), generator=gd.rng(*key))
        x0 = x0.to(args.device)
        t = gd.stratified_times(torch.full((len(x0), 1), 0.5)).to(args.device)
        given = (student, teacher, x0, t, key)
        with torch.autocast(args.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss_fn = our_loss
            if side == "dense":
                same = noise_of(partial(our_loss, *given)) if i == 0 else None
                loss_fn = partial(dense_loss, same=same)
            torch.manual_seed(i)
            loss = loss_fn(*given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    first = step(0)
    for i in (1, 2):                                            # kernels are compiled and packed
        step(i)
    times = []
    for i in range(3, 3 + args.steps):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (student, teacher)]
    tables = student.net.embed.weight.numel() + student.embed_pos.weight.numel()
    needed = 6 * (sizes[0] - tables) + 2 * (sizes[1] - teacher.net.embed.weight.numel())
    n_tokens = cfg.batch_size * cfg.seq_len
    result = dict(loss=first, peak=memory(args.device), tok_s=n_tokens / seconds, seconds=seconds,
                  memory=memory(args.device) - base - 16 * sizes[0] - 4 * sizes[1])
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
        result["utilisation"] = peak and needed * n_tokens / seconds / peak
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--batch-size", type=int, default=64 if gpu else 4)
    parser.add_argument("--steps", type=int, default=20 if gpu else 5, help="timed steps")
    parser.add_argument("--student", default="gumbel", help="gumbel is the paper's; gumbel-draft")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    results = {}
    for side in ("ours", "dense"):
        call = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        r = results[side] = json.loads(subprocess.check_output(call, text=True))
        if args.device == "cpu":
            env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
            slow = json.loads(subprocess.check_output([*call, "--steps", "1"], text=True, env=env))
            r.update(peak=slow["peak"], memory=slow["memory"])
        print(f"{side:5s}  {r['tok_s']:10,.0f} tok/s  {r['seconds']:8.3f} s/step  "
              f"peak {r['peak'] / 2**20:6.0f} MiB, beyond weights, gradients and optimiser "
              f"{r['memory'] / 2**20:6.0f} MiB  loss {r['loss']:.5f}", flush=True)
        if r.get("utilisation"):
            print(f"{side:5s}  {r['utilisation']:.1%} of the GPU's peak FLOP/s")
    ours, dense = results["ours"], results["dense"]
    if abs(ours["loss"] - dense["loss"]) > 1e-4 * dense["loss"]:
        sys.exit("the losses differ: the two sides do not compute the same")
    print(f"speed ratio {ours['tok_s'] / dense['tok_s']:.2f}x")
    print(f"memory ratio {ours['memory'] / dense['memory']:.2f}x")


if __name__ == "__main__":
    main()
