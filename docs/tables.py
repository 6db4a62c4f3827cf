"""The tables of docs/text.md: train students, let them write, and score the texts.

    python docs/tables.py stories --train-files tinystories.txt     # beginnings and budgets
    python docs/tables.py lengths --train-files tinystories.txt     # where does the noise pay?
    python docs/tables.py news --train-files 'lm1b/*' --val-files 'lm1b/*-0000[0-3]-of-*'
    python docs/tables.py stories --show                            # the tables of what is there

Each line of out/tables/NAME.jsonl is one student at one setting of the sampler. A run that was
stopped goes on with the students that are missing. Two AR models are trained first: the teacher,
and a judge with another seed, whose perplexity no student has learned from. To ask a question of
your own, add a table to TABLES.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gumbel_distill as gd  # noqa: E402
from ablation import teacher_texts  # noqa: E402
from blocks import BlockConfig  # noqa: E402
from judge import Judge, config_from, floors, probe  # noqa: E402
from sample import MODELS, nucleus  # noqa: E402
from shifted import SHIFTED_STUDENTS  # noqa: E402

AR_SEEDS = {"teacher": 0, "judge": 1000}
# How all students write: at each of these (tau, temperature, top_p). MDLM reads no noise, so tau is
# 1 for it. The last is the official draw.
DRAWS = [(1.0, temperature, 1.0) for temperature in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)]
DRAWS += [(0.7, 0.0, 1.0), (0.85, 0.0, 1.0), (0.85, 1.0, 0.9)]

# A table: settings that all runs share, and lists of those in which they differ. student is a name
# of sample.MODELS; labels says whose texts it learns from; nfe and draws, how it writes. The step
# of a shorter text has more texts, so as many tokens.
STUDENTS = ["mdlm", "gumbel", "gumbel-draft"]
STARTS, LABELS = ["scratch", "teacher"], ["data", "teacher"]
STORIES = dict(dataset="tinystories", seq_len=64, batch_size=32, teacher_steps=2000, compile=False,
               init_from="teacher", labels="data", max_steps=1000, nfe=[1, 2, 4, 8], draws=DRAWS)
SMALL = dict(STORIES, n_embd=64, n_head=2, max_steps=1200, nfe=[1, 2, 4],
             draws=[draw for draw in DRAWS if draw[1] != 0.3 and draw[2] == 1])
NEWS = dict(STORIES, dataset="lm1b", tokenizer="gpt2-4096", seq_len=32, n_layer=4, n_head=4,
            n_embd=128, dropout=0.0, batch_size=256, lr=2e-3, warmup=100, ema=0.999, compile=True,
            teacher_steps=2500, judge_steps=1000, nfe=[1, 2, 4, 16])
CARD = dict(NEWS, tokenizer="gpt2", seq_len=128, n_layer=6, n_head=8, n_embd=512, batch_size=128,
            lr=1e-3, teacher_steps=2000, judge_steps=2000, max_steps=2000,
            draws=[draw for draw in DRAWS if draw[1] >= 0.5])
BEGINNINGS = [dict(init_from=STARTS, max_steps=[500], seed=[0, 1, 2]),
              dict(init_from=STARTS, max_steps=[2000], seed=[0])]
TABLES = {
    "stories": (dict(STORIES, nfe=[1, 2, 4, 16]), BEGINNINGS),
    "letters": (dict(STORIES, dataset="text", nfe=[1, 4, 16]), BEGINNINGS),
    "lengths": (STORIES, [dict(seq_len=[16], labels=LABELS, seed=[0, 1, 2]),
                          dict(seq_len=[64, 32], labels=LABELS, seed=[0])]),
    "news": (NEWS, [dict(init_from=STARTS, max_steps=[2500], seed=[0]),
                    dict(student=["mdlm", "gumbel"], max_steps=[800], seed=[0, 1, 2])]),
    "card": (CARD, [dict(init_from=STARTS, seed=[0])]),
    # one block: the block students write the whole text in a step, too
    "readers": (dict(SMALL, block_size=16, labels="teacher"), [
        dict(student=["mdlm", "gumbel-draft", "bd3lm-shifted"], seq_len=[16], seed=[0, 1, 2]),
        dict(student=["gumbel", "linear", "one-uniform", "one-sorted"], seq_len=[16], seed=[0]),
        dict(student=["mdlm", "bd3lm-shifted"], seq_len=[64], block_size=[64], nfe=[[1, 4, 16]],
             seed=[0])]),
    "blocks": (dict(SMALL, nfe=[16, 32]), [
        dict(student=list(SHIFTED_STUDENTS), block_size=[4], labels=LABELS, seed=[0, 1, 2]),
        *(dict(student=["bd3lm", "bd3lm-shifted"], block_size=[size], nfe=[nfe],
               labels=["teacher"], seed=[0]) for size, nfe in ((2, [32]), (8, [8, 16]))),
        dict(student=["mdlm"], block_size=[4], labels=["teacher"], seed=[0])]),   # no blocks
    "blocks-news": (dict(SMALL, dataset="lm1b", tokenizer="gpt2-4096", seq_len=32, batch_size=64,
                         block_size=4, labels="teacher", nfe=[8, 16]),
                    [dict(student=["bd3lm", "bd3lm-shifted"], seed=[0])]),
}
ABOUT = "student seq_len block_size init_from labels max_steps seed".split()    # what names a run


def jobs_of(name, args):
    """The settings of all runs of a table: key -> dict. The first ones score real text in place of
    a student's, one for each length."""
    shared, groups = TABLES[name]
    shared = dict(shared, folder=f"{args.out_dir}/{name}", train_files=args.train_files,
                  val_files=args.val_files)
    real, jobs = {}, {}
    for group in groups:
        group = {"student": STUDENTS, **group}
        for values in itertools.product(*group.values()):
            job = {**shared, **dict(zip(group, values))}
            if args.max_steps:
                job.update(dict.fromkeys([f"{kind}_steps" for kind in ("max", *AR_SEEDS)],
                                         args.max_steps))
            job["batch_size"] = job["batch_size"] * shared["seq_len"] // job["seq_len"]
            jobs[",".join(f"{key}={job[key]}" for key in ABOUT if key in job)] = job
            real[f"real,seq_len={job['seq_len']}"] = dict(job, student="real")
    return {**real, **jobs}


