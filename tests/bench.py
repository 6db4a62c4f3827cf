"""Speed and memory of one training step against a dense one, at the shapes of LM1B.

    python tests/bench.py                                     # the paper's map; minutes on a CPU
    python tests/bench.py --model gumbel-draft                # ours; or teacher, mdlm
    python tests/bench.py --batch-size 128 --dtype bfloat16   # on a GPU
    python tests/bench.py --count                             # bytes and products that are V wide

ours    the losses of gumbel_distill.py: everything V-wide at masked positions only
dense   as the official code does it: full (B, L, V) float32 noise, teacher log-probabilities, noise
        embedding (nn.Linear), logits and loss at all positions. The official code has no drafts.
        Here they are read off full (B, L, V) logits, whose gradient autograd finds. The dense
        teacher is the plain cross-entropy of all logits

Both have the same Transformer, teacher, dtype, compilation, optimiser, texts, times and masks. In
the first step they have the same noise, too, and the losses must be equal to 1e-4. The labels'
logits are in float32 on both sides, on a GPU in TF32. Each side runs in a process of its own.
Memory is the peak of the process less what was held after the imports, less 16 bytes for each
parameter of the model (weight, gradient, two moments) and 4 for each of the teacher. On a CPU a
second run measures the memory: there the C library hands freed memory back at once. Utilisation (on
a GPU) is 6 N FLOPs a token for the model and 2 N for the teacher, N without the input embeddings,
over the vendor's dense bfloat16 peak. It counts what the dense way multiplies, on both sides.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import gumbel_distill as gd  # noqa: E402

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}     # FLOP/s, dense bfloat16
MODELS = ["teacher", "mdlm", "gumbel", "gumbel-draft"]


class Words:
    """A vocabulary of GPT-2's size, without its words."""

    def __init__(self, vocab_size=50257):
        self.vocab_size, self.bos_id = vocab_size, vocab_size - 1


