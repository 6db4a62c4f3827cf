"""The tables of docs/text.md: train students, let them write, and score the texts.

    python docs/tables.py stories --train-files tinystories.txt     # beginnings and budgets
    python docs/tables.py lengths --train-files tinystories.txt     # where does the noise pay?
    python docs/tables.py search --train-files tinystories.txt      # smallest time, learning rate
    python docs/tables.py letters --train-files tinyshakespeare.txt
    python docs/tables.py news --train-files 'lm1b/*' --val-files 'lm1b/*-0000[0-3]-of-*'
    python docs/tables.py stories --show                            # the tables of what is there

Each line of out/tables/NAME.jsonl is one student at one setting of the sampler. A run that was
stopped goes on with the students that are missing. Two AR models are trained first: the teacher,
and a judge with another seed, whose perplexity no student has learned from. The table "card" is
made by tests/gpu.py --only train.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gumbel_distill as gd  # noqa: E402
from config import Config, UserError, print_table, run_cli  # noqa: E402
from data import load_data, token_entropy  # noqa: E402
from judge import energy_distance, floors, pairs_of, rep_n, teacher_features  # noqa: E402
from judge import teacher_nll, training_words, words_of  # noqa: E402

STUDENTS = ["mdlm", "gumbel", "gumbel-draft"]
STARTS = ["scratch", "teacher"]
TEXT_FIELDS = ["dataset", "tokenizer", "seq_len", "train_files", "val_files"]
AR_SEEDS = {"teacher": 0, "judge": 1000}
STORIES = dict(dataset="tinystories", seq_len=64, batch_size=32, teacher_steps=2000)
TABLES = {  # settings that all runs of a table share; lists of those that differ between its runs
    "stories": (STORIES, [
        dict(init_from=STARTS, max_steps=[500], seed=[0, 1, 2]),
        dict(init_from=STARTS, max_steps=[2000], seed=[0])]),
    "letters": (dict(STORIES, dataset="text", nfe=[1, 4, 16]), [
        dict(init_from=STARTS, max_steps=[500], seed=[0, 1, 2]),
        dict(init_from=STARTS, max_steps=[2000], seed=[0])]),
    "lengths": (dict(STORIES, max_steps=1000, nfe=[1, 2, 4, 8]), [
        dict(seq_len=[16], labels=["data", "teacher"], seed=[0, 1, 2]),
        dict(seq_len=[64, 32], labels=["data", "teacher"], seed=[0])]),
    "search": (dict(STORIES, max_steps=1000, nfe=[4, 16]), [
        dict(t_min=[1e-3, 0.1, 0.3], lr=[2e-3]), dict(t_min=[0.1], lr=[1e-3, 4e-3])]),
    "news": (dict(dataset="lm1b", tokenizer="gpt2-4096", seq_len=32, n_layer=4, n_head=4,
                  n_embd=128, dropout=0.0, batch_size=256, grad_accum=1, lr=2e-3, warmup=100,
                  schedule="cosine", ema=0.999, max_steps=2500, teacher_steps=2500,
                  judge_steps=1000, dtype="bfloat16", compile=True), [
        dict(init_from=["teacher"], seed=[0]), dict(init_from=["scratch"], seed=[0]),
        dict(init_from=["teacher"], max_steps=[800], seed=[0, 1, 2], student=["mdlm", "gumbel"],
             nfe=[[1, 2]])]),
    "card": (dict(dataset="lm1b", seq_len=128, n_layer=6, n_head=8, n_embd=512, batch_size=128,
                  grad_accum=1, lr=1e-3, warmup=100, schedule="cosine", ema=0.999, max_steps=2000,
                  teacher_steps=2000, eval_every=500, dtype="bfloat16", compile=True,
                  draws=[(1.0, 0.5, 1.0), (1.0, 0.7, 1.0), (1.0, 0.85, 1.0), (1.0, 1.0, 1.0),
                         (0.85, 1.0, 0.9)]), [
        dict(init_from=["teacher"], seed=[0]), dict(init_from=["scratch"], seed=[0])]),
}
# How all students write: at each of these (tau, temperature, top_p). MDLM reads no noise, so tau is
# 1 for it. The last is the official draw.
DRAWS = [(1.0, temperature, 1.0) for temperature in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)]
DRAWS += [(0.7, 0.0, 1.0), (0.85, 0.0, 1.0), (0.85, 1.0, 0.9)]


def jobs_of(name, args, **more):
    """The settings of all runs of a table, as dicts; `more` holds others. The first runs score real
    text, one for each length, in place of a student's."""
    shared, groups = TABLES[name]
    shared = {**shared, **more}
    jobs = []
    for group in groups:
        group = {**group, "student": group.get("student", STUDENTS)}
        for values in itertools.product(*group.values()):
            jobs.append({**shared, **dict(zip(group, values))})
    for job in jobs:
        if args.max_steps:
            job["max_steps"] = job["teacher_steps"] = args.max_steps
            job.pop("judge_steps", None)
        about = {key: job[key] for key in ("student", "seq_len", "init_from", "labels", "max_steps",
                                           "t_min", "lr", "seed") if key in job}
        job["batch_size"] = job["batch_size"] * shared["seq_len"] // job["seq_len"]
        job["key"] = " ".join(f"{key}={value}" for key, value in about.items())
        job["about"] = about
        job["folder"] = f"{args.out_dir}/{name}"
        job["train_files"], job["val_files"] = args.train_files, args.val_files
    lengths = {job["seq_len"]: job for job in reversed(jobs)}    # the first of each length
    real = [dict(job, student="real", key=f"real seq_len={length}", about=dict(seq_len=length),
                 labels="data", init_from="scratch") for length, job in lengths.items()]
    return real + list({job["key"]: job for job in jobs}.values())          # each once