def config(job, **more):
    return config_from(job, BlockConfig if "block_size" in job else gd.Config, **more)


def train(name, model, data, cfg, steps, teacher=None):
    """gd.train, whose words go to log.txt in the folder of the run."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open(f"{cfg.out_dir}/log.txt", "a") as f:
        with contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            return gd.train(name, model, data, cfg, steps, teacher)


TOOLS = {}                          # what a process has made, by folder and length


def tools(job, n):
    """The data of a job, its teacher, and a Judge whose AR model no student has learned from."""
    key = job["folder"], job["seq_len"]
    if key not in TOOLS:
        data, models = config(job).load(), []
        for kind, seed in AR_SEEDS.items():                     # those that are there are only read
            cfg = config(job, seed=seed, out_dir=f"{key[0]}/{kind}-{key[1]}")
            torch.manual_seed(seed)
            model = gd.Teacher(cfg, data.vocab_size, data.bos_id)
            steps = job.get(f"{kind}_steps", job["teacher_steps"])
            models.append(train("teacher", model, data, cfg, steps))
        real = data.val[::2][:n].to(cfg.device)
        TOOLS[key] = data, models[0], Judge(data, real, models[1], with_mauve=False)
    return TOOLS[key]


def new_student(job, cfg, data, teacher):
    """The trained student of a job."""
    torch.manual_seed(cfg.seed)
    student = MODELS[job["student"]](cfg, data.vocab_size)
    if cfg.init_from == "teacher":
        student.load_state_dict(teacher.state_dict(), strict=False)
    if job["labels"] == "teacher":
        n = min(data.n_train // cfg.seq_len, cfg.max_steps * cfg.batch_size)
        os.makedirs(cfg.out_dir, exist_ok=True)
        data = teacher_texts(data, teacher, n, f"{cfg.out_dir}/teacher.texts")
    return train(job["student"], student, data, cfg, cfg.max_steps, teacher)


def rows_of(key, job, n):
    """Train one student, and score n of its texts for each number of steps and each draw: rows,
    dicts. With "real" in place of a student: real text, the teacher's, and floors."""
    data, teacher, judge = tools(job, n)
    T, device, rows = job["seq_len"], next(teacher.parameters()).device, []
    about = dict(seq_len=T)

    def add(x, **more):
        row = {"key": key, "n": n, **about, **more, **judge.scores(x.to(device), key)}
        row["judge_nll"] = math.log(row["gen_ppl"])
        row["text"] = [judge.tokenizer.decode(ids) for ids in x[:10].tolist()]
        rows.append(row)

    if job["student"] == "real":
        texts = {"real text": data.val[1::2][:n], "teacher": gd.generate(teacher, n, T)}
        for name, x in {**texts, **floors(data, n, seed=0)}.items():
            add(x, student=name)
        return rows
    cfg = config(job, out_dir=f"{job['folder']}/{key}")
    student = new_student(job, cfg, data, teacher)
    saved = torch.load(f"{cfg.out_dir}/{job['student']}.pt", weights_only=True)
    about = {name: job[name] for name in ABOUT if name in job}
    about["val"] = saved["log"][-1][-1]
    about.update(probe(student, teacher, n) if student.reads_noise else {})
    for nfe, (tau, temperature, top_p) in itertools.product(job["nfe"], job["draws"]):
        if tau == 1 or student.reads_noise or top_p < 1:
            student.draw = partial(nucleus, temperature=temperature, top_p=top_p)
            x = gd.generate(student, n, T, cfg.seed, nfe, tau=tau)
            add(x, nfe=nfe, tau=tau, temperature=temperature, top_p=top_p)
    shutil.rmtree(cfg.out_dir)                                  # its rows are all that is kept
    return rows


