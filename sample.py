"""Sample from trained models, and judge what they write.

    python sample.py                                       # the newest student under out/
    python sample.py --ckpt out/maze/student-gumbel.pt --nfe 3 -n 4
    python sample.py --prompt "To be, ____" --show-steps   # each _ is one token to fill in
    python sample.py --exact -n 1000                       # the teacher's own texts, drafted
    python sample.py --apd 0.5                             # drafted, and verified less strictly
    python sample.py --ckpt A.pt B.pt --eval --nfe 1,4,16 --judge teacher --featurizer teacher
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from gumbel_distill import (COLUMNS, Config, Teacher, Tokenizer, UserError, add_flags,
                            compare_exact, compare_with_teacher, default_temperatures, flag,
                            generate, load_checkpoint, load_data, load_student, load_teacher,
                            load_weights, numbers, print_table, resolve, rng, run_cli,
                            sampling_batches, show, stratified_time, student_loss, token_entropy,
                            weights_id)
from text import load_transformers

FLAGS = ("teacher nfe tau temperature top_p order apd lookahead seed device batch_size train_files "
         "val_files out_dir").split()


# -----------------------------------------------------------------------------
# Models and prompts

def newest_student():
    paths = glob.glob("out/**/student-*.pt", recursive=True)
    if not paths:
        raise UserError("no student under out/: train one with `python gumbel_distill.py`, or name "
                        "one with --ckpt")
    return max(paths, key=os.path.getmtime)


def load_model(path, device):
    """A Student or Teacher, its Tokenizer and what its checkpoint holds."""
    saved = load_checkpoint(path, "student", "teacher")
    if saved["kind"] == "student":
        return *load_student(saved, device), saved
    tokenizer = Tokenizer(**saved["tokenizer"])
    teacher = load_weights(Teacher(Config(**saved["config"]), tokenizer), saved, device)
    return teacher, tokenizer, saved


def teacher_of(path, saved, given, tokenizer, cfg):
    """The teacher named by --teacher, or the one the student was trained with."""
    path = (given or saved["config"]["teacher"]
            or os.path.join(os.path.dirname(path), "teacher.pt"))
    teacher = load_teacher(path, tokenizer, cfg.seq_len, cfg.device)
    if saved["kind"] == "student" and weights_id(teacher) != saved["settings"].get("teacher"):
        print(f"note: {path} is not this student's teacher", file=sys.stderr)
    return teacher


def prompt_ids(prompt, tokenizer, seq_len):
    """Token ids (T,) long of the prompt, vocab_size where a token is to be filled in.

    That is so for each _ and for all after the prompt. GPT-2's tokens begin with their space, so
    one before a gap belongs to what fills the gap.
    """
    ids = []
    for piece, gap in re.findall(r"([^_]*)(_*)", prompt):
        if gap and tokenizer.words is None:
            piece = piece.rstrip(" ")
        ids += tokenizer.encode(piece, "--prompt").tolist() + [tokenizer.vocab_size] * len(gap)
    if len(ids) > seq_len:
        raise UserError(f"--prompt has {len(ids)} tokens, gaps included, the model only {seq_len}; "
                        "shorten it")
    known = torch.full((seq_len,), tokenizer.vocab_size)
    known[:len(ids)] = torch.tensor(ids, dtype=torch.long)
    if not (known == tokenizer.vocab_size).any():
        raise UserError(f"--prompt {prompt!r} is a whole text of {seq_len} tokens, nothing is left "
                        "to fill in; shorten it, or put _ in place of tokens")
    return known


def print_steps(steps, tokenizer, seq_len):
    """The unmasking of one text: _ where nothing stands yet, on a terminal green what is new."""
    before = torch.full((seq_len,), tokenizer.vocab_size)
    for number, row in enumerate(steps, 1):
        words = ["_" if i == tokenizer.vocab_size else tokenizer.decode([i]) for i in row.tolist()]
        if sys.stdout.isatty():
            is_new = (row != before).tolist()
            words = [f"\033[32m{w}\033[0m" if new else w for w, new in zip(words, is_new)]
        print(f"step {number}: " + tokenizer.sep.join(words))
        before = row
    print()


def verified(student, teacher, n, seq_len, seed, known, ratio, lookahead):
    """Run exact mode or APD, print what it cost beside serial decoding; returns the texts."""
    x, report = compare_exact(student, teacher, n, seq_len, seed, known, ratio, lookahead)
    rounds, serial = report["rounds"], (known == teacher.vocab_size).sum().item()
    name = f"APD, R = {ratio:g}" if ratio else "exact mode"
    print(f"{name:15} {rounds:.2f} rounds per text: {rounds:.2f} student + {rounds:.2f} "
          f"teacher calls, {report['seconds']:.2f} s for {n} texts")
    if not ratio:
        _, alone = compare_exact(None, teacher, n, seq_len, seed, known)
        print(f"no student      {alone['rounds']:.2f} rounds per text: {alone['rounds']:.2f} "
              f"teacher calls, {alone['seconds']:.2f} s")
    print(f"serial teacher  {serial} calls per text, {report['serial_seconds']:.2f} s")
    print(f"speed-up        {serial / (2 * rounds):.2f}x in calls of both models, "
          f"{report['serial_seconds'] / report['seconds']:.2f}x in time")
    print(f"equal to serial {round(report['equal'] * n)} of {n} texts ({report['near_ties']} of "
          "them but for a near-tie, which float32 rounds either way)\n")
    return x


# -----------------------------------------------------------------------------
# Judges: generative perplexity, MAUVE, distinct-n

OWN_MODEL = "the word teacher: our own AR model"


@torch.no_grad()
def hf_nll(texts, model, tokenizer, device="cpu"):
    """Sum of -log p in nats, and number of tokens scored, of texts under a transformers model.

    Texts are tokenised anew for the judge. The first token of a text and ends of text are not
    scored; what is longer than the judge can read is read in windows that overlap by half, each
    token scored once, with at least half a window before it.
    """
    longest = getattr(model.config, "max_position_embeddings", 1024)
    total, count = 0.0, 0
    model.to(device)
    for text in tqdm(texts, desc="judge", disable=None, leave=False):
        text = text.replace("<|endoftext|>", tokenizer.eos_token or "")
        ids = torch.tensor(tokenizer.encode(text), device=device)
        done = 1                                                # tokens before are scored, or first
        for start in range(0, len(ids), max(1, longest // 2)):
            window = ids[start:start + longest]
            if start + len(window) <= done:
                continue
            logp = model(window[None]).logits[0, :-1].float().log_softmax(dim=-1)
            nll = -logp.gather(-1, window[1:, None])[done - start - 1:, 0]
            is_scored = window[done - start:] != tokenizer.eos_token_id
            total += nll[is_scored].sum().item()
            count += is_scored.sum().item()
            done = start + len(window)
    return total, count


@torch.no_grad()
def teacher_nll(x, teacher):
    """The same of token ids x (N, T) under our own AR model, without tokenising anew."""
    total, count = 0.0, 0
    for index in sampling_batches(len(x), x.size(1), teacher.vocab_size):
        rows = x[index]
        nll = -teacher(rows).gather(-1, rows[..., None])[:, 1:, 0]
        is_scored = rows[:, 1:] != teacher.bos_id
        total += nll[is_scored].sum().item()
        count += is_scored.sum().item()
    return total, count


@torch.no_grad()
def teacher_features(x, teacher):
    """Last hidden state after the whole text, (N, C) float32, of our own AR model."""
    features = []
    for rows in x.split(256):
        ids = torch.cat([torch.full_like(rows[:, :1], teacher.bos_id), rows], dim=1)
        features.append(teacher.net(teacher.net.embed(ids))[:, -1].float().cpu())
    return torch.cat(features).numpy()


def text_features(texts, name, max_tokens):
    """The same by mauve-text's own featuriser, a model of transformers."""
    load_transformers(name, "--featurizer", OWN_MODEL)
    from mauve.compute_mauve import get_features_from_input
    device = 0 if torch.cuda.is_available() else -1
    return get_features_from_input(None, None, texts, name, max_tokens, device, "texts", 16)


