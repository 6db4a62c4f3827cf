"""The paper's ablation and its baselines on the maze, in one table.

    python ablation.py                        # 30 students, an hour on two cores
    python ablation.py --out-dir out/other

Every run is one of gumbel_distill.py, whose settings differ from the default ones in what RUNS
says. To ask a question of your own, add a line there: what is finished is not trained again.
"""

import argparse
import contextlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from config import Config, add_flags, print_table, resolve, run_cli
from data import load_data
from gumbel_distill import load_model, run
from sample import compare_exact

OTHER_NOISE = ["gaussian", "gaussian-draft", "uniform", "uniform-draft", "independent",
               "independent-draft"]
RUNS = {  # what differs from the default settings, and the number of seeds
    "default": ({}, 3),
    "token-level KD": (dict(students=["mdlm"], loss="kd"), 3),
    "the teacher's texts": (dict(labels="teacher"), 3),         # mdlm: sequence-level KD
    "other noise": (dict(students=OTHER_NOISE), 1),
    "blocks of 5": (dict(block_size=5), 1),
    "blocks of 2": (dict(block_size=2), 1),
    "blocks of 1": (dict(block_size=1), 1),
}
FLAGS = "n_layer n_head n_embd batch_size max_steps lr warmup eval_every n_samples out_dir".split()
COLUMNS = {"run": "", "model": "", "seeds": "d", "nfe": ".3g", "valid": ".1%", "valid_sd": ".1%",
           "tv": ".3f", "tv_sd": ".3f", "distinct": ".3g", "agree_seq": ".3f",
           "agree_seq_sd": ".3f"}


def run_alone(name, cfg):
    """The rows of one run, on one core. What the run prints goes to log.txt in its folder."""
    torch.set_num_threads(1)
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open(f"{cfg.out_dir}/log.txt", "a") as f, contextlib.redirect_stdout(f):
        rows = run(cfg)
    plain = ("mdlm", "bd3lm")                                   # these draw at temperature 1
    rows = [r for r in rows if r.get("temperature") == float(r["model"] in plain)]
    if name == "default":
        rows += verified_rows(cfg)
    return rows


def verified_rows(cfg):
    """Rows of adaptive parallel decoding (R = 0.5) and of exact mode, for each student."""
    cfg, rows = resolve(cfg), []
    teacher, _, _ = load_model(f"{cfg.out_dir}/teacher.pt", cfg.device)
    for student in cfg.students:
        model, _, _ = load_model(f"{cfg.out_dir}/{student}.pt", cfg.device)
        for mode, ratio in (("APD", 0.5), ("exact mode", 0.0)):
            x, report = compare_exact(model, teacher, cfg.n_samples, cfg.seq_len, cfg.seed, None,
                                      ratio)
            rows.append({"model": f"{student}, {mode}", "nfe": 2 * report["rounds"],
                         **load_data(cfg).judge(x)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = add_flags(parser, *FLAGS, out_dir="out/ablation").parse_args()
    jobs = {}                                                   # (name, seed): settings
    for name, (change, n_seeds) in RUNS.items():
        for seed in range(n_seeds):
            out = f"{args.out_dir}/{seed}/{name.replace(' ', '-')}"
            teacher = None if name == "default" else f"{args.out_dir}/{seed}/default/teacher.pt"
            given = dict(vars(args), seed=seed, out_dir=out, teacher=teacher, nfe=[1, 3], **change)
            jobs[name, seed] = Config(**given)
            resolve(jobs[name, seed])                           # bad settings end here, untrained
    done = {}                                                   # (name, seed): rows
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for is_first in (True, False):                          # the default runs train teachers
            wave = [key for key in jobs if (key[0] == "default") == is_first]
            for key, rows in zip(wave, pool.map(run_alone, [key[0] for key in wave],
                                                [jobs[key] for key in wave])):
                done[key] = rows
                print(f"{jobs[key].out_dir} done", flush=True)
    table = []
    for name, (_, n_seeds) in RUNS.items():
        for same in zip(*[done[name, seed] for seed in range(n_seeds)]):   # a row of each seed
            table.append(dict(run=name, model=same[0]["model"], seeds=n_seeds))
            for column in ("nfe", "valid", "tv", "distinct", "agree_seq"):
                values = [row[column] for row in same if column in row]
                if values:
                    table[-1][column] = float(np.mean(values))
                if len(values) > 1:
                    table[-1][column + "_sd"] = float(np.std(values, ddof=1))
    with open(f"{args.out_dir}/ablation.json", "w") as f:
        json.dump(table, f, indent=1)
    print_table(table, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
