"""What a card does: checks against the CPU, speed, and the hours of a whole run.

    python tests/gpu.py                                        # meant for 5 minutes on an H100
    python tests/gpu.py --device cpu --tiny                    # the script itself, in seconds
    python tests/gpu.py --minutes 60 --train-files 'lm1b/*'    # then train, and judge the texts

1. check   The card computes what the CPU computes. Weights and draws are made on the CPU and copied
           to the card, because the two have different generators.
2. speed   Training at the shapes of LM1B beside the dense form of tests/bench.py, and sampling.
3. hours   What the default runs on lm1b and owt would take, and how many sequences fit at once.
4. train   With --minutes: a teacher, three students, and a second teacher as the judge. The judge
           learns from every second file, the others from the rest.

The exit status is 1 if a check failed.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench  # noqa: E402
import gumbel_distill as gd  # noqa: E402
import sample  # noqa: E402
from data import COLUMNS, PRESETS, UserError, find_files, print_table, run_cli  # noqa: E402
from data import token_entropy  # noqa: E402
from judge import JUDGED_COLUMNS, teacher_nll  # noqa: E402

V, L = 512, 32
SMALL = dict(n_layer=4, n_head=2, n_embd=64, seq_len=L, dropout=0.0)
STUDENTS = [("mdlm", L), ("gumbel", L), ("gumbel-draft", L), ("bd3lm", 8), ("gumbel-draft", 8)]


def free(args):
    """Give back the memory of models that are gone, and forget what was compiled for them."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.compiler.reset()          # else too many variants of one Block end compilation


# -----------------------------------------------------------------------------
# 1. Checks: each yields (name, error, limit), and holds where error <= limit. The number in a name
# is the block length: 32 is one block
def small_models(name, block_size, args):
    """A teacher and a student on the CPU, with weights so large that no logits are nearly equal.
    As in tests/bench.py, the student is None where `name` is "teacher"."""
    cfg = gd.resolve(gd.Config(dataset="lm1b", device="cpu", block_size=block_size, **SMALL))
    torch.manual_seed(args.seed)
    models = [gd.Teacher(cfg, bench.Words(V))]
    models.append(None if name == "teacher" else gd.Student(cfg, name, V))
    for model in filter(None, models):
        for part, p in model.named_parameters():
            p.data *= 3 if p.dim() == 2 and "qkv" not in part else 1
        model.net.head.weight.data *= 5
    return models


def on_device(model, args):
    return copy.deepcopy(model).to(args.device).eval()


def cpu_draws(device, seed):
    """Within it gumbel_distill draws on the CPU, and moves masks and noise to the device."""
    draw, mask, g = gd.sample_exponential, gd.q_sample, gd.rng(seed, "draws")

    def sample_exponential(shape, _, dtype=torch.float32):
        return draw(shape, g, dtype).to(device)

    def q_sample(x0, t, mask_id, _):
        return mask(x0.cpu(), t.cpu(), mask_id, g).to(device)
    return mock.patch.multiple(gd, sample_exponential=sample_exponential, q_sample=q_sample)