def train_all(jobs, path, args):
    """Train what is missing of a table; a line of the file for each row, as it comes."""
    done = {row["key"] for row in read_rows(path)}
    config(next(iter(jobs.values()))).load()                    # the token cache is made once
    real = {key: job for key, job in jobs.items() if job["student"] == "real"}
    missing = {key: job for key, job in jobs.items() if key not in {*real, *done}}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for wave in (real, missing):                            # real text trains the AR models
            running = {pool.submit(rows_of, key, job, args.n): key for key, job in wave.items()}
            for finished in as_completed(running):
                key, error = running[finished], finished.exception()
                if error and wave is real:
                    raise error
                if key not in done and not error:
                    with open(path, "a") as f:
                        f.write("".join(json.dumps(row) + "\n" for row in finished.result()))
                print(f"{key} " + (f"failed: {error!r}" if error else "done"), flush=True)


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


# --- Tables ---------------------------------------------------------------------------------------
SCORES = ["judge_nll", "words", "pairs", "energy", "rep_4", "val", "gain", "cross_gain"]


def at_entropy(rows, entropy):
    """The scores of one model at this entropy, a dict, linear between the two nearest of its rows;
    None where they do not reach it. A model writes duller text at a lower temperature, and its
    perplexity falls: so models are compared at one entropy."""
    rows = sorted(rows, key=lambda row: row["entropy"])
    if not rows[0]["entropy"] <= entropy <= rows[-1]["entropy"]:
        return None
    above = sum(row["entropy"] < entropy for row in rows)       # the first row at it or above
    pair = rows[max(0, above - 1):above + 1]
    entropies = [row["entropy"] for row in pair]
    return {name: float(np.interp(entropy, entropies, [row[name] for row in pair]))
            for name in SCORES if all(name in row for row in pair)}


