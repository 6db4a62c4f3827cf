"""What a card does: checks against the CPU, speed, and a short training with a judged table.

    python tests/gpu.py                                        # check and speed: 4 minutes
    python tests/gpu.py --only check                           # or speed, text, train: one part
    python tests/gpu.py --only train --minutes 6 --train-files 'lm1b/*'
    python tests/gpu.py --device cpu --tiny                    # the script itself, in seconds

1. check   The card computes what the CPU computes. Weights and draws are made on the CPU and copied
           to the card, because the two have different generators.
2. speed   Training at the shapes of LM1B beside the dense form of tests/bench.py, sampling, and
           what the default runs on lm1b and owt would take.
3. text    Tokenises the files of part 4, which train does itself where it was not done before.
4. train   With --train-files: the table "card" of docs/tables.py, a teacher, a judge, and students.
           The same command goes on with the students that are missing.

Each part writes its rows as it goes, to OUT_DIR/PART.json or card.jsonl: a part that is killed
leaves what it has.
The exit status is 1 if a check failed.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs")]
import bench  # noqa: E402
import gumbel_distill as gd  # noqa: E402
import tables  # noqa: E402
from config import HAS_GPU, PRESETS, UserError, flag  # noqa: E402
from config import print_table, run_cli  # noqa: E402
from data import find_files  # noqa: E402

V, L = 512, 32
SMALL = dict(n_layer=4, n_head=2, n_embd=64, seq_len=L, dropout=0.0)
STUDENTS = [("mdlm", L), ("gumbel", L), ("gumbel-draft", L), ("bd3lm", 8), ("gumbel-draft", 8)]


def free(args):
    """Give back the memory of models that are gone."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def forget_compiled(args):
    """All layers share one code, and torch compiles at most 8 variants of a code: a part whose
    shapes are its own begins anew."""
    free(args)
    torch.compiler.reset()


def record(args, part, row):
    """Add a row (a dict) to OUT_DIR/PART.json, which is whole at any moment."""
    path = Path(args.out_dir, f"{part}.json")
    rows = args.rows.setdefault(part, [])
    rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(rows, indent=1))
    path.with_suffix(".tmp").replace(path)


def wait(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def n_variants():
    """How many graphs were compiled so far, and how many breaks they have."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


# -----------------------------------------------------------------------------
# 1. Checks: each yields (name, error, limit), and holds where error <= limit. The number in a name
# is the block length: 32 is one block
def small_models(name, block_size, args):
    """A teacher and a student on the CPU, with weights so large that no logits are nearly equal.
    As in tests/bench.py, the student is None where `name` is "teacher"."""
    cfg = gd.resolve(gd.Config(dataset="lm1b", device="cpu", block_size=block_size, **SMALL))
    torch.manual_seed(args.seed)
    models = [gd.Teacher(cfg, bench.Words(V))]
    models.append(None if name == "teacher" else gd.new_student(cfg, name, V))
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
            gd.compile_layers(model)
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
        x = student.eval().write(xi, u, nfe=8)
        same = there.write(xi.to(args.device), u.to(args.device), nfe=8).cpu()
        yield f"texts of {name} {block_size}", (x != same).double().mean().item(), 0.01
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
    (Noise from torch.rand in float32 would end at 16.6.) torch's own exponential_ stands beside."""
    n_pieces, n = (1, 2**21) if args.device == "cpu" else (16, 2**25)
    g = gd.rng(args.seed, "tail", device=args.device)
    largest = max(gd.sample_gumbel((n,), g).max().item() for _ in range(n_pieces))
    E = torch.empty(n, device=args.device)
    smallest = min(E.exponential_(generator=g).min().item() for _ in range(n_pieces))
    note = dict(name=f"smallest of {n_pieces * n} draws of Exp(1)", ours=math.exp(-largest),
                exponential_=smallest)
    print("{name}: ours {ours:.1e}, exponential_ {exponential_:.1e}".format(**note))
    record(args, "check", note)
    yield f"noise, largest draw ({largest:.2f}) below log n", math.log(n_pieces * n) - largest, 3


def check_exact(args):
    """Exact mode writes the teacher's own text; at a near-tie float32 rounds either way."""
    import sample
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
    """A run stopped in its student goes on from the checkpoint, and ends as one that was not.
    The first run counts what is compiled: after the second validation of a model nothing is."""
    variants, real = [], gd.validation_loss

    def validation_loss(*of):
        loss = real(*of)
        variants.append(n_variants())
        return loss
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(gd, "validation_loss", validation_loss):
            whole = maze_losses(args, f"{folder}/whole")
        n = MAZE["max_steps"] // MAZE["eval_every"]             # validations of a model
        for model, counts in (("teacher", variants[:n]), ("gumbel-draft", variants[n:])):
            yield f"variants compiled late for {model}", counts[-1][0] - counts[1][0], 0
        yield f"graph breaks in {variants[-1][0]} variants", variants[-1][1], 0
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
            call += [flag(setting), *map(str, values)]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, timeout=300)
        yield name, (last_losses(f"{folder}/two") / one - 1).abs().max().item(), ROUNDING


