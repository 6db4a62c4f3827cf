"""The paper's ablation and its baselines, as a table of runs.

    python ablation.py                          # 22 students learn the maze, one process a core
    python ablation.py --seed 1 --only serial   # one of the runs, with another seed

To ask a question of your own, add a line to RUNS. What is finished is not trained again.
"""

import copy
import dataclasses
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from filelock import FileLock, Timeout

import gumbel_distill as gd
from blocks import BLOCK_STUDENTS
from couplings import COUPLINGS
from drafts import DraftStudent
from exact import compare_exact


class TokenKDStudent(gd.Student):
    """Token-level distillation: MDLM learns the teacher's p(. | x0[:i]) in place of x0[i]."""

    def loss(self, x0, t, generator, teacher):
        xt = gd.q_sample(x0, t, self.mask_id, generator)
        is_masked = xt == self.mask_id                          # M of them True
        with torch.no_grad():
            p = teacher.logp(teacher.hidden(x0)[is_masked]).exp()          # (M, V)
        nll = torch.nn.functional.cross_entropy(self(xt), p, reduction="none")             # (M,)
        return (nll / t.expand_as(x0)[is_masked]).sum() / x0.numel()


def teacher_texts(data, teacher, n, path):
    """`data` with n texts of the teacher to train on. They are written once, and kept at `path`.
    MDLM learns from them by sequence-level distillation, a student with noise by serial extraction:
    given its text, the noise that the teacher wrote with has the law of posterior_gumbel."""
    own = copy.copy(data)
    own.fingerprint = f"{n} texts of teacher {gd.fingerprint(teacher)}, {data.fingerprint}"
    saved = torch.load(path, weights_only=True) if os.path.exists(path) else {}
    if saved.get("fingerprint") != own.fingerprint:             # of another teacher or number
        seed = gd.rng("texts of the teacher").initial_seed()    # not those of the table
        texts = gd.generate(teacher, n, data.val.size(1), seed).cpu()      # (n, T)
        saved = dict(fingerprint=own.fingerprint, texts=texts)
        torch.save(saved, path + ".tmp")
        os.replace(path + ".tmp", path)                         # whole, or not at all
    own.n_train, own.rows = n, saved["texts"].__getitem__
    return own


NOISE_STUDENTS = {"gumbel": gd.GumbelStudent, "gumbel-draft": DraftStudent}
RUNS = {  # the students, and the settings that are other than those of the command line
    "default": ({"mdlm": gd.Student, **NOISE_STUDENTS}, {}),    # also in exact mode and with APD
    "token-kd": ({"mdlm": TokenKDStudent}, {}),
    "sequence-kd": ({"mdlm": gd.Student}, {}),                  # on the teacher's texts
    "serial": (NOISE_STUDENTS, {}),                             # on the teacher's texts
    "couplings": (COUPLINGS, {}),
    "blocks-5": (BLOCK_STUDENTS, dict(block_size=5, nfe=[2, 6])),
    "blocks-2": (BLOCK_STUDENTS, dict(block_size=2, nfe=[5, 10])),
    "blocks-1": (BLOCK_STUDENTS, dict(block_size=1, nfe=[10])),
}


@dataclasses.dataclass
class AblationConfig(gd.Config):
    out_dir: str = gd.option("out/ablation", "folder of all runs, with one inside for each seed")
    only: str = gd.option((), "which runs (all)", nargs="+", choices=list(RUNS))
    students: str = gd.option((), "the same as --only", nargs="+")


def prepare(cfg):
    """The data, the teacher, and the data with its texts. What is there is only read."""
    data = cfg.load()
    torch.manual_seed(cfg.seed)
    teacher = gd.Teacher(cfg, data.vocab_size, data.bos_id, data.pretrained)
    teacher = gd.train("teacher", teacher, data, cfg, cfg.teacher_steps)
    n = cfg.max_steps * cfg.batch_size                          # a student reads each about once
    return data, teacher, teacher_texts(data, teacher, n, f"{cfg.out_dir}/teacher.texts")


def train_one(run, name, cfg):
    """The rows of one student of a run, in a process of its own with one thread."""
    torch.set_num_threads(1)
    data, teacher, own_texts = prepare(cfg)
    cfg = copy.copy(cfg)
    vars(cfg).update(RUNS[run][1], out_dir=f"{cfg.out_dir}/{run}")
    os.makedirs(cfg.out_dir, exist_ok=True)
    torch.manual_seed(cfg.seed)
    student = RUNS[run][0][name](cfg, data.vocab_size)
    to_learn = own_texts if run in ("sequence-kd", "serial") else data
    student = gd.train(name, student, to_learn, cfg, cfg.max_steps, teacher)
    rows = gd.evaluate(teacher, {name: student}, data, cfg)[2:]
    for mode, R in [("APD", 0.5), ("exact", 0.0)] if run == "default" else []:
        x, report = compare_exact(student, teacher, cfg.n_samples, cfg.seq_len, cfg.seed, ratio=R)
        row = dict(run=mode, model=name, nfe=2 * report["rounds"], **data.judge(x))
        rows.append(dict(row, teacher_nll=gd.mean_loss(teacher, x, cfg)))
    return [{"run": run, **row} for row in rows]


def main(words=None):
    cfg = gd.parse(RUNS, AblationConfig, words)
    if cfg.init_from != "scratch":
        raise gd.UserError(f"--init-from {cfg.init_from}: here all students start from scratch")
    cfg.out_dir = f"{cfg.out_dir}/{cfg.seed}"
    os.makedirs(cfg.out_dir, exist_ok=True)
    lock = FileLock(f"{cfg.out_dir}/.lock0")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise gd.UserError(f"{cfg.out_dir}: another run writes there; use another --out-dir")
    data, teacher, _ = prepare(cfg)
    table = [dict(run="", **row) for row in gd.evaluate(teacher, {}, data, cfg)]
    runs = cfg.only or cfg.students
    jobs = [(run, name, cfg) for run in runs for name in RUNS[run][0]]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for rows in pool.map(train_one, *zip(*jobs)):
            table += rows
    name = "ablation" if runs == list(RUNS) else "-".join(runs)
    with open(f"{cfg.out_dir}/{name}.tmp", "w") as f:
        json.dump(table, f, indent=1)
    os.replace(f"{cfg.out_dir}/{name}.tmp", f"{cfg.out_dir}/{name}.json")
    gd.print_table(table)


if __name__ == "__main__":
    main()