@contextlib.contextmanager
def quiet_stderr():
    """faiss, below mauve-text, warns of few points in C++, five lines a score; we warn once."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def mauve(p, q, seeds=range(25, 30)):
    """MAUVE (Pillutla et al. 2021) of features p, q (n, d): mean and spread over k-means seeds.

    Raises: ValueError where features are degenerate: the library answers 0.75 then
    """
    for name, f in (("generated", p), ("reference", q)):
        n_distinct = len(np.unique(np.round(f, 5), axis=0))
        if not np.isfinite(f).all() or n_distinct < max(5, len(f) // 20):
            raise ValueError(f"only {n_distinct} of {len(f)} {name} features are distinct")
    from mauve import compute_mauve
    with quiet_stderr():
        scores = [compute_mauve(p_features=p, q_features=q, seed=seed).mauve for seed in seeds]
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


@torch.no_grad()
def nelbo(student, x0, n_draws=20):
    """MDLM's or BD3-LM's bound on -log p of texts x0 (N, T), nats per token, for noise none.

    Returns: its mean over n_draws of times and masks, and the standard error of that. In blocks of
    one token it is -log p itself, at t = 1 and without any error.
    """
    n, means = x0.size(1) // student.block_size, []
    if student.block_size == 1:
        n_draws = 1
    for draw in range(n_draws):
        g = rng("nelbo", draw)
        strata = torch.randperm(len(x0) * n, generator=g).view(len(x0), n)
        t = stratified_time(strata, len(x0) * n, torch.rand(len(x0), n, generator=g))
        t = torch.ones_like(t) if student.block_size == 1 else t
        parts = zip(x0.split(256), t.to(x0.device).split(256))
        means.append(sum(student_loss(student, None, rows, times, ("nelbo", draw, i)).item()
                         * len(rows) for i, (rows, times) in enumerate(parts)) / len(x0))
    error = np.std(means, ddof=1) / n_draws**0.5 if n_draws > 1 else 0.0
    return float(np.mean(means)), float(error)


def distinct_n(x, n):
    """Share of different n-grams among all of token ids x (N, T)."""
    grams = x.unfold(1, n, 1).reshape(-1, n)
    return len(grams.unique(dim=0)) / len(grams)


# -----------------------------------------------------------------------------
# Evaluation: one row for each checkpoint and setting

EVAL_COLUMNS = {"model": "", "nfe": "d", "tau": "g", "temperature": "g", "gen_ppl": ".2f",
                "mauve": ".3f", "mauve_sd": ".3f", "nelbo": ".4f", "nelbo_se": ".4f",
                "distinct_1": ".3f", "distinct_2": ".3f", "samples_s": ".1f"}


class Evaluation:
    """The judges, the references and the rows that are done, of one table."""

    def __init__(self, args, cfg, tokenizer, teacher, data):
        self.args, self.cfg, self.tokenizer, self.teacher = args, cfg, tokenizer, teacher
        self.data, self.path = data, os.path.join(cfg.out_dir, "results.json")
        self.judge = None if args.judge == "teacher" else load_transformers(
            args.judge, "--judge", OWN_MODEL)
        rows = data.val_rows(2 * args.n_samples).to(cfg.device)
        self.n = min(args.n_samples, len(rows) // 2)
        if self.n < args.n_samples:
            print(f"warning: the validation text yields {len(rows)} texts: MAUVE compares {self.n} "
                  f"with {self.n}, not {args.n_samples}", file=sys.stderr)
        if self.n < 1000 or cfg.seq_len < 32:
            print(f"warning: {self.n} texts of {cfg.seq_len} tokens are few for MAUVE; compare "
                  "scores of this table only, and with the ceiling", file=sys.stderr)
        self.references, self.others = rows[:self.n], rows[self.n:2 * self.n]
        self.text_id = hashlib.sha1(rows.cpu().numpy().tobytes()).hexdigest()
        self.reference_features = self.features(self.references)
        os.makedirs(cfg.out_dir, exist_ok=True)
        self.rows, self.bounds = {}, {}
        if os.path.exists(self.path):
            with open(self.path) as f:
                self.rows = {row["key"]: row for row in json.load(f)}

    def decode(self, x):
        return [self.tokenizer.decode(row) for row in x.tolist()]

    def features(self, x):
        if self.args.featurizer == "teacher":
            return teacher_features(x, self.teacher)
        return text_features(self.decode(x), self.args.featurizer, self.cfg.seq_len)

    def add(self, make, student=None, **about):
        """The row of texts make(), computed unless it is there from an earlier call."""
        args = self.args
        key = hashlib.sha1(repr((sorted(about.items(), key=str), args.n_samples, self.cfg.seed,
                                 args.judge, args.featurizer, self.text_id,
                                 weights_id(self.teacher))).encode()).hexdigest()
        if key in self.rows:
            return self.rows[key]
        start = time.perf_counter()
        x = make()                                              # (N, T)
        row = dict(about)
        if "nfe" in about:
            row["samples_s"] = len(x) / (time.perf_counter() - start)
        total, count = (teacher_nll(x, self.teacher) if self.judge is None else
                        hf_nll(self.decode(x), *self.judge, device=self.cfg.device))
        row.update(gen_ppl=math.exp(total / max(1, count)), entropy=token_entropy(x),
                   distinct_1=distinct_n(x, 1), distinct_2=distinct_n(x, 2), **self.data.judge(x))
        try:
            row["mauve"], row["mauve_sd"] = mauve(self.features(x[:self.n]),
                                                  self.reference_features)
        except ValueError as e:
            print(f"warning: no MAUVE for {about}: {e}", file=sys.stderr)
        if student and student.noise == "none":
            if about["weights"] not in self.bounds:
                self.bounds[about["weights"]] = nelbo(student, self.references)
            row["nelbo"], row["nelbo_se"] = self.bounds[about["weights"]]
        if about.get("temperature") == 0 and about.get("tau") == 1:
            teacher_text = generate(self.teacher, len(x), self.cfg.seq_len, self.cfg.seed,
                                    batch_size=self.cfg.batch_size)
            scores = compare_with_teacher(x, teacher_text, self.teacher, self.cfg.seed)
            row.update({k: scores[k] for k in ("agree_token", "shuffled", "agree_seq", "accept")})
        self.rows[key] = {"key": key, **row}
        with open(self.path + ".tmp", "w") as f:
            json.dump(list(self.rows.values()), f, indent=1)
        os.replace(self.path + ".tmp", self.path)
        return self.rows[key]


def evaluate(paths, args, cfg):
    """Print and save the table, draw the picture; returns the rows."""
    models = [load_model(path, cfg.device) for path in paths]
    _, tokenizer, saved = models[0]
    for path, (_, other, there) in zip(paths, models):
        if other.state != tokenizer.state or there["config"]["seq_len"] != cfg.seq_len:
            raise UserError(f"{path}: {other.vocab_size} tokens of text, length "
                            f"{there['config']['seq_len']}, does not compare with {paths[0]}: "
                            f"{tokenizer.vocab_size}, {cfg.seq_len}; put them into two tables")
    teacher = next((m for m, _, _ in models if isinstance(m, Teacher)), None)
    teacher = teacher or teacher_of(paths[0], saved, args.teacher, tokenizer, cfg)
    data = load_data(cfg)
    if data.tokenizer.state != tokenizer.state:
        raise UserError(f"{paths[0]} knows other tokens than the text at hand; name the text that "
                        "it was trained on with --train-files and --val-files")
    table, n = Evaluation(args, cfg, tokenizer, teacher, data), args.n_samples
    common = dict(seed=cfg.seed, batch_size=cfg.batch_size)
    rows = [table.add(lambda: table.others, model="real text (ceiling)"),
            table.add(lambda: generate(teacher, n, cfg.seq_len, progress="teacher", **common),
                      model="teacher", nfe=cfg.seq_len, weights=weights_id(teacher))]
    for path, (model, _, _) in zip(paths, models):
        if isinstance(model, Teacher):
            continue
        name = os.path.join(os.path.basename(os.path.dirname(path)), model.name)
        taus = numbers(cfg, "tau") if model.noise != "none" else [1.0]
        temperatures = numbers(cfg, "temperature") or default_temperatures(model, cfg)[:1]
        for nfe, tau, temperature in itertools.product(numbers(cfg, "nfe"), taus, temperatures):
            settings = dict(nfe=nfe, tau=tau, temperature=temperature, top_p=cfg.top_p,
                            order=cfg.order)
            calls = model.nfe_of_text(nfe)
            rows.append(table.add(
                lambda: generate(model, n, cfg.seq_len, progress=f"{name}, nfe {calls}", **settings,
                                 **common),
                model, model=name, weights=weights_id(model), steps=nfe,
                **{**settings, "nfe": calls}))
    print_table(rows, {**EVAL_COLUMNS, **COLUMNS, "nfe": "d"})
    print(f"\n{table.path} written" + plot(rows, os.path.join(cfg.out_dir, "quality_vs_nfe.png")))
    return rows


def plot(rows, path):
    """Quality against NFE, a line for each student, the teacher dashed; returns what to print."""
    try:
        import matplotlib
    except ImportError:
        return "; no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
    panels = {"gen_ppl": "generative perplexity", "mauve": "MAUVE",
              "agree_token": "agreement with the teacher"}
    panels = {k: v for k, v in panels.items() if any(k in r for r in rows)}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False,
                                layout="constrained")
    lines = {}
    for row in rows[2:]:
        label = f"{row['model']}, tau {row['tau']:g}, temperature {row['temperature']:g}"
        lines.setdefault(label, []).append(row)
    for axis, (column, title) in zip(axes[0], panels.items()):
        for i, (label, line) in enumerate(lines.items()):
            points = sorted((r["nfe"], r[column]) for r in line if column in r)
            if points:
                axis.plot(*zip(*points), marker="osD^v<>"[i % 7], color=f"C{i}", label=label)
        for row, style in zip(rows[1::-1], ("--", ":")):
            if column in row and column != "agree_token":
                axis.axhline(row[column], color="black", linestyle=style, label=row["model"])
        axis.set(xscale="log", xlabel="function evaluations (NFE)", ylabel=title)
        axis.set_xticks(sorted({r["nfe"] for line in lines.values() for r in line}))
        if column == "gen_ppl":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        else:
            axis.set_ylim(0, 1.02)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter("")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f", {path} drawn"


# -----------------------------------------------------------------------------
# Command line

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", help="checkpoints (the newest student under out/)")
    parser.add_argument("-n", "--n-samples", type=int, metavar="int",
                        help="texts (4; with --eval 1000)")
    parser.add_argument("--length", type=int, metavar="int", help="tokens of a text (the model's "
                        "seq_len); students with --block-size may write longer ones")
    parser.add_argument("--prompt", default="", help="text to begin with; each _ is one token to "
                        "fill in")
    parser.add_argument("--exact", action="store_true", help="the student drafts, the teacher "
                        "verifies: what the teacher alone would write, in fewer calls")
    parser.add_argument("--show-steps", action="store_true", help="print how a text is unmasked")
    parser.add_argument("--out", help="write the texts to this file, one JSON object a line")
    parser.add_argument("--eval", action="store_true", help="judge the checkpoints: table, picture")
    parser.add_argument("--judge", default="gpt2-large", help="with --eval: whose perplexity; a "
                        "causal model of transformers, a folder, or teacher (gpt2-large)")
    parser.add_argument("--featurizer", default="gpt2-large", help="with --eval: whose features "
                        "MAUVE compares, likewise (gpt2-large)")
    add_flags(parser, *FLAGS, nfe="8", batch_size=1000, apd=None)
    args = parser.parse_args()
    paths = args.ckpt or [newest_student()]
    model, tokenizer, saved = load_model(paths[0], "cpu")
    n = args.n_samples = (1000 if args.eval else 4) if args.n_samples is None else args.n_samples
    given = {name: getattr(args, name) for name in FLAGS}
    given["out_dir"] = args.out_dir or "out/eval"
    for name in ("train_files", "val_files"):
        given[name] = given[name] or saved["config"][name]
    cfg = resolve(replace(Config(**saved["config"]), grad_accum=1, n_samples=n, **given))
    is_verified = args.exact or args.apd is not None
    if is_verified and args.show_steps:
        raise UserError("--show-steps shows the steps of a student that writes alone; leave it, or "
                        "--exact and --apd, out")
    if args.exact and args.apd is not None:
        raise UserError(f"--exact is --apd 0, not --apd {args.apd:g}; give one of them")
    if args.length is not None and args.length < 1:
        raise UserError(f"--length {args.length}: must be 1 or more")
    if args.eval:
        for name in ("prompt", "exact", "apd", "show_steps", "out", "length"):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"{flag(name)} does not go with --eval, which judges whole texts")
        evaluate(paths, args, cfg)
        return
    for name in ("nfe", "tau", "temperature"):
        if len(numbers(cfg, name)) > 1:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: give one number without --eval")
    if len(paths) > 1:
        raise UserError("--ckpt: give one checkpoint without --eval")
    model, seq_len = model.to(cfg.device), args.length or cfg.seq_len
    known = prompt_ids(args.prompt, tokenizer, seq_len).to(cfg.device)
    print(f"{paths[0]}: {model.name}, step {saved['step']}, {cfg.dataset}")
    settings = dict(tau=numbers(cfg, "tau")[0])
    if saved["kind"] == "student":
        settings.update(nfe=numbers(cfg, "nfe")[0], top_p=cfg.top_p, order=cfg.order,
                        temperature=default_temperatures(model, cfg)[0])
    is_open = known == tokenizer.vocab_size
    if is_verified:
        mode = "--exact" if args.exact else "--apd"
        if saved["kind"] == "teacher":
            raise UserError(f"{paths[0]}: holds a teacher, {mode} needs a student")
        if model.is_block or seq_len != cfg.seq_len:
            raise UserError(f"{mode}: the student must draft a whole text at once; use one trained "
                            "without --block-size, and no --length")
        if (numbers(cfg, "tau"), cfg.top_p, numbers(cfg, "temperature") or [0]) != ([1], 1, [0]):
            raise UserError(f"{mode} goes with --tau 1, --top-p 1 and --temperature 0: it reads "
                            "the noise as it is; leave these flags out")
        if (is_open[:-1] & ~is_open[1:]).any():
            raise UserError(f"{mode} with --prompt {args.prompt!r}: the teacher writes from left "
                            "to right, it cannot fill a gap; end the prompt before it")
        teacher = teacher_of(paths[0], saved, args.teacher, tokenizer, cfg)
        ratio, lookahead = (0.0, None) if args.exact else (cfg.apd, cfg.lookahead)
        x = verified(model, teacher, n, seq_len, cfg.seed, known, ratio, lookahead)
    else:
        block = torch.arange(seq_len, device=cfg.device) // getattr(model, "block_size", 1)
        if (block[~is_open] > block[is_open].min()).any():
            raise UserError(f"--prompt {args.prompt!r}: {paths[0]} writes from left to right and "
                            "does not see what comes after the gap; end the prompt before it, or "
                            "use a student without --block-size")
        steps = []
        try:
            if args.show_steps and saved["kind"] == "student":
                generate(model, 1, seq_len, cfg.seed, known, **settings,
                         on_step=lambda xt: steps.append(xt[0].cpu()))
                print_steps(steps, tokenizer, seq_len)
            x = generate(model, n, seq_len, cfg.seed, known, cfg.batch_size, "texts", **settings)
        except ValueError as e:
            raise UserError(f"--length {seq_len}: {e}; train with --block-size, or give another "
                            "length") from e
    if args.out:
        with open(args.out, "w") as f:
            for i, row in enumerate(x.tolist()):
                f.write(json.dumps(dict(index=i, seed=cfg.seed, text=tokenizer.decode(row), ids=row,
                                        **settings)) + "\n")
        print(f"{n} texts written to {args.out}")
        return
    if is_verified and n > 4:
        print(f"the first 4 of {n} texts:\n")
    for row in x[:4] if is_verified else x:
        print(show(row.cpu(), cfg.dataset, tokenizer) + "\n")


if __name__ == "__main__":
    run_cli(main)