CHECKS = [check_posterior, check_tail, check_exact, check_samplers, check_resume, check_losses,
          check_processes]                                      # those that compile come last


def run_checks(args, checks=CHECKS):
    """Print one line for each result; returns how many failed. An exception is a failure."""
    n_failed = 0
    for check in checks:
        forget_compiled(args)
        start = time.perf_counter()
        try:
            for name, error, limit in check(args):
                is_fine = error <= limit                        # not so for nan
                n_failed += not is_fine
                print(f"{name:52} error {error:8.1e}  limit {limit:7.1e}  "
                      f"{'ok' if is_fine else 'FAILED'}", flush=True)
                record(args, "check", dict(name=name, error=error, limit=limit, ok=is_fine))
        except Exception as e:
            n_failed += 1
            failed = f"{check.__name__}: {type(e).__name__}: {str(e):.300}"
            print(f"{failed}  FAILED", flush=True)
            record(args, "check", dict(name=failed, ok=False))
        print(f"({check.__name__} took {time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{n_failed} failed", flush=True)
    return n_failed


# -----------------------------------------------------------------------------
# 2. Speed
SPEED_COLUMNS = {"model": "", "side": "", "texts": "d", "tok_s": ",.0f", "s_step": ".4f",
                 "share of peak": ".1%", "peak GiB": ".2f", "loss": ".4f", "ratio": ".2f",
                 "variants": "d", "note": ""}
PIECES = (32, 64, 128)          # sequences at once, beside the 256 of all other rows


def speed_row(model, side, args, **more):
    """Measure a training step; print and record its row."""
    row = dict(model=model, side=side, texts=args.batch_size)
    try:
        r = bench.measure(model, side, args)
        row.update(tok_s=r["tok_s"], s_step=r["seconds"], loss=r["loss"])
        if args.device == "cuda":               # on a CPU the peak is that of the whole process
            row["peak GiB"] = r["peak"] / 2**30
        if r.get("utilisation"):                # known for some cards
            row["share of peak"] = r["utilisation"]
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    row.update(more, variants=n_variants()[0])
    free(args)
    print(json.dumps(row), flush=True)
    record(args, "speed", row)
    return row


def training_speed(args):
    """Print a table of all models, ours and dense; returns the seconds a token of each model."""
    rows, seconds = [], {}
    for model in bench.MODELS:
        ours = speed_row(model, "ours", args)
        if "note" in ours:
            raise UserError(f"{model}: {args.batch_size} sequences do not fit on this card; take "
                            "a smaller --size like 6x512")
        dense = speed_row(model, "dense", args)
        if "tok_s" in dense:
            ours["ratio"] = ours["tok_s"] / dense["tok_s"]
        rows += [ours, dense]
        seconds[model] = 1 / ours["tok_s"]
    print_table(rows, SPEED_COLUMNS)
    return seconds


def pieces_speed(args):
    """MDLM at other numbers of sequences at once. The first other one compiles one more variant,
    for all numbers."""
    rows = [speed_row("mdlm", "ours", argparse.Namespace(**{**vars(args), "batch_size": n}))
            for n in PIECES[:1 if args.tiny else None]]
    print_table(rows, SPEED_COLUMNS)


