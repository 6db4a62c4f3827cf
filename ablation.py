"""The paper's ablation and its baselines on the maze, in one table.

    python ablation.py                        # 32 students, 50 minutes of one core
    python ablation.py --out-dir out/other

Every run is one of gumbel_distill.py. RUNS says in which settings, students and loss it differs
from the default run. To ask a question of your own, add a line there: what is finished is not
trained again.
"""

import contextlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, Parser, add_flags, print_table, resolve, run_cli
from data import load_data
from gumbel_distill import Student, evaluate, get_teacher, load_model, prepare, q_sample, run
from gumbel_distill import sample_gumbel, student_loss, train_student
from sample import compare_exact

NOISES = ["gaussian", "uniform", "independent"]
RUNS = {  # what differs from the default settings, and the number of seeds
    "default": ({}, 3),
    "token-level KD": (dict(students=["mdlm"]), 3),
    "the teacher's texts": (dict(labels="teacher"), 3),         # mdlm: sequence-level KD
    **{f"{noise} noise": (dict(students=[noise, f"{noise}-draft"]), 1) for noise in NOISES},
    "blocks of 5": (dict(block_size=5, nfe=[2, 6]), 1),
    "blocks of 2": (dict(block_size=2, nfe=[5, 10]), 1),
    "blocks of 1": (dict(block_size=1, nfe=[10]), 1),
}
FIELDS = ("n_layer n_head n_embd batch_size max_steps lr warmup eval_every n_samples device dtype "
          "compile out_dir").split()
ABLATION_COLUMNS = {"run": "", "model": "", "seeds": "d", "nfe": ".3g", "valid": ".1%",
                    "valid_sd": ".1%", "tv": ".3f", "tv_sd": ".3f", "distinct": ".3g",
                    "agree_seq": ".3f", "agree_seq_sd": ".3f"}


# -----------------------------------------------------------------------------
# Other noise, and another loss
class OtherNoise(Student):
    """The student gumbel or gumbel-draft that reads other noise, as its name says:
    gaussian, uniform   the noise of the text, sent through its CDF to N(0,1) or U(0,1)
    independent         Gumbel noise that knows nothing of the text, a control
    In the released code the Gaussian variant is independent, and the uniform one trains on Gumbel
    noise. With the ending -draft the noise is added to the student's own guess.
    """

    def forward(self, xt, xi=None, x0=None):
        """As Student.forward; xi (M, V) is Gumbel noise."""
        if xi is not None:
            xi = change_noise(xi, self.name.removesuffix("-draft"))
        return super().forward(xt, xi, x0)


def change_noise(xi, kind):
    """Gumbel noise as it is or, sent through its CDF, "uniform" U(0,1) or "gaussian" N(0,1)."""
    if kind not in ("uniform", "gaussian"):
        return xi
    z = torch.exp(-torch.exp(-xi.double()))                     # the CDF; float64 resolves its ends
    if kind == "gaussian":
        z = torch.special.ndtri(z.clamp(1e-300, 1 - 1e-16))
    return z.to(xi.dtype)


def other_loss(student, teacher, x0, t, generator, xi=None):
    """student_loss of OtherNoise: the independent student gets fresh noise, not that of the text.
    """
    if student.name.startswith("independent"):
        xi = sample_gumbel((*x0.shape, student.vocab_size), generator)
        teacher = None
    return student_loss(student, teacher, x0, t, generator, xi)


def kd_loss(teacher):
    """Token-level knowledge distillation, for MDLM: student_loss with the teacher's probabilities
    p(. | x0[:i]) in place of x0_i."""
    def loss(student, _, x0, t, generator, xi=None):
        t = t.expand_as(x0)                                     # (B, T)
        xt = q_sample(x0, t, student.mask_id, generator)
        is_masked = xt == student.mask_id                       # M of them True
        with torch.no_grad():
            target = teacher(x0, is_masked).exp()               # (M, V)
        nll = F.cross_entropy(student(xt), target, reduction="none")       # (M,)
        return (nll / t[is_masked]).sum() / x0.numel()
    return loss


# -----------------------------------------------------------------------------
# Runs
def run_other(cfg):
    """A run as gumbel_distill.run, with OtherNoise or, for MDLM, with kd_loss."""
    cfg, data = prepare(cfg)
    teacher = get_teacher(cfg, data)
    students = []
    for kind in cfg.students:
        torch.manual_seed(cfg.seed)
        student, loss = OtherNoise(cfg, kind, teacher.vocab_size), other_loss
        if kind == "mdlm":
            student, loss = Student(cfg, kind, teacher.vocab_size), kd_loss(teacher)
        students.append(train_student(student, cfg, teacher, data, loss))
    return evaluate(teacher, students, data, cfg)


def run_alone(name, cfg, n_threads):
    """The rows of one run. What the run prints goes to log.txt in its folder."""
    torch.set_num_threads(n_threads)
    os.makedirs(cfg.out_dir, exist_ok=True)
    is_other = name == "token-level KD" or name.endswith(" noise")
    with open(f"{cfg.out_dir}/log.txt", "a") as f, contextlib.redirect_stdout(f):
        rows = run_other(cfg) if is_other else run(cfg)
    plain = ("mdlm", "bd3lm")                                   # these draw at temperature 1
    rows = [r for r in rows if r.get("temperature") == float(r["model"] in plain)]
    if name == "default":
        rows += verified_rows(cfg)
    return rows


def verified_rows(cfg):
    """Rows of adaptive parallel decoding (R = 0.5) and of exact mode, for each student."""
    cfg, rows = resolve(cfg), []
    judge = load_data(cfg).judge
    teacher, _, _ = load_model(f"{cfg.out_dir}/teacher.pt", cfg.device)
    for student in cfg.students:
        model, _, _ = load_model(f"{cfg.out_dir}/{student}.pt", cfg.device)
        for mode, ratio in (("APD", 0.5), ("exact mode", 0.0)):
            x, report = compare_exact(model, teacher, cfg.n_samples, cfg.seq_len, cfg.seed, None,
                                      ratio)
            rows.append({"model": f"{student}, {mode}", "nfe": 2 * report["rounds"],
                         **judge(x)})
    return rows


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    args = add_flags(parser, *FIELDS, out_dir="out/ablation").parse_args()
    jobs = {}                                                   # (name, seed): settings
    for name, (change, n_seeds) in RUNS.items():
        for seed in range(n_seeds):
            out = f"{args.out_dir}/{seed}/{name.replace(' ', '-')}"
            teacher = None if name == "default" else f"{args.out_dir}/{seed}/default/teacher.pt"
            given = dict(vars(args), seed=seed, out_dir=out, teacher=teacher, nfe=[1, 3])
            jobs[name, seed] = Config(**{**given, **change})
            resolve(jobs[name, seed])                           # bad settings end here, untrained
    done = {}                                                   # (name, seed): rows
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for is_first in (True, False):                          # the default runs train teachers
            wave = [key for key in jobs if (key[0] == "default") == is_first]
            n_threads = max(1, os.cpu_count() // max(1, len(wave)))
            running = {key: pool.submit(run_alone, key[0], jobs[key], n_threads) for key in wave}
            for key in wave:
                done[key] = running[key].result()
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
    print_table(table, ABLATION_COLUMNS)


if __name__ == "__main__":
    run_cli(main)