def loss_and_gradient(models, block_size, device, dtype, args):
    """Of one batch, as training computes them: the loss, and a list of tensors on the CPU."""
    teacher, student = copy.deepcopy(models)
    trained = (student or teacher).to(device)
    if student:
        teacher.to(device).requires_grad_(False)
    if device == "cuda" and dtype == "bfloat16":
        for model in {teacher, trained}:
            gd.compile_blocks(model)
    g = gd.rng(args.seed, "batch")
    x0 = torch.randint(V, (16, L), generator=g).to(device)
    t = gd.stratified_times(torch.rand(16, L // block_size, generator=g)).to(device)
    is_bfloat16 = dtype == "bfloat16"
    with cpu_draws(device, args.seed), torch.autocast(device, torch.bfloat16, enabled=is_bfloat16):
        loss = bench.loss_of("ours", student, teacher, x0, t, ())
    loss.backward()
    return loss.item(), [p.grad.float().cpu() for p in trained.parameters()]


def check_losses(args):
    """Loss and gradient equal the CPU's in float32, and lie near them in bfloat16 (on a card
    compiled, as in training). The gradient's error is the largest over all parameters. On a CPU
    bfloat16 changes the loss by 0.001 at most, the gradient by 0.04 at most, over 12 seeds."""
    for name, block_size in [("teacher", L), *STUDENTS]:
        models = small_models(name, block_size, args)
        loss, gradient = loss_and_gradient(models, block_size, "cpu", "float32", args)
        least = 0.01 * torch.cat([p.flatten() for p in gradient]).norm()
        for dtype, limit, limit_gradient in (("float32", 1e-4, 1e-4), ("bfloat16", 0.01, 0.1)):
            other, here = loss_and_gradient(models, block_size, args.device, dtype, args)
            errors = [(a - b).norm() / max(a.norm(), least) for a, b in zip(gradient, here)]
            yield f"loss of {name} {block_size}, {dtype}", abs(other / loss - 1), limit
            yield f"gradient of {name} {block_size}, {dtype}", max(errors).item(), limit_gradient


def check_samplers(args):
    """The same noise gives the same text. A near-tie may break either way, and all after it."""
    for name, block_size in STUDENTS:
        teacher, student = small_models(name, block_size, args)
        xi, u = gd.sequence_noise(args.seed, torch.arange(32), L, teacher)
        there = on_device(student, args)
        for order in gd.ORDERS:
            how = dict(nfe=4, order=order, temperature=0.0)
            x = gd.sample(student.eval(), xi, u, **how)
            same = gd.sample(there, xi.to(args.device), u.to(args.device), **how).cpu()
            differ = (x != same).double().mean().item()
            yield f"texts of {name} {block_size}, {order}", differ, 0.01
    x = gd.serial_extraction(teacher.eval(), xi)
    same = gd.serial_extraction(on_device(teacher, args), xi.to(args.device)).cpu()
    yield "texts of the teacher, serially", (x != same).double().mean().item(), 0.01


def check_posterior(args):
    """Posterior noise drawn on the device decides for x0. Over x0 ~ p it has Gumbel(0,1)'s mean."""
    g = gd.rng(args.seed, "posterior", device=args.device)
    shape = (2000, V if args.tiny else 50257)
    logp = (3 * torch.randn(shape, generator=g, device=args.device)).log_softmax(dim=-1)
    x0 = (logp + gd.sample_gumbel(shape, g)).argmax(dim=-1)
    xi = gd.posterior_gumbel(logp, x0, g)
    other = ((logp + xi).argmax(dim=-1) != x0).double().mean().item()
    yield "posterior noise, tokens it decides otherwise", other, 1e-3
    error = abs(xi.double().mean().item() - 0.577216)
    yield "posterior noise, mean", error, 5 * 1.2825 / xi.numel()**0.5


def check_tail(args):
    """The largest of n draws lies within 3 of log n, but once in 1e9. On a card this is beyond 17.
    (Noise from torch.rand in float32 would end at 16.6.)"""
    n_pieces, n = (1, 2**21) if args.device == "cpu" else (16, 2**25)
    g = gd.rng(args.seed, "tail", device=args.device)
    largest = max(gd.sample_gumbel((n,), g).max().item() for _ in range(n_pieces))
    yield f"noise, largest draw ({largest:.2f}) below log n", math.log(n_pieces * n) - largest, 3


def check_exact(args):
    """Exact mode writes the teacher's own text; at a near-tie float32 rounds either way."""
    teacher, student = small_models("gumbel-draft", L, args)
    models = on_device(student, args), on_device(teacher, args)
    _, report = sample.compare_exact(*models, 64, L, args.seed)
    yield "exact mode, texts that are not the serial ones", 1 - report["equal"], 0.01


MAZE = dict(batch_size=16, grad_accum=2, max_steps=40, warmup=10, eval_every=10, n_samples=20,
            nfe=[2], students=["gumbel-draft"])
ROUNDING = 1e-3     # a card adds up in changing order; bfloat16 changes these losses by 1e-4


class Stop(Exception):
    pass


def maze_losses(args, folder, n_calls=None):
    """A short run on the maze: the last validation losses of teacher and student.
    With n_calls it is stopped in that optimiser step, and its folder is left as it stands."""
    cfg = gd.Config(**MAZE, device=args.device, dtype=args.dtype, compile=args.device == "cuda",
                    out_dir=folder)
    rates = mock.Mock(wraps=gd.learning_rate)
    if n_calls:
        rates.side_effect = [mock.DEFAULT] * n_calls + [Stop]
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(gd, "learning_rate", rates):
        gd.run(cfg)
    return last_losses(folder)


def last_losses(folder):
    with open(f"{folder}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    return torch.tensor([row["val"] for row in rows if row["step"] == MAZE["max_steps"]])


def check_resume(args):
    """A run stopped in its student goes on from the checkpoint, and ends as one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        whole = maze_losses(args, f"{folder}/whole")
        with contextlib.suppress(Stop):
            maze_losses(args, f"{folder}/cut", n_calls=MAZE["max_steps"] + 25)
        same = maze_losses(args, f"{folder}/cut")
        limit = 1e-9 if args.device == "cpu" else ROUNDING
        yield "losses of a run that was stopped", (same / whole - 1).abs().max().item(), limit


def check_processes(args):
    """Two processes on two cards end with the losses of one. tests/test_training.py: on CPUs."""
    name = "losses of two processes with nccl"
    if args.device == "cpu" or torch.cuda.device_count() < 2:
        print(f"{name}: skipped, needs two cards")
        return
    with tempfile.TemporaryDirectory() as folder:
        one = maze_losses(args, f"{folder}/one")
        call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                str(ROOT / "gumbel_distill.py"), "--out-dir", f"{folder}/two"]
        for setting, value in MAZE.items():
            values = value if isinstance(value, list) else [value]
            call += [gd.flag(setting), *map(str, values)]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, timeout=300)
        yield name, (last_losses(f"{folder}/two") / one - 1).abs().max().item(), ROUNDING


CHECKS = [check_losses, check_samplers, check_posterior, check_tail, check_exact, check_resume,
          check_processes]


def run_checks(args, checks=CHECKS):
    """Print one line for each result; returns how many failed. An exception is a failure."""
    n_failed = 0
    for check in checks:
        try:
            for name, error, limit in check(args):
                is_fine = error <= limit                        # not so for nan
                n_failed += not is_fine
                print(f"{name:52} error {error:8.1e}  limit {limit:7.1e}  "
                      f"{'ok' if is_fine else 'FAILED'}", flush=True)
        except Exception as e:
            n_failed += 1
            print(f"{check.__name__}: {type(e).__name__}: {str(e):.300}  FAILED", flush=True)
        free(args)
    return n_failed


# -----------------------------------------------------------------------------
# 2. Speed
SPEED_COLUMNS = {"model": "", "side": "", "tok_s": ",.0f", "s_step": ".4f", "share of peak": ".1%",
                 "peak GiB": ".2f", "loss": ".4f", "ratio": ".2f", "note": ""}


def speed_row(model, side, args):
    row = dict(model=model, side=side)
    try:
        r = bench.measure(model, side, args)
        row.update(tok_s=r["tok_s"], s_step=r["seconds"], loss=r["loss"])
        if args.device == "cuda":               # on a CPU the peak is that of the whole process
            row["peak GiB"] = r["peak"] / 2**30
        if r.get("utilisation"):                # known for some cards
            row["share of peak"] = r["utilisation"]
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    free(args)
    return row


def training_speed(args):
    """Print a table of all models, ours and dense; returns the seconds a token of each model."""
    rows, seconds = [], {}
    for model in bench.MODELS:
        ours, dense = [speed_row(model, side, args) for side in ("ours", "dense")]
        if "note" in ours:
            raise UserError(f"{model}: {args.batch_size} sequences do not fit on this card")
        if "tok_s" in dense:
            ours["ratio"] = ours["tok_s"] / dense["tok_s"]
        rows += [ours, dense]
        seconds[model] = 1 / ours["tok_s"]
    print_table(rows, SPEED_COLUMNS)
    return seconds


def built(model, args):
    """A model at the shapes that were measured: config, vocabulary, teacher, student."""
    return bench.build(model, "ours", args, **(bench.TINY if args.tiny else {}))


def sampling_speed(args):
    """Print how many texts a second random weights write, in float32 and not compiled."""
    cfg, _, teacher, student = built("gumbel-draft", args)
    rows = []
    n = 4 if args.tiny else 20
    for model, nfe in ((student, 4), (student, 16), (teacher, cfg.seq_len)):
        settings = {} if model is teacher else dict(nfe=nfe)
        gd.generate(model.eval(), 1, cfg.seq_len, **settings)   # kernels are loaded
        start = time.perf_counter()
        gd.generate(model, n, cfg.seq_len, **settings)[-1, -1].item()       # waits for a card
        rows.append(dict(model=model.name, nfe=nfe, texts_s=n / (time.perf_counter() - start)))
    print_table(rows, {"model": "", "nfe": "d", "texts_s": ".2f"})


# -----------------------------------------------------------------------------
# 3. Hours
def print_hours(seconds):
    for name in ("lm1b", "owt"):
        preset = PRESETS[name]
        n_tokens = preset["max_steps"] * preset["batch_size"] * preset["seq_len"]
        hours = {model: n_tokens * s / 3600 for model, s in seconds.items()}
        least = "at least " if name == "owt" else ""
        print(f"--dataset {name}: {least}{sum(hours.values()):.1f} hours without evaluation ("
              + ", ".join(f"{model} {h:.1f}" for model, h in hours.items()) + ")")
    print("Both are reckoned from the seconds a token above. owt takes longer, because its texts "
          f"have {PRESETS['owt']['seq_len']} tokens: attention costs more.")


def largest_piece(args):
    """How many sequences fit at once for gumbel-draft: doubled until the card is full."""
    most = 8 if args.device == "cpu" else 1024
    cfg, words, teacher, student = built("gumbel-draft", args)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    if args.device == "cuda":
        for model in (teacher, student):
            gd.compile_blocks(model)
    fits, n = 0, 1
    while n <= most:
        batch = bench.make_batch(0, dataclasses.replace(cfg, batch_size=n), words)
        try:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = bench.loss_of("ours", student, teacher, *batch, ("piece", n))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        except torch.OutOfMemoryError:
            break
        fits, n = n, 2 * n
    more = "" if n <= most else f" (no more than {most} were tried)"
    print(f"gumbel-draft: {fits} sequences of {cfg.seq_len} tokens fit at once{more}")


# -----------------------------------------------------------------------------
# 4. Training for some minutes, and the judged table
SHARES = {"teacher": 0.25, "judge": 0.15, "mdlm": 0.2, "gumbel": 0.2, "gumbel-draft": 0.2}
TRAINING = 0.7                  # of the minutes; the rest is validation, compilation and the table


def split_files(args):
    """Globs of two folders with links to the training files, every second one in each."""
    val = find_files("--val-files", args.val_files) if args.val_files else []
    train = [p for p in find_files("--train-files", args.train_files) if p not in val]
    shutil.rmtree(f"{args.out_dir}/files", ignore_errors=True)
    if len(train) < 2:
        raise UserError(f"--train-files {args.train_files}: {len(train)} file to train on; "
                        "give two or more, half of them for the judge")
    for i, path in enumerate(train):
        link = Path(args.out_dir, "files", "ab"[i % 2], f"{i:05d}-{os.path.basename(path)}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(path))
    return [f"{args.out_dir}/files/{half}/*" for half in "ab"]


def planned_steps(args, seconds, n_tokens):
    """Steps of each model from the measured seconds a token. They are kept in a file, so that
    the same command goes on with the same steps."""
    path, steps = Path(args.out_dir, f"plan-{args.minutes:g}-minutes.json"), {}
    if path.exists():
        return json.loads(path.read_text())
    for name, share in SHARES.items():
        a_step = n_tokens * seconds["teacher" if name == "judge" else name]
        steps[name] = max(1, int(TRAINING * share * 60 * args.minutes / a_step))
    path.write_text(json.dumps(steps))
    return steps


def train_and_judge(args, halves, seconds):
    """Train teacher, judge and students; print and save the table."""
    small = dict(bench.NARROW, tokenizer="gpt2-1024", seq_len=16, batch_size=8, grad_accum=1,
                 n_samples=8, nfe=[2, 4]) if args.tiny else dict(grad_accum=4, n_samples=128)
    base = gd.resolve(gd.Config(
        dataset="lm1b", train_files=halves[0], val_files=args.val_files, schedule="cosine",
        seed=args.seed, device=args.device, dtype=args.dtype, compile=args.device == "cuda",
        out_dir=args.out_dir, **small))
    steps = planned_steps(args, seconds, base.batch_size * base.seq_len)
    print("steps: " + ", ".join(f"{name} {n}" for name, n in steps.items()))

    def settings(name, **more):
        n = steps[name]
        return dataclasses.replace(base, max_steps=n, eval_every=math.ceil(n / 10),
                                   warmup=min(base.warmup, n // 10), **more)

    text = gd.load_data(base)
    teacher = gd.get_teacher(settings("teacher"), text)
    free(args)
    print("the judge, on the other files:")
    cfg = settings("judge", train_files=halves[1], out_dir=f"{args.out_dir}/judge")
    os.makedirs(cfg.out_dir, exist_ok=True)
    judge = gd.get_teacher(cfg, gd.load_data(cfg))
    students = []
    for name in ("mdlm", "gumbel", "gumbel-draft"):
        free(args)
        students.append(gd.get_student(name, settings(name), teacher, text))

    def judged(x):
        total, count = [each.sum().item() for each in teacher_nll(x, judge)]
        return {"gen_ppl": math.exp(total / max(1, count))}

    text.judge = judged                                         # gd.evaluate asks it for its scores
    real = text.val_rows(base.n_samples).to(args.device)
    rows = [{"model": "real text", **judged(real), "entropy": token_entropy(real)}]
    rows += gd.evaluate(teacher, students, text, base)
    print_table(rows, {**JUDGED_COLUMNS, **COLUMNS})
    Path(args.out_dir, "results.json").write_text(json.dumps(rows, indent=1))


# -----------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script itself")
    parser.add_argument("--minutes", type=float, help="then train on LM1B for so long in all")
    parser.add_argument("--train-files", help="with --minutes: a quoted glob of two files or more")
    parser.add_argument("--val-files", help="or the last 10%% of each half of the training text")
    parser.add_argument("--out-dir", default="out/gpu", help="what --minutes trains (out/gpu)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "cuda" and not gd.HAS_GPU:
        raise UserError("no CUDA card here; install a CUDA build of torch, or try the script "
                        "with --device cpu --tiny")
    if args.minutes is not None and not (args.minutes > 0 and args.train_files):
        raise UserError(f"--minutes {args.minutes:g} must be above 0, and needs --train-files, "
                        "a quoted glob like 'lm1b/*'")
    halves = split_files(args) if args.minutes else None        # complains now, not in five minutes
    args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    args.batch_size, args.steps = (8, 3) if args.tiny else (64, 10)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card} | torch {torch.__version__} | training in {args.dtype}")

    print("\n1. Checks")
    n_failed = run_checks(args)
    print(f"\n2. Speed: {args.batch_size} sequences a step")
    seconds = training_speed(args)
    print()
    sampling_speed(args)
    free(args)
    print("\n3. Hours")
    print_hours(seconds)
    largest_piece(args)
    free(args)
    if args.minutes:
        print(f"\n4. Training for {args.minutes:g} minutes")
        train_and_judge(args, halves, seconds)
    if n_failed:
        sys.exit(f"{n_failed} of the checks failed")


if __name__ == "__main__":
    run_cli(main)