def median_ms(step, args, n=20):
    """Milliseconds of a call, the median of n after 3 others."""
    times = []
    for _ in range(3 + n):
        start = time.perf_counter()
        step()
        wait(args)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def output_layer_speed(args):
    """The output layer and its loss, forward and backward. V = 50,257 leaves the rows of bfloat16
    logits unaligned; 50,304 is a multiple of 64. Its last columns are cut off, or stay."""
    M, C, n_words = (64, 32, 513) if args.tiny else (4096, args.size["n_embd"], 50257)
    padded = math.ceil(n_words / 64) * 64
    g = gd.rng("output", device=args.device)
    target = torch.randint(n_words, (M,), generator=g, device=args.device)
    for rows, kept, how in ((n_words, n_words, "as it is"), (padded, n_words, "padded, cut"),
                            (padded, padded, "padded, kept")):
        h = torch.randn(M, C, generator=g, device=args.device, requires_grad=True)
        W = torch.randn(rows, C, generator=g, device=args.device) * 0.02
        W.requires_grad_()

        def step():
            with torch.autocast(args.device, torch.bfloat16):
                logits = F.linear(h, W)[:, :kept].float()
                loss = F.cross_entropy(logits, target, reduction="none").mean()
            loss.backward()
            h.grad = W.grad = None
        row = dict(model=f"output layer of {rows} rows, {how}", ms=median_ms(step, args))
        print("{model}: {ms:.3f} ms".format(**row), flush=True)
        record(args, "speed", row)
        free(args)


def built(model, args):
    """A model at the shapes that were measured: config, vocabulary, teacher, student."""
    return bench.build(model, "ours", args, **(bench.TINY if args.tiny else args.size))


def sampling_speed(args):
    """Print how many texts a second random weights write, in float32 and not compiled."""
    cfg, _, teacher, student = built("gumbel-draft", args)
    n = 4 if args.tiny else 20
    for model, nfe, temperature in ((student, 4, 0.0), (student, 16, 0.0), (student, 16, 1.0),
                                    (teacher, cfg.seq_len, None)):
        settings = {} if model is teacher else dict(nfe=nfe, temperature=temperature)
        gd.generate(model.eval(), 1, cfg.seq_len, **settings)   # kernels are loaded
        wait(args)
        start = time.perf_counter()
        gd.generate(model, n, cfg.seq_len, **settings)
        wait(args)
        row = dict(model=model.name, nfe=nfe, temperature=temperature,
                   texts_s=n / (time.perf_counter() - start))
        print("writing, {model}, nfe {nfe}, temperature {temperature}: {texts_s:.2f} texts a "
              "second".format(**row), flush=True)
        record(args, "speed", row)


def print_hours(seconds):
    """What the default runs take, from the seconds a token of each model."""
    for name in ("lm1b", "owt"):
        preset = PRESETS[name]
        n_tokens = preset["max_steps"] * preset["batch_size"] * preset["seq_len"]
        hours = {model: n_tokens * s / 3600 for model, s in seconds.items()}
        least = "at least " if name == "owt" else ""
        print(f"--dataset {name}: {least}{sum(hours.values()):.1f} hours without evaluation ("
              + ", ".join(f"{model} {h:.1f}" for model, h in hours.items()) + ")")
    print("Both are reckoned from the seconds a token above. owt takes longer, because its texts "
          f"have {PRESETS['owt']['seq_len']} tokens: attention costs more.", flush=True)


def largest_piece(args):
    """How many sequences fit at once for gumbel-draft: doubled until the card is full."""
    n, most = (1, 8) if args.device == "cpu" else (64, 1024)
    cfg, words, teacher, student = built("gumbel-draft", args)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    if args.device == "cuda":
        for model in (teacher, student):
            gd.compile_layers(model)
    fits = 0
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
    print(f"gumbel-draft: {fits} sequences of {cfg.seq_len} tokens fit at once{more}", flush=True)
    record(args, "speed", dict(model="gumbel-draft", fits=fits, tried=most))