def config_of(job, **more):
    fields = {field.name for field in dataclasses.fields(Config)}
    given = {key: value for key, value in job.items() if key in fields}
    return gd.resolve(Config(**{"dtype": "float32", "compile": False, **given, **more}))


@functools.cache
def text_of(*settings):
    """The data of these settings, in the order of TEXT_FIELDS, and its known words and pairs. A
    process reads them once."""
    data = load_data(gd.resolve(Config(**dict(zip(TEXT_FIELDS, settings)))))
    return data, training_words(data)


def share(items, known):
    """The share of the items that are known; 0 if there is none, as in texts of one letter."""
    return sum(item in known for item in items) / max(1, len(items))


def ar_model(job, kind):
    """Train the "teacher" or the "judge" of the texts of this length. What is there is kept."""
    folder = f"{job['folder']}/{kind}-{job['seq_len']}"
    start = dict(init_from="scratch", labels="data")
    steps = job.get(f"{kind}_steps", job["teacher_steps"])
    cfg = config_of({**job, **start}, max_steps=steps, seed=AR_SEEDS[kind], out_dir=folder)
    with quiet(folder):
        gd.get_teacher(cfg, load_data(cfg))


@contextlib.contextmanager
def quiet(folder):
    """What is printed goes to log.txt in the folder."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.txt", "a") as f, contextlib.redirect_stdout(f):
        yield


@torch.no_grad()
def train_and_write(job, n):
    """Train one student, and score n of its texts for each number of steps and each draw. Returns
    rows, dicts. With "real" in place of a student: real text, the teacher's, and floors."""
    teacher_path, judge_path = (f"{job['folder']}/{kind}-{job['seq_len']}/teacher.pt"
                                for kind in ("teacher", "judge"))
    out = f"{job['folder']}/{job['key'].replace(' ', ',')}"
    cfg = config_of(job, teacher=teacher_path, out_dir=out)
    data, known = text_of(*[job.get(key) for key in TEXT_FIELDS])
    teacher = gd.get_teacher(cfg, data)
    judge, _, _ = gd.load_model(judge_path, cfg.device)
    T = cfg.seq_len
    real = data.val_rows(10**9)
    reference = teacher_features(real[::2][:n].to(cfg.device), judge)

    def scored(x, **about):
        totals, counts = teacher_nll(x, judge)
        features = teacher_features(x, judge)
        x = x.cpu()
        words = [words_of(data.tokenizer.decode(row)) for row in x]
        pairs = [pair for text in words for pair in pairs_of(text)]
        words = sum(words, [])
        return {**job["about"], **about, "n": len(x), "entropy": token_entropy(x),
                "judge_nll": float(totals.sum() / counts.sum()),
                "words": share(words, known[0]), "pairs": share(pairs, known[1]),
                "energy": energy_distance(features, reference)[0],
                "rep_4": float(rep_n(x).mean()),
                "text": [data.tokenizer.decode(row) for row in x[:10]]}

    if job["student"] == "real":
        rows = [scored(real[1::2][:n].to(cfg.device), student="real text")]
        rows.append(scored(gd.generate(teacher, n, T, cfg.seed), student="teacher", nfe=T))
        for name, x in floors(data, n, 0).items():
            rows.append(scored(x.to(cfg.device), student=name))
        return rows
    with quiet(out), torch.enable_grad():
        torch.manual_seed(cfg.seed)
        student = gd.new_student(cfg, job["student"], teacher.vocab_size)
        texts = gd.teacher_data(teacher, data, cfg) if cfg.labels == "teacher" else data
        student = gd.train_student(student, cfg, teacher, texts)
    log = read_rows(f"{out}/log.jsonl")
    about = dict(val=log[-1]["val"], seconds=log[-1]["seconds"])
    rows = []
    steps, draws = job.get("nfe", [1, 2, 4, 16]), job.get("draws", DRAWS)
    for nfe, (tau, temperature, top_p) in itertools.product(steps, draws):
        if tau == 1 or student.reads_noise or top_p < 1:
            draw = dict(nfe=nfe, tau=tau, temperature=temperature, top_p=top_p)
            x = gd.generate(student, n, T, cfg.seed, **draw)
            rows.append(scored(x, **about, **draw))
    shutil.rmtree(out)                                          # its rows are all that is kept
    return rows