def line_of(student, curves, entropy):
    """A line of a table from the curves (lists of rows) of all seeds, with the standard deviation
    over the seeds. It is empty where one of them does not reach the entropy."""
    scores = [at_entropy(curve, entropy) for curve in curves]
    line = dict(seeds=len(curves), **dict.fromkeys(SCORES, ""), student="  " + student)
    for name in SCORES if None not in scores else ():
        values = [of_seed[name] for of_seed in scores if name in of_seed]
        if values:
            line[name] = f"{np.mean(values):.3f}"
        if len(values) > 1:
            line[name] += f" ± {np.std(values, ddof=1):.3f}"
    return line


def show(rows, wanted=None):
    """Print, for each setting and number of steps, all students at one entropy: `wanted`, or that
    of real text; or the highest that all reach, where that is less."""
    real = {row["seq_len"]: row["entropy"] for row in rows if row["student"] == "real text"}
    names = ["seq_len", "entropy", *SCORES[:5], "student"]
    plain = [row for row in rows if "nfe" not in row]
    gd.print_table([{name: row.get(name, "") for name in names} for row in plain])
    tables = {}                                                 # setting: student: seed: rows
    for row in rows:
        # with tau below 1 at temperature 0 a curve goes on to lower entropies
        if row.get("top_p") == 1 and (row["tau"] == 1 or row["temperature"] == 0):
            setting = tuple((name, row[name]) for name in ("seq_len", "block_size", "max_steps",
                                                           "nfe") if name in row)
            student = f"{row['student']}, start {row['init_from']}, labels {row['labels']}"
            seeds = tables.setdefault(setting, {}).setdefault(student, {})
            seeds.setdefault(row["seed"], []).append(row)
    for setting, students in tables.items():
        reached = [max(row["entropy"] for row in curve)
                   for seeds in students.values() for curve in seeds.values()]
        entropy = min(wanted or real[dict(setting)["seq_len"]], *reached)
        print("\n" + ", ".join(f"{name} {value}" for name, value in setting),
              f"at entropy {entropy:.2f}")
        gd.print_table([line_of(student, list(seeds.values()), entropy)
                        for student, seeds in students.items()])


def draw_cross_gains(path):
    """The picture of docs/text.md, from cross_gain.csv: quality in one step against cross gain, a
    point a student, a panel a data set."""
    import matplotlib.pyplot as plt
    with open(Path(__file__).parent / "cross_gain.csv") as f:
        rows = list(csv.DictReader(f))
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    _, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for ax, panel in zip(axes, panels):
        for row in rows:
            if row["panel"] == panel:
                x, y, score = float(row["cross_gain"]), float(row["quality"]), row["score"]
                ax.errorbar(x, y, xerr=float(row["cross_gain_se"]), fmt="o", color="tab:blue")
                ax.annotate(row["student"], (x, y), (0, 6), textcoords="offset points", fontsize=8,
                            ha="center")
        ax.set(xlabel="cross gain, nats", ylabel=score, title=panel)
        ax.margins(0.25)
    plt.savefig(path, dpi=110)


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=TABLES, nargs="?")
    parser.add_argument("--train-files", default="", help="the text, as of gumbel_distill.py")
    parser.add_argument("--val-files", default="")
    parser.add_argument("--out-dir", default="out/tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="students at once")
    parser.add_argument("-n", type=int, default=500, help="texts of each row")
    parser.add_argument("--max-steps", type=int, help="fewer steps for all, to try the program")
    parser.add_argument("--entropy", type=float, help="compare at this one, not that of real text")
    parser.add_argument("--show", action="store_true", help="print the tables of what is there")
    parser.add_argument("--picture", help="write the picture of cross gains there, nothing else")
    args = parser.parse_args(words)
    if args.picture:
        return draw_cross_gains(args.picture)
    if args.table is None:
        parser.error(f"name a table: {' '.join(TABLES)}")
    path = f"{args.out_dir}/{args.table}.jsonl"
    if args.show and not os.path.exists(path):
        parser.error(f"{path} is not there: run without --show")
    if not args.show:
        os.makedirs(args.out_dir, exist_ok=True)
        train_all(jobs_of(args.table, args), path, args)
    show(read_rows(path), args.entropy)


if __name__ == "__main__":
    main()