def run_speed(args):
    print(f"{args.batch_size} sequences a step, {args.steps} steps")
    forget_compiled(args)
    seconds = training_speed(args)
    output_layer_speed(args)
    sampling_speed(args)
    free(args)
    print_hours(seconds)
    pieces_speed(args)
    largest_piece(args)
    print("variants compiled: {}, graph breaks in them: {}".format(*n_variants()), flush=True)


# -----------------------------------------------------------------------------
# 3. and 4. Text, and the table "card" of docs/tables.py in some minutes
TRAINING = 0.65                 # of the time left; the rest is validation, writing, scoring
FIRST = {"teacher": 0.25, "judge": 0.1}     # of that; the students share the rest, in equal steps
MOST_EPOCHS = 6                 # more would teach a teacher the text by heart


def table_jobs(args, **plan):
    """The runs of the table, as docs/tables.py names them: real text, then students. `plan` holds
    their steps."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError("reading text needs the package datasets: pip install datasets")
    if not args.train_files:
        raise UserError("training needs --train-files, a quoted glob like 'lm1b/*'")
    how = dict(args.size, device=args.device, **plan)
    if args.tiny:
        how.update(bench.NARROW, tokenizer="gpt2-1024", seq_len=16, batch_size=8, nfe=[2, 4],
                   dtype="float32", compile=False)
    jobs = tables.jobs_of("card", argparse.Namespace(**vars(args), max_steps=None), **how)
    for what in ("train", "val"):                               # complains now, not in five minutes
        if jobs[0][f"{what}_files"]:
            find_files(f"--{what}-files", jobs[0][f"{what}_files"])
    return jobs


def load_texts(cfg):
    start = time.perf_counter()
    text = gd.load_data(cfg)
    print(f"text: {len(text.train):,} tokens, {len(text.val):,} to validate on, in "
          f"{time.perf_counter() - start:.1f} s", flush=True)
    return text


def seconds_a_step(model, loss_fn, data, cfg):
    """Time of an optimiser step of `train`, compiled as there."""
    model.to(cfg.device).train()
    ema = copy.deepcopy(model)
    if cfg.compile:
        gd.compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        gd.backward(model, loss_fn, data, cfg, step=0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, p in zip(ema.parameters(), model.parameters()):
                average.lerp_(p, 0.1)
    return median_ms(step, cfg, n=4) / 1e3


def measured_seconds(args, cfg, text):
    """Seconds a step of the teacher and of the students. The layers that this compiles are those
    of the training: all layers share one code."""
    torch.set_float32_matmul_precision("high")
    teacher = gd.Teacher(cfg, text.tokenizer)
    seconds = {"teacher": seconds_a_step(teacher, gd.teacher_loss, text, cfg)}
    teacher.eval().requires_grad_(False)

    def loss_fn(model, x0, t, generator, index=None):
        return bench.loss_of("ours", model, teacher, x0, t, ("measured", 0))
    for name in tables.STUDENTS:
        student = gd.new_student(cfg, name, teacher.vocab_size)
        seconds[name] = seconds_a_step(student, loss_fn, text, cfg)
        del student
        free(args)
    return seconds


def planned_steps(seconds, time_left, n_tokens, cfg):
    """Steps of teacher, judge and students, from the seconds a step of each model: such that these
    two and the three students of one start train in TRAINING * time_left."""
    most = MOST_EPOCHS * n_tokens // (cfg.batch_size * cfg.seq_len)
    plan = {}
    for kind, share in FIRST.items():
        fits = share * TRAINING * time_left / seconds["teacher"]
        plan[f"{kind}_steps"] = int(max(10, min(most, fits)))
    used = sum(plan.values()) * seconds["teacher"]
    of_all_students = sum(seconds[name] for name in tables.STUDENTS)
    plan["max_steps"] = int(max(10, (TRAINING * time_left - used) / of_all_students))
    plan["warmup"] = min(cfg.warmup, plan["max_steps"] // 10)
    return plan


def run_train(args):
    """Train what is missing of the table in args.minutes, and print the table. The minutes of the
    first call decide how many steps the models have; plan.json keeps them."""
    cfg = tables.config_of(table_jobs(args)[0])
    text = load_texts(cfg)
    start = time.perf_counter()

    def left():
        return 60 * args.minutes - (time.perf_counter() - start)

    def say(what):
        graphs, breaks = n_variants()
        print(f"{what}; {left():.0f} s left, variants compiled {graphs}, graph breaks {breaks}",
              flush=True)

    forget_compiled(args)
    plan_path, rows_path = Path(args.out_dir, "plan.json"), f"{args.out_dir}/card.jsonl"
    if not plan_path.exists():
        seconds = measured_seconds(args, cfg, text)
        plan = planned_steps(seconds, left(), len(text.train), cfg)
        plan_path.parent.mkdir(parents=True, exist_ok=True)
        plan_path.write_text(json.dumps(dict(plan, seconds=seconds)))
    plan = json.loads(plan_path.read_text())
    seconds = plan.pop("seconds")
    say(f"steps {plan}, seconds a step {seconds}")
    jobs = table_jobs(args, **plan)
    for kind in tables.AR_SEEDS:
        tables.ar_model(jobs[0], kind)
        say(f"{kind} trained")
    done = {row["key"] for row in tables.read_rows(rows_path)}
    for job in jobs:
        if job["key"] in done:
            continue
        needed = plan["max_steps"] * seconds.get(job["student"], 0)         # real text needs none
        if needed > max(0, TRAINING * left()):
            say(f"no time for {job['key']}; the same command goes on")
            break
        rows = tables.train_and_write(job, args.samples)
        tables.add_rows(rows_path, rows, job["key"])
        free(args)
        val = f", validation loss {rows[0]['val']:.3f}" if "val" in rows[0] else ""
        say(job["key"] + val)
        shown = rows[-1:] if val else rows[:2]                  # the official draw; real, teacher
        for row in shown:
            print("\n".join(f"  {text!r:.160}" for text in row["text"]), flush=True)
    tables.show("card", args)


# -----------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["check", "speed", "text", "train"], help="one part; "
                        "without it check, speed and, with --train-files, train")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=bench.shape, help="layers x width (speed 12x768, train "
                        "6x512)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script itself")
    parser.add_argument("--minutes", type=float, default=6.0, help="of part 4 in all (6)")
    parser.add_argument("--samples", type=int, default=200, help="texts a row of its table (200)")
    parser.add_argument("--entropy", type=float, help="compare at this entropy, in place of that "
                        "of real text")
    parser.add_argument("--train-files", help="of part 4: a file or a quoted glob")
    parser.add_argument("--val-files", help="or the last 10%% of the training text")
    parser.add_argument("--out-dir", default="out/gpu", help="for all that is written (out/gpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the checks (0)")
    args = parser.parse_args()
    if args.device == "cuda" and not HAS_GPU:
        raise UserError("no CUDA card here; install a CUDA build of torch, or try the script "
                        "with --device cpu --tiny")
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    parts = [args.only] if args.only else ["check", "speed"] + ["train"] * bool(args.train_files)
    size, args.rows = args.size, {}
    args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    args.batch_size, args.steps = (8, 3) if args.tiny else (256, 6)
    if "text" in parts or "train" in parts:
        args.size = size or {}                                  # else that of the table
        table_jobs(args)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card} | torch {torch.__version__} | training in {args.dtype}")
    n_failed = 0
    for part in parts:
        args.size = size or (bench.shape("12x768") if part == "speed" else {})
        print(f"\n{part}", flush=True)
        start = time.perf_counter()
        try:
            if part == "check":
                n_failed = run_checks(args)
            if part == "speed":
                run_speed(args)
            if part == "text":
                load_texts(tables.config_of(table_jobs(args)[0]))
            if part == "train":
                run_train(args)
        except torch.OutOfMemoryError as e:
            raise UserError(f"{part}: does not fit on this card; take a smaller --size like 6x512 "
                            f"({e!r:.99})") from e
        print(f"{part} took {time.perf_counter() - start:.1f} s", flush=True)
    if n_failed:
        sys.exit(f"{n_failed} of the checks failed")


if __name__ == "__main__":
    run_cli(main)