def train_all(name, args):
    """Train what is missing of a table; a line of the file for each row, as it comes."""
    jobs = jobs_of(name, args)
    path = f"{args.out_dir}/{name}.jsonl"
    os.makedirs(args.out_dir, exist_ok=True)
    done = {row["key"] for row in read_rows(path)}
    load_data(config_of(jobs[0]))                               # the token cache is made once
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        first = [pool.submit(ar_model, job, kind) for job in jobs if job["student"] == "real"
                 for kind in AR_SEEDS]
        for running in first:
            running.result()
        running = {pool.submit(train_and_write, job, args.n): job["key"] for job in jobs
                   if job["key"] not in done}
        for finished in as_completed(running):
            key = running[finished]
            if finished.exception():
                print(f"{name}: {key} failed: {finished.exception()!r}", flush=True)
                continue
            add_rows(path, finished.result(), key)
            print(f"{name}: {key} done", flush=True)


def add_rows(path, rows, key):
    """Append the rows of one run, whose key they get."""
    lines = [json.dumps(dict(row, key=key)) + "\n" for row in rows]
    with open(path, "a") as f:
        f.write("".join(lines))


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


# -----------------------------------------------------------------------------
# Tables
SCORES = ["judge_nll", "words", "pairs", "energy", "rep_4"]
SHOWN = {"student": "", "nfe": "d", "entropy": ".2f", "judge_nll": ".3f", "words": ".3f",
         "pairs": ".3f", "energy": ".3f", "rep_4": ".3f", "seeds": "d", "val": ".3f"}


def at_entropy(rows, entropy):
    """The scores of a student at this entropy, between its two nearest temperatures; or None."""
    rows = sorted(rows, key=lambda row: row["entropy"])
    entropies = [row["entropy"] for row in rows]
    if not entropies[0] <= entropy <= entropies[-1]:
        return None
    return [float(np.interp(entropy, entropies, [row[score] for row in rows])) for score in SCORES]


def mean_rows(curves, entropy, **about):
    """One line of the table from the curves (lists of rows) of all seeds, with NAME_se, that is
    here the standard deviation over the seeds."""
    values = np.array([at_entropy(curve, entropy) for curve in curves])    # (seeds, scores)
    val = np.mean([curve[0]["val"] for curve in curves])
    line = dict(about, entropy=entropy, seeds=len(curves), val=val)
    for score, column in zip(SCORES, values.T):
        line[score] = column.mean()
        if len(curves) > 1:
            line[score + "_se"] = column.std(ddof=1)
    return line


def show(name, args):
    """Print, for each setting and number of steps, all students at one entropy: that of real text,
    or --entropy, or the highest that all reach, where that is less."""
    rows = read_rows(f"{args.out_dir}/{name}.jsonl")
    real = {row["seq_len"]: row for row in rows if row["student"] == "real text"}
    for row in rows:
        if "tau" not in row:
            print("seq_len {seq_len}: {student:24} entropy {entropy:.2f}, judge {judge_nll:.3f}, "
                  "words {words:.3f}, pairs {pairs:.3f}, energy {energy:.3f}, rep_4 {rep_4:.3f}"
                  .format(**row))
    settings = {}                                               # setting -> student -> seed -> rows
    for row in rows:
        if row.get("tau") == 1 and row["top_p"] == 1:
            about = {name: row[name] for name in ("seq_len", "max_steps", "t_min", "lr")
                     if name in row}
            names = [row[name] for name in ("student", "init_from", "labels") if name in row]
            students = settings.setdefault((tuple(about.items()), row["nfe"]), {})
            seeds = students.setdefault(", ".join(names), {})
            seeds.setdefault(row.get("seed", 0), []).append(row)
    for (labels, nfe), students in settings.items():
        curves = {student: list(seeds.values()) for student, seeds in students.items()}
        every = [curve for of_one in curves.values() for curve in of_one]
        entropy = min(max(row["entropy"] for row in curve) for curve in every)
        length = dict(labels).get("seq_len", next(iter(real), None))
        if length in real:
            entropy = min(entropy, args.entropy or real[length]["entropy"])
        print(f"\n{', '.join(f'{key} {value}' for key, value in labels)}, {nfe} steps")
        lines = [mean_rows(of_one, entropy, student=student, nfe=nfe)
                 for student, of_one in curves.items()
                 if all(at_entropy(curve, entropy) for curve in of_one)]
        if lines:
            print_table(lines, SHOWN)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--train-files", help="the text, as of gumbel_distill.py")
    parser.add_argument("--val-files")
    parser.add_argument("--out-dir", default="out/tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="students at once")
    parser.add_argument("-n", type=int, default=500, help="texts of each row")
    parser.add_argument("--max-steps", type=int, help="fewer steps for all, to try the program")
    parser.add_argument("--entropy", type=float, help="with --show: compare at this entropy, in "
                        "place of that of real text")
    parser.add_argument("--show", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    if not args.show:
        if not args.train_files:
            raise UserError(f"{args.table}: name the text with --train-files")
        train_all(args.table, args)
    show(args.table, args)


if __name__ == "__main__":
    run_cli(main)