def memory(device):
    """Largest number of bytes held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    if student.reads_noise:
        with torch.no_grad():
            g = gd.rng(*key, "dense", device=x0.device)
            xi = dense_noise(teacher(x0), x0, g)                # (B, L, V)
            if same is not None:
                xi = xi.masked_scatter(is_masked, same)

    def add_drafts(h):
        net, z = student.net, xi.flatten(0, 1)                  # (B L, V)
        score = net.head(net.norm(h).flatten(0, 1)) + z
        score, best = score.topk(gd.DRAFT_TOKENS, dim=-1)       # (B L, k)
        weight = (student.scale * score).softmax(dim=-1)
        draft = torch.einsum("mk,mkc->mc", weight, net.embed(best))
        return torch.where(is_masked, h + draft.view_as(h), h)

    x = student.net.embed(xt)
    if student.reads_noise and not student.is_draft:
        x = torch.where(is_masked, student.embed_noise(xi.softmax(dim=-1)), x)
    add = add_drafts if student.is_draft else None
    h = student.net(x + student.embed_pos.weight, add_drafts=add)
    logits = student.net.logits(h)                              # (B, L, V)
    logp = logits - logits.logsumexp(dim=-1, keepdim=True)
    # SUBS: what is not masked is carried over, as a distribution on its one token
    carried = torch.full_like(logp, -1e6).scatter(-1, x0[..., None], 0.0)
    logp = torch.where(is_masked, logp, carried)
    nll = -logp.gather(-1, x0[..., None])[..., 0]
    return (nll / t).mean()


def our_loss(student, teacher, x0, t, key):
    labeller = teacher if student.reads_noise else None
    return gd.student_loss(student, labeller, x0, t, gd.rng(*key, device=x0.device))


@torch.no_grad()
def our_noise(student, teacher, x0, t, key):
    """The posterior noise (M, V) that our_loss draws."""
    g = gd.rng(*key, device=x0.device)
    is_masked = gd.q_sample(x0, t, student.mask_id, g) == student.mask_id
    return gd.posterior_gumbel(teacher(x0, is_masked), x0[is_masked], g)


def loss_of(side, student, teacher, x0, t, key, same=None):
    """One training loss; without a student it is that of the teacher."""
    if student is None and side == "ours":
        return gd.teacher_loss(teacher, x0)
    if student is None:
        logits = teacher.net.logits(teacher.hidden(x0))
        return F.cross_entropy(logits.flatten(0, 1), x0.flatten())
    if side == "ours":
        return our_loss(student, teacher, x0, t, key)
    return dense_loss(student, teacher, x0, t, key, same)


NARROW = dict(n_layer=4, n_head=2, n_embd=32)               # to count what is V wide
TINY = dict(NARROW, seq_len=16, vocab_size=512)             # for tests


def shape(size):
    """The shape that "12x768" names, layers x width, with heads of 64: a dict."""
    try:
        n_layer, n_embd = map(int, size.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{size!r}: layers x width, like 12x768") from None
    if n_layer < 1 or n_embd < 64 or n_embd % 64:
        raise argparse.ArgumentTypeError(f"{size!r}: the width must be a multiple of 64")
    return dict(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd)


def build(model, side, args, vocab_size=50257, **shape):
    """Config, vocabulary, teacher and student. The student is None where `model` is "teacher"."""
    cfg = gd.resolve(gd.Config(dataset="lm1b", batch_size=args.batch_size, grad_accum=1,
                               device=args.device, dtype=args.dtype, **shape))
    words = Words(vocab_size)
    torch.manual_seed(0)
    teacher = gd.Teacher(cfg, words).to(args.device)
    if model == "teacher":
        return cfg, words, teacher, None
    teacher.eval().requires_grad_(False)
    student = gd.new_student(cfg, model, vocab_size).to(args.device)
    if side == "dense" and student.reads_noise and not student.is_draft:
        table = student.embed_noise.data                        # (V, C)
        del student.embed_noise
        student.embed_noise = nn.Linear(*table.shape, bias=False, device=args.device)
        student.embed_noise.weight.data.copy_(table.T)
    return cfg, words, teacher, student


def make_batch(i, cfg, words):
    """Random texts (B, L) and times (B, 1), spread over (0, 1]: half of the tokens are masked."""
    x0 = torch.randint(words.vocab_size, (cfg.batch_size, cfg.seq_len), generator=gd.rng("x0", i))
    t = gd.stratified_times(torch.full((cfg.batch_size, 1), 0.5))
    return x0.to(cfg.device, non_blocking=True), t.to(cfg.device, non_blocking=True)


def measure(model, side, args):
    """Train a model for args.steps steps; returns what the table shows, as a dict.
    model: one of MODELS;  side: "ours" or "dense"
    args: device, dtype, batch_size, steps, size (as shape returns it) and tiny"""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.set_float32_matmul_precision("high")              # as in training
    base = memory(args.device)
    cfg, words, teacher, student = build(model, side, args, **(TINY if args.tiny else args.size))
    trained = student or teacher
    optimizer = torch.optim.AdamW(trained.parameters(), lr=cfg.lr, fused=True)
    if args.device == "cuda":
        for m in {teacher, trained}:
            gd.compile_layers(m)

    def step(i):
        x0, t = make_batch(i, cfg, words)
        key = ("bench", i)
        with torch.autocast(args.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            same = None
            if i == 0 and side == "dense" and student and student.reads_noise:
                same = our_noise(student, teacher, x0, t, key)
            torch.manual_seed(i)                                # for dropout
            loss = loss_of(side, student, teacher, x0, t, key, same)
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
    torch.set_float32_matmul_precision("highest")
    seconds = statistics.median(times)
    n_trained = sum(p.numel() for p in trained.parameters())
    n_teacher = sum(p.numel() for p in teacher.parameters()) if student else 0
    n_tokens = cfg.batch_size * cfg.seq_len
    result = dict(loss=first, peak=memory(args.device), tok_s=n_tokens / seconds, seconds=seconds,
                  memory=memory(args.device) - base - 16 * n_trained - 4 * n_teacher)
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
        flops = flops_a_token(student, teacher)
        result["utilisation"] = peak and flops * n_tokens / seconds / peak
    return result


def flops_a_token(student, teacher):
    """6 N for the model that is trained, 2 N for a teacher that labels; no embedding counts."""
    def n_multiplied(model):
        tables = ("net.embed.weight", "embed_pos.weight")
        return sum(p.numel() for name, p in model.named_parameters() if name not in tables)

    if student is None:
        return 6 * n_multiplied(teacher)
    return 6 * n_multiplied(student) + (2 * n_multiplied(teacher) if student.reads_noise else 0)


class Count(TorchDispatchMode):
    """Counts what is V wide in all kernels that run: bytes read and written, matrix products."""
    FREE = ("view", "_unsafe_view", "t", "transpose", "detach", "alias", "expand", "unsqueeze",
            "slice", "select", "permute", "empty", "empty_like")           # move no data

    def __init__(self, vocab_size):
        super().__init__()
        self.V, self.kernels, self.products = vocab_size, [], 0

    def n_bytes(self, x):
        """Those of a tensor (..., V) with a value for each token and word; a table has (V, C)."""
        is_wide = isinstance(x, torch.Tensor) and self.V in (x.shape[-1:] or x.shape[:1])
        return x.numel() * x.element_size() if is_wide and x.numel() > self.V else 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        outs = out if isinstance(out, (tuple, list)) else [out]
        if name in ("mm", "addmm"):
            self.products += any(self.V in x.shape for x in [*args, *outs])
        if name not in self.FREE:
            n_bytes = sum(self.n_bytes(x) for x in [*args, *outs])
            self.kernels += [(name, n_bytes)] if n_bytes else []
        return out


def count(model, side, batch_size=4):
    """V-wide traffic of one training step under bfloat16 autocast at V = 50,257, L = 128, half of
    the tokens masked: megabytes a token, products with a table (V, C), and the list of kernels.
    Counted on the CPU, eagerly. The Transformer is narrow: it takes no part in this."""
    args = argparse.Namespace(device="cpu", dtype="bfloat16", batch_size=batch_size)
    cfg, words, teacher, student = build(model, side, args, **NARROW)
    x0, t = make_batch(0, cfg, words)
    counter = Count(words.vocab_size)
    with counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(side, student, teacher, x0, t, ("count",))
        loss.backward()
    megabytes = sum(n for _, n in counter.kernels) / x0.numel() / 1e6
    return megabytes, counter.products, counter.kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--batch-size", type=int, default=64 if gpu else 4)
    parser.add_argument("--steps", type=int, default=20 if gpu else 5, help="timed steps")
    parser.add_argument("--model", default="gumbel", choices=MODELS, help="gumbel is the paper's")
    parser.add_argument("--size", type=shape, default="12x768", help="layers x width (12x768)")
    parser.add_argument("--count", action="store_true", help="V-wide bytes and products instead")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for tests")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.model, args.side, args)))
        return
    if args.count:
        for model in MODELS:
            for side in ("ours", "dense"):
                megabytes, products, _ = count(model, side)
                print(f"{model:12s}  {side:5s}  {megabytes:5.1f} MB a token  {products} products")
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
