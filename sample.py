"""Sample from trained models, and judge what they write.

    python sample.py                                       # the newest student under out/
    python sample.py --ckpt out/maze/gumbel-draft.pt --nfe 3 -n 4
    python sample.py --prompt "To be, ____" --animate      # each _ is one token to fill in
    python sample.py --exact -n 1000                       # the teacher's own texts, drafted
    python sample.py --apd 0.5                             # drafted, and verified less strictly
    python sample.py --ckpt A.pt B.pt --eval --nfe 1 4 16 --judge teacher --featurizer teacher
"""

import argparse
import dataclasses
import glob
import itertools
import json
import math
import os
import re
import shutil
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from data import COLUMNS, MAZE, MAZE_SIZE, UserError, draw_maze, load_data, load_transformers
from data import maze_paths, print_table, run_cli, show, token_entropy
from gumbel_distill import Teacher, add_flags, compare_with_teacher, generate, load_model
from gumbel_distill import load_teacher, resolve, rng, sample, sampling_batches, scales
from gumbel_distill import sequence_noise, serial_extraction, stratified_times, student_loss
from gumbel_distill import weights_id

FLAGS = ("teacher nfe tau temperature top_p order seed device batch_size train_files val_files "
         "out_dir").split()


# -----------------------------------------------------------------------------
# Models and prompts
def newest_student():
    paths = [path for path in glob.glob("out/**/*.pt", recursive=True)
             if not path.endswith("teacher.pt")]
    if not paths:
        raise UserError("no student under out/: train one with `python gumbel_distill.py`, or name "
                        "one with --ckpt")
    return max(paths, key=os.path.getmtime)


def load_models(paths, cfg):
    """What load_model returns, for each path; all must have one kind of tokens and one length."""
    models = [load_model(path, cfg.device) for path in paths]
    for path, (_, tokenizer, saved) in zip(paths, models):
        if tokenizer.state != models[0][1].state or saved["config"].seq_len != cfg.seq_len:
            raise UserError(f"{path}: does not compare with {paths[0]}, which has other tokens or "
                            "another length; name one of them only")
    return models


def name_of(path, model):
    """The model's name after that of its folder: maze/gumbel."""
    return os.path.join(os.path.basename(os.path.dirname(os.path.abspath(path))), model.name)


def settings_of(model, cfg):
    """How `model` writes: the keyword arguments of `sample`. A teacher has tau only."""
    if isinstance(model, Teacher):
        return {"tau": cfg.tau[0]}
    temperature = cfg.temperature[0] if cfg.temperature else float(not model.noise)
    return dict(tau=cfg.tau[0], nfe=cfg.nfe[0], top_p=cfg.top_p, order=cfg.order,
                temperature=temperature)


def teacher_of(path, saved, tokenizer, cfg):
    """The teacher named by --teacher, or the one that the student at `path` learned from."""
    beside = os.path.join(os.path.dirname(path), "teacher.pt")
    name = cfg.teacher or saved["config"].teacher or beside
    teacher = load_teacher(name, tokenizer, cfg)
    if weights_id(teacher) != saved["settings"]["teacher"]:
        print(f"note: {name} is not this student's teacher", file=sys.stderr)
    return teacher


def prompt_ids(prompt, tokenizer, seq_len):
    """Token ids (T,) long of the prompt, vocab_size where a token is to be filled in.

    A token is to be filled in at each _ and after the prompt. A token of GPT-2 begins with its
    space, so the space before a gap belongs to what fills the gap.
    """
    ids = []
    for piece, gap in re.findall(r"([^_]*)(_*)", prompt):
        if tokenizer.words is None:
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


# -----------------------------------------------------------------------------
# Exact mode and adaptive parallel decoding: student and teacher share the noise
@torch.no_grad()
def draft_and_verify(student, teacher, xi, xt=None, ratio=0.0, on_round=None):
    """The student drafts, the teacher verifies: exact mode, or adaptive parallel decoding (APD).

    Each round drafts all masked tokens in one call of the student: argmax(s) with s = logp + xi, or
    s = the logits of a student that has read xi. One call of the teacher gives the answer
    argmax(ratio s + (1 - ratio) (logp_teacher + xi)) at all positions. An answer is valid if all
    tokens before it are right. So the prefix where draft and answer agree is kept, and the next
    token of the answer. The rest is masked again.

    ratio 0: exact mode. The text equals serial_extraction(teacher, xi), up to rounding, in fewer
    rounds. Without a student the teacher's last answer is the next draft (predictive sampling,
    Wiggers & Hoogeboom 2020). ratio above 0: APD (Israel et al. 2025).

    Args:    xi (B, T, V) Gumbel noise;  xt (B, T) known tokens, at the left only, mask_id = V after
             on_round: called after each round with the numbers (b,) of the texts that were open,
             draft and answer (b, T), and n_keep (b,), how many tokens of the answer stand now
    Returns: x0 (B, T) long;  rounds (B,) long, each one student and one teacher call
    """
    B, T, V = xi.shape
    x = torch.full((B, T), V, device=xi.device) if xt is None else xt.clone()
    if student is None:  # the first draft is the teacher's argmax text
        guess = serial_extraction(teacher, torch.zeros_like(xi[:1])).repeat(B, 1)          # (B, T)
    rounds = torch.zeros(B, dtype=torch.long, device=xi.device)
    live = (x == V).any(dim=1).nonzero()[:, 0]                  # numbers of the unfinished texts
    while len(live):
        draft, is_masked = x[live], x[live] == V                # (b, T)
        if student is None:
            draft[is_masked] = guess[live][is_masked]
        else:
            noise = xi[live][is_masked]                         # (M, V)
            score = student(draft, noise)                       # (M, V)
            if not student.noise:
                score = score + noise
            draft[is_masked] = score.argmax(dim=-1)
        target = teacher(draft) + xi[live]                      # (b, T, V)
        if ratio > 0:
            target[is_masked] = ratio * score + (1 - ratio) * target[is_masked]
        answer = target.argmax(dim=-1)                          # (b, T)
        agree = (draft == answer) | ~is_masked
        n_agree = agree.long().cumprod(dim=1).sum(dim=1)        # (b,) length of the agreeing prefix
        n_keep = (n_agree + 1).clamp(max=T)
        is_kept = torch.arange(T, device=x.device) < n_keep[:, None]
        x[live] = torch.where(is_kept, torch.where(is_masked, answer, draft), V)
        if student is None:
            guess[live] = answer
        if on_round:
            on_round(live, draft, answer, n_keep)
        rounds[live] += 1
        live = live[n_keep < T]
    return x, rounds


@torch.no_grad()
def compare_exact(student, teacher, n, seq_len, seed, known=None, ratio=0.0):
    """draft_and_verify beside serial decoding on the same noise.

    Returns: the texts (n, T), and a dict: rounds per text; equal, the share of texts equal to those
    of serial decoding; near_ties, how many of these differ, but only from where the teacher's two
    best tokens lie within 1e-4, which float32 rounds either way; seconds and serial_seconds
    """
    texts, sums = [], dict(rounds=0, equal=0, near_ties=0, seconds=0.0, serial_seconds=0.0)
    for index in sampling_batches(n, seq_len, teacher.vocab_size):
        xi, _ = sequence_noise(seed, index, seq_len, teacher)
        xt = None if known is None else known.expand(len(index), seq_len)
        start = time.perf_counter()
        x, rounds = draft_and_verify(student, teacher, xi, xt, ratio)
        sums["rounds"] += rounds.sum().item() / n               # .item() waits for a GPU
        sums["seconds"] += time.perf_counter() - start
        start = time.perf_counter()
        serial = serial_extraction(teacher, xi, xt)
        differs = x != serial                                   # (B, T)
        is_equal = ~differs.any(dim=1)                          # (B,)
        sums["equal"] += is_equal.sum().item() / n
        sums["serial_seconds"] += time.perf_counter() - start
        best = (teacher(serial) + xi).topk(2, dim=-1).values    # (B, T, 2)
        gap = best[..., 0] - best[..., 1]
        first = differs.long().argmax(dim=1, keepdim=True)      # where a text begins to differ
        is_tie = ~is_equal & (gap.gather(1, first)[:, 0] < 1e-4)
        sums["near_ties"] += is_tie.sum().item()
        sums["equal"] += is_tie.sum().item() / n
        texts.append(x)
    return torch.cat(texts), sums


def verified(student, teacher, n, seed, known, ratio):
    """Run exact mode or APD, and print what it cost beside serial decoding; returns the texts."""
    n_serial = (known == teacher.vocab_size).sum().item()
    x, report = compare_exact(student, teacher, n, len(known), seed, known, ratio)
    lines = [(f"APD, R = {ratio:g}" if ratio else "exact mode", 2 * report["rounds"], report)]
    if not ratio:
        _, alone = compare_exact(None, teacher, n, len(known), seed, known)
        lines.append(("no student", alone["rounds"], alone))
    lines.append(("serial teacher", n_serial, {"seconds": report["serial_seconds"]}))
    for name, calls, of in lines:
        rounds = f"{of['rounds']:.2f} rounds, " if "rounds" in of else ""
        print(f"{name:15} {rounds}{calls:.2f} calls per text, {of['seconds']:.2f} s for {n} texts")
    print(f"equal to serial {round(report['equal'] * n)} of {n} texts ({report['near_ties']} of "
          "them but for a near-tie, which float32 rounds either way)\n")
    return x


# -----------------------------------------------------------------------------
# Scores: generative perplexity, MAUVE, energy distance, repetition, NELBO
OWN_MODEL = "the word teacher: our own AR model"


@torch.no_grad()
def hf_nll(texts, model, tokenizer, device="cpu"):
    """Sum of -log p in nats, and number of tokens scored, of each text under a transformers model.

    Texts are tokenised anew for the judge. The first token of a text and ends of text are not
    scored. A text that is longer than the judge can read is read in windows that overlap by half.
    """
    longest = getattr(model.config, "max_position_embeddings", 1024)
    totals, counts = torch.zeros(len(texts)), torch.zeros(len(texts))
    model.to(device)
    for i, text in enumerate(tqdm(texts, desc="judge", disable=None, leave=False)):
        text = text.replace("<|endoftext|>", tokenizer.eos_token or "")
        ids = torch.tensor(tokenizer.encode(text), device=device)
        done = 1                                                # tokens before are scored, or first
        for start in range(0, len(ids), max(1, longest // 2)):
            window = ids[start:start + longest]
            n_old = done - start                                # of the window, scored before
            if n_old >= len(window):
                continue
            logp = model(window[None]).logits[0, :-1].float().log_softmax(dim=-1)
            nll = -logp.gather(-1, window[1:, None])[n_old - 1:, 0]
            is_scored = window[n_old:] != tokenizer.eos_token_id
            totals[i] += nll[is_scored].sum().item()
            counts[i] += is_scored.sum().item()
            done = start + len(window)
    return totals, counts


@torch.no_grad()
def teacher_nll(x, teacher):
    """The same of token ids x (N, T) under our own AR model, without tokenising anew."""
    totals, counts = [], []
    for index in sampling_batches(len(x), x.size(1), teacher.vocab_size):
        rows = x[index]
        nll = -teacher(rows).gather(-1, rows[..., None])[:, 1:, 0]
        is_scored = rows[:, 1:] != teacher.bos_id               # (b, T - 1)
        totals.append((nll * is_scored).sum(dim=1).cpu())
        counts.append(is_scored.sum(dim=1).cpu())
    return torch.cat(totals), torch.cat(counts)


@torch.no_grad()
def teacher_features(x, teacher):
    """Mean hidden state of each half of texts x (N, T) under our own AR model, (N, 2 C) float32.

    The last hidden state alone could not tell repeated text from real text (docs/results.md, LM1B).
    Here the two halves of repeated text are too much alike.
    """
    features = []
    for rows in x.split(256):
        ids = torch.cat([torch.full_like(rows[:, :1], teacher.bos_id), rows], dim=1)
        h = teacher.net(teacher.net.embed(ids))[:, 1:].float()  # (b, T, C): has read each token
        halves = h.tensor_split(2, dim=1)
        features.append(torch.cat([half.mean(dim=1) for half in halves], dim=1).cpu())
    return torch.cat(features).numpy()


def text_features(texts, name, max_tokens):
    """Last hidden state of each text, by mauve-text's own featuriser, a model of transformers."""
    load_transformers(name, "--featurizer", OWN_MODEL)
    from mauve.compute_mauve import get_features_from_input
    device = 0 if torch.cuda.is_available() else -1
    return get_features_from_input(None, None, texts, name, max_tokens, device, "texts", 16)


def mauve(p, q, seeds=range(25, 30)):
    """MAUVE (Pillutla et al. 2021) of features p, q (n, d), mean over the seeds of its k-means.

    Returns: MAUVE; its standard error, from as many draws of n rows of p with replacement
    Raises: ValueError where features are degenerate: the library answers 0.75 then
    """
    for name, f in (("generated", p), ("reference", q)):
        n_distinct = len(np.unique(np.round(f, 5), axis=0))
        if not np.isfinite(f).all() or n_distinct < max(5, len(f) // 20):
            raise ValueError(f"only {n_distinct} of {len(f)} {name} features are distinct")
    from mauve import compute_mauve
    stderr = os.dup(2)                                          # faiss warns of few points in C++
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        scores, redrawn = [], []
        for seed in seeds:
            rows = np.random.default_rng(seed).integers(len(p), size=len(p))
            scores.append(compute_mauve(p_features=p, q_features=q, seed=seed).mauve)
            redrawn.append(compute_mauve(p_features=p[rows], q_features=q, seed=seed).mauve)
    finally:
        os.dup2(stderr, 2)
    return float(np.mean(scores)), float(np.std(redrawn, ddof=1))


@torch.no_grad()
def nelbo(student, x0, n_draws=20):
    """MDLM's or BD3-LM's bound on -log p of texts x0 (N, T), nats per token, without noise.

    Returns: its mean over n_draws of times and masks, and the standard error of this mean. In
    blocks of one token the bound is -log p itself, at t = 1, without any error.
    """
    n, means = x0.size(1) // student.block_size, []
    if student.block_size == 1:
        n_draws = 1
    for draw in range(n_draws):
        g, total = rng("nelbo", draw, device=x0.device), 0.0
        for rows in x0.split(256):
            t = stratified_times(torch.rand(len(rows), n, generator=g, device=x0.device))
            if student.block_size == 1:
                t = torch.ones_like(t)
            order = torch.randperm(len(rows), generator=g, device=x0.device)
            total += student_loss(student, None, rows[order], t, g).item() * len(rows)
        means.append(total / len(x0))
    error = np.std(means, ddof=1) / n_draws**0.5 if n_draws > 1 else 0.0
    return float(np.mean(means)), float(error)


def rep_n(x, n=4):
    """Share of the n-grams of each text x (N, T) that stand in it before, (N,) (Rep-n)."""
    grams = x.unfold(1, n, 1)                                   # (N, T - n + 1, n)
    n_different = [len(of_one_text.unique(dim=0)) for of_one_text in grams]
    return 1 - torch.tensor(n_different) / grams.size(1)


def ngram_features(x, n_buckets=2048):
    """Counts of hashed 1-, 2- and 3-grams of texts x (N, T), each row of length 1: (N, n_buckets).
    They need no model. The square root keeps frequent tokens from deciding alone."""
    counts = torch.zeros(len(x), n_buckets)
    for n in range(1, min(3, x.size(1)) + 1):
        grams = x.cpu().unfold(1, n, 1)                         # (N, T - n + 1, n)
        bucket = (grams * torch.tensor([1, 7919, 104_729])[:n] + n).sum(dim=-1) % n_buckets
        counts.scatter_add_(1, bucket, torch.ones(bucket.shape))
    return torch.nn.functional.normalize(counts.sqrt(), dim=1).numpy()


def bootstrap(statistic, n, n_draws=200):
    """Standard error of statistic(weights): n texts are drawn anew from the n at hand, again and
    again, and weights (n,) says how often each was drawn."""
    draw = np.random.default_rng(0).multinomial
    return float(np.std([statistic(draw(n, np.full(n, 1 / n))) for _ in range(n_draws)], ddof=1))


def energy_distance(p, q):
    """Energy distance (Szekely and Rizzo 2013) of features p (n, d) and q (m, d), unbiased:
        2 E|P - Q| - E|P - P'| - E|Q - Q'|
    0 where both have one distribution (estimates may be negative), else above 0.
    Returns: the distance; its standard error, as the texts of p vary
    Raises: ValueError for fewer than 10 texts
    """
    p, q = torch.as_tensor(p, dtype=torch.double), torch.as_tensor(q, dtype=torch.double)
    n, m = len(p), len(q)
    if min(n, m) < 10:
        raise ValueError(f"only {min(n, m)} texts")
    to_q = torch.cdist(p, q).mean(dim=1).numpy()                # (n,)
    within_p = torch.cdist(p, p).numpy()                        # (n, n)
    within_q = torch.cdist(q, q).sum().item() / (m * (m - 1))

    def distance(weights):
        n_pairs = weights.sum()**2 - (weights**2).sum()         # pairs of two different texts
        return 2 * weights @ to_q / n - weights @ within_p @ weights / n_pairs - within_q
    return float(distance(np.ones(n))), bootstrap(distance, n)


def floors(data, n, seed):
    """Texts without a model, which a good score must put below real text: name -> (n, T) long
    (after arXiv 2606.08417). Each begins with real training text, or has its frequent tokens."""
    T = data.seq_len
    half = (T + 1) // 2
    counts = torch.from_numpy(data.train[:2**20].astype(np.int64)).bincount()
    best, token = counts.topk(min(T, int((counts > 0).sum())))
    drawn = torch.multinomial(best.double(), n * T, replacement=True, generator=rng(seed, "floor"))
    texts = {f"floor: unigram, top {len(token)}": token[drawn].view(n, T)}
    if data.n_train < n:
        print(f"warning: no floors 'periodic' and 'mirror': they begin with {n} different training "
              f"texts, and there are {data.n_train}", file=sys.stderr)
        return texts
    rows = np.random.default_rng(seed).choice(data.n_train, size=n, replace=False)
    start = data.rows(rows)[:, :half]
    texts[f"floor: periodic, {half} tokens"] = start.repeat(1, 2)[:, :T]
    texts[f"floor: mirror, {half} tokens"] = torch.cat([start, start.flip(1)], dim=1)[:, :T]
    return texts


# -----------------------------------------------------------------------------
# Evaluation: one row for each checkpoint and setting
EVAL_COLUMNS = {"model": "", "nfe": "d", "tau": "g", "temperature": "g", "gen_ppl": ".2f",
                "entropy": ".3f", "rep_4": ".3f", "mauve": ".3f", "energy": ".4f",
                "energy_ngrams": ".4f", "nelbo": ".4f", "samples_s": ".1f"}
LESS_IS_BETTER = {"gen_ppl": True, "mauve": False, "energy": True, "energy_ngrams": True,
                  "rep_4": True}


def judged(x, tokenizer, teacher, data, args, cfg):
    """The scores of texts x (N, T) that need no reference, as a dict, with standard errors."""
    if args.judge == "teacher":
        totals, counts = teacher_nll(x, teacher)
    else:
        judge = load_transformers(args.judge, "--judge", OWN_MODEL)
        totals, counts = hf_nll([tokenizer.decode(row) for row in x], *judge, device=cfg.device)
    totals, counts = totals.double().numpy(), counts.double().numpy()

    def perplexity(weights):
        return math.exp(weights @ totals / max(1, weights @ counts))
    scores = {"gen_ppl": perplexity(np.ones(len(x))), "gen_ppl_se": bootstrap(perplexity, len(x))}
    of_each = {"entropy": torch.tensor([token_entropy(row[None]) for row in x])}
    if x.size(1) >= 4:
        of_each["rep_4"] = rep_n(x)
    for name, values in of_each.items():
        scores[name] = values.double().mean().item()
        scores[name + "_se"] = values.double().std().item() / len(x)**0.5
    return {**scores, **data.judge(x)}


def features_of(x, tokenizer, teacher, args):
    if args.featurizer == "teacher":
        return teacher_features(x, teacher)
    return text_features([tokenizer.decode(row) for row in x], args.featurizer, x.size(1))


def evaluate(paths, args, cfg):
    """Print and save the table; returns the rows.

    The rows: real text against other real text (the ceiling), the teacher, each student with each
    setting of the sampler. results.json is written after each row.
    """
    models = load_models(paths, cfg)
    first, tokenizer, saved = models[0]
    data = load_data(cfg)
    if data.tokenizer.state != tokenizer.state:
        raise UserError(f"{paths[0]} knows other tokens than the text at hand; name the text that "
                        "it was trained on with --train-files and --val-files")
    names = [name_of(path, model) for path, (model, _, _) in zip(paths, models)]
    if len(set(names)) < len(names):
        raise UserError(f"--ckpt: two of {', '.join(names)} have one name, and the table could not "
                        "tell them apart; rename a folder")
    is_teacher = isinstance(first, Teacher)
    teacher = first if is_teacher else teacher_of(paths[0], saved, tokenizer, cfg)
    real = data.val_rows(2 * cfg.n_samples).to(cfg.device)
    n = len(real) // 2
    if n < 2:
        raise UserError(f"-n {cfg.n_samples}: the validation text has {len(real)} sequences of "
                        f"{cfg.seq_len} tokens for two sets of that many, at least 2 each")
    if n < 1000 or cfg.seq_len < 32:
        print(f"warning: {n} texts of {cfg.seq_len} tokens are few for MAUVE; compare scores of "
              "this table only, and with the ceiling", file=sys.stderr)
    reference = features_of(real[:n], tokenizer, teacher, args)
    teacher_text = generate(teacher, cfg.n_samples, cfg.seq_len, cfg.seed, None, cfg.batch_size,
                            "teacher")
    os.makedirs(cfg.out_dir, exist_ok=True)
    path, rows = os.path.join(cfg.out_dir, "results.json"), []

    def add(x, **about):
        rows.append({**about, **judged(x, tokenizer, teacher, data, args, cfg)})
        row = rows[-1]
        features = features_of(x[:n], tokenizer, teacher, args)
        ngrams = ngram_features(x[:n]), ngram_features(real[:n])
        for score, distance, given in [
                ("mauve", mauve, (features, reference)),
                ("energy", energy_distance, (features, reference)),
                ("energy_ngrams", energy_distance, ngrams)]:
            try:
                row[score], row[score + "_se"] = distance(*given)
            except ValueError as e:
                print(f"warning: no {score} for {about}: {e}", file=sys.stderr)
        if about.get("temperature") == 0 and about["tau"] == 1:  # the noise alone decided
            row.update(compare_with_teacher(x, teacher_text, teacher, cfg.seed))
        with open(path, "w") as f:
            json.dump(rows, f, indent=1)

    add(real[n:], model="real text (ceiling)")
    if args.floors:
        for name, x in floors(data, cfg.n_samples, cfg.seed).items():
            add(x.to(cfg.device), model=name)
    add(teacher_text, model="teacher", nfe=cfg.seq_len)
    for name, (model, _, _) in zip(names, models):
        if isinstance(model, Teacher):
            continue
        bound = {}
        if not model.noise:
            bound["nelbo"], bound["nelbo_se"] = nelbo(model, real[:n])
        for (tau, temperature), nfe in itertools.product(scales(model, cfg, [1.0]), cfg.nfe):
            settings = dict(tau=tau, temperature=temperature, top_p=cfg.top_p, order=cfg.order)
            start = time.perf_counter()
            x = generate(model, cfg.n_samples, cfg.seq_len, cfg.seed, None, cfg.batch_size,
                         f"{name}, {nfe} steps", nfe=nfe, **settings)
            x[-1, -1].item()                                    # waits for a GPU
            add(x, model=name, nfe=model.nfe_of_text(nfe), **settings, **bound,
                samples_s=len(x) / (time.perf_counter() - start))
    print_table(rows, {**EVAL_COLUMNS, **COLUMNS})
    print_fooled(rows)
    print_equal_entropy(at_equal_entropy(rows))
    print(f"\n{path} written; notebooks/classroom.py --judged {cfg.out_dir} draws it")
    return rows


def at_entropy(curve, column, entropy):
    """(score, standard error) of a curve at this entropy, linear between its two nearest rows. The
    rows stand by rising entropy. Of gen_ppl it is the logarithm. None beyond the curve's ends."""
    known = [row for row in curve if column in row]
    entropies = [row["entropy"] for row in known]
    if not known or not entropies[0] <= entropy <= entropies[-1]:
        return None
    scores = np.array([row[column] for row in known])
    errors = np.array([row[column + "_se"] for row in known])
    if column == "gen_ppl":
        scores, errors = np.log(scores), errors / scores
    return np.interp(entropy, entropies, scores), np.interp(entropy, entropies, errors)


def at_equal_entropy(rows):
    """A model writes duller text at a lower temperature or tau, and its perplexity falls. So two
    models with the same nfe are compared at one entropy, the highest that both reach.

    Returns: rows with, for each score NAME, the two scores NAME_1 and NAME_2 and NAME_z, by how
    many standard errors the first model is better. The errors are those of the scores as the texts
    vary; other training seeds would add to them
    """
    curves = {}
    for row in rows:
        if "tau" in row:
            curves.setdefault((row["nfe"], row["model"]), []).append(row)
    curves = {key: sorted(curve, key=lambda row: row["entropy"])
              for key, curve in curves.items() if len(curve) > 1}
    result = []
    for (key, first), (other_key, second) in itertools.combinations(sorted(curves.items()), 2):
        (nfe, model), (other_nfe, other) = key, other_key
        if nfe != other_nfe:
            continue
        entropy = min(first[-1]["entropy"], second[-1]["entropy"])
        if max(first[0]["entropy"], second[0]["entropy"]) > entropy:
            print(f"nfe {nfe}: {model} and {other} have no entropy in common")
            continue
        at = {"model": model, "against": other, "nfe": nfe, "entropy": entropy}
        for column, is_less_better in LESS_IS_BETTER.items():
            ours = at_entropy(first, column, entropy)
            theirs = at_entropy(second, column, entropy)
            if ours is None or theirs is None:
                continue
            better = theirs[0] - ours[0] if is_less_better else ours[0] - theirs[0]
            error = math.hypot(ours[1], theirs[1])
            at[column + "_z"] = better / error if error else 0.0
            for number, (score, _) in enumerate((ours, theirs), 1):
                at[f"{column}_{number}"] = math.exp(score) if column == "gen_ppl" else score
        result.append(at)
    return result


def print_equal_entropy(rows):
    """The table of at_equal_entropy; a cell has both scores and, in brackets, z."""
    if not rows:
        return
    lines = []
    for row in rows:
        lines.append({name: row[name] for name in ("model", "against", "nfe", "entropy")})
        for column in LESS_IS_BETTER:
            if column + "_z" in row:
                scores = [format(row[f"{column}_{i}"], EVAL_COLUMNS[column]) for i in (1, 2)]
                lines[-1][column] = "{}, {} ({:+.1f})".format(*scores, row[column + "_z"])
    print("\nAt equal entropy, between the nearest settings of the sampler. A cell has the scores "
          "of both and, in brackets,\nby how many standard errors the first model is better:")
    print_table(lines, {"model": "", "against": "", "nfe": "d", "entropy": ".3f",
                        **dict.fromkeys(LESS_IS_BETTER, "")})


def print_fooled(rows):
    """Name the columns that put text without a model above real text, the first row, by two
    standard errors."""
    for column, is_less_better in LESS_IS_BETTER.items():
        sign = 1 if is_less_better else -1
        for row in rows[1:]:
            if row["model"].startswith("floor") and column in row and column in rows[0]:
                error = math.hypot(row[column + "_se"], rows[0][column + "_se"])
                if sign * (rows[0][column] - row[column]) > 2 * error:
                    print(f"fooled: {column} is {row[column]:.4g} for {row['model']!r}, and "
                          f"{rows[0][column]:.4g} for real text")


# -----------------------------------------------------------------------------
# Films: how texts unmask, in the terminal or as a moving picture
LABELS = {"mdlm": "MDLM", "bd3lm": "BD3-LM", "gumbel": "paper's map",
          "gumbel-draft": "ours (drafts)", "teacher": "AR teacher"}
WIDTH = 76                          # letters of a line of text
# Colours that the colour-blind can tell apart, too (Okabe and Ito).
RED, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#999999"


@torch.no_grad()
def film(model, number, seed, known, **settings):
    """Text `number` of generate, step by step: a list of frames (T,). A frame has token ids, and
    mask_id where nothing stands yet. The first frame has the known tokens only."""
    steps = [known[None]]                                       # (1, T) each
    xi, u = sequence_noise(seed, torch.tensor([number]), len(known), model)
    if isinstance(model, Teacher):
        text = serial_extraction(model, settings["tau"] * xi, known[None])
        place = torch.arange(len(known), device=known.device)
        steps += [torch.where(place <= i, text, known) for i in range(len(known))]
    else:
        sample(model, xi, u, xt=known[None], on_step=steps.append, **settings)
    return [frame[0].cpu() for frame in steps]


def frames(films):
    """Frame after frame, of each film: (number, frame, frame before). A short film waits."""
    for number in range(max(map(len, films))):
        shown = []
        for film in films:
            k = min(number, len(film) - 1)
            shown.append((k, film[k], film[max(0, k - 1)]))
        yield shown


def lines_of(frame, before, tokenizer, width):
    """A frame as lines of at most `width` letters. A line is a list of (piece, kind). The kind is
    "masked", "new" or "old". A line break of the text is shown as an arrow."""
    lines, column = [[]], 0
    for i, id_before in zip(frame.tolist(), before.tolist()):
        kind = "old" if i == id_before else "new"
        if i == tokenizer.vocab_size:
            kind = "masked"
        piece = "_" if kind == "masked" else tokenizer.decode([i]).replace("\n", "\u21b5")
        piece += tokenizer.sep
        if column + len(piece) > width:
            lines.append([])
            column = 0
        lines[-1].append((piece, kind))
        column += len(piece)
    return lines


def panels(shown, names, tokenizer, is_maze, is_colour):
    """The lines of one frame of all films: mazes side by side, texts one below the other."""
    blocks = []
    for name, (number, frame, before) in zip(names, shown):
        block = [f"{LABELS.get(name, name)}, step {number}"]
        if is_maze:
            block += draw_maze(frame[frame != tokenizer.vocab_size]).split("\n")
        else:
            colour = {"new": "\033[32m{}\033[0m"} if is_colour else {}
            for line in lines_of(frame, before, tokenizer, WIDTH):
                block.append("".join(colour.get(kind, "{}").format(piece) for piece, kind in line))
            block.append("")
        blocks.append(block)
    if is_maze:
        return ["   ".join(line.ljust(len(MAZE[0])) for line in row) for row in zip(*blocks)]
    return sum(blocks, [])


def play(films, names, tokenizer, is_maze, pause=0.8):
    """Print films. On a terminal each frame takes the place of the last, if it fits; elsewhere the
    frames stand one below the other."""
    is_terminal = sys.stdout.isatty()
    columns, rows = shutil.get_terminal_size()
    n_lines = 0                                                 # of the frame on the screen
    for shown in frames(films):
        lines = panels(shown, names, tokenizer, is_maze, is_terminal)
        width = len(names) * (len(MAZE[0]) + 3) if is_maze else WIDTH
        fits = len(lines) < rows and width <= columns
        if n_lines:
            time.sleep(pause)
            print(f"\033[{n_lines}A\033[J", end="")             # up, and clear what is below
        n_lines = len(lines) if is_terminal and fits else 0
        print("\n".join(lines), flush=True)
    print()


def draw_walls(axis, title=""):
    """The walls of the maze, with S at the start and G at the goal."""
    n = MAZE_SIZE
    for row, line in enumerate(MAZE):
        y = row // 2
        for col in range(n + 1):
            if line[4 * col] == "|":
                axis.plot([col, col], [y, y + 1], color="black", lw=2)
        for col in range(n):
            if line[4 * col + 1] == "-":
                axis.plot([col, col + 1], [y, y], color="black", lw=2)
    axis.text(0.1, 0.38, "S", fontsize=8)
    axis.text(n - 0.4, n - 0.1, "G", fontsize=8)
    axis.set(xlim=(-0.1, n + 0.1), ylim=(n + 0.1, -0.1), aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def allowed_moves():
    """All moves (from, to) of the shortest paths, as a set of pairs of cells."""
    moves = set()
    for path in maze_paths():
        moves.update(zip([0, *path], path))
    return moves


def draw(path, axis, title=""):
    """Draw a path (10,) of cells. Masked cells are left out.

    A move that no shortest path makes is red and dotted.
    """
    draw_walls(axis, title)
    moves, mask_id = allowed_moves(), MAZE_SIZE**2
    cells = [0] + [int(cell) for cell in path]
    x = [cell % MAZE_SIZE + 0.5 for cell in cells]
    y = [cell // MAZE_SIZE + 0.5 for cell in cells]
    for i in range(len(cells) - 1):
        move = (cells[i], cells[i + 1])
        if mask_id in move:
            continue
        style = dict(color=RED, lw=2, ls=":")
        if move in moves:
            style = dict(color=BLUE, lw=3)
        axis.plot(x[i:i + 2], y[i:i + 2], solid_capstyle="round", **style)
    for i, cell in enumerate(cells):
        if cell != mask_id:
            axis.plot(x[i], y[i], "o", color="black", ms=4)


def draw_text(lines, axis, title, width, n_lines):
    """Lines of (piece, kind), on a grid for n_lines of `width` letters."""
    colours = {"masked": GREY, "new": GREEN, "old": "black"}
    axis.set(xlim=(0, width), ylim=(n_lines + 0.5, -0.5))
    axis.set_title(title, fontsize=10, loc="left")
    axis.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for piece, kind in line:
            axis.text(x, y, piece, color=colours[kind], family="monospace", fontsize=11, va="top",
                      parse_math=False)
            x += len(piece)


def write_gif(texts, names, tokenizer, is_maze, path, width=WIDTH):
    """An animated GIF that shows the films (one a model) of each of the texts, again and again.

    A frame stands for 0.7 seconds, the last one of a text three times as long. Needs matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.animation import PillowWriter
    except ImportError as e:
        raise UserError(f"--gif {path}: needs matplotlib; pip install matplotlib") from e
    plt.switch_backend("Agg")
    n = len(names)
    last_frames = [film[-1] for films in texts for film in films]
    n_lines = max(len(lines_of(frame, frame, tokenizer, width)) for frame in last_frames)
    n_rows, n_columns, size = n, 1, (0.096 * width, n * (0.5 + 0.2 * n_lines))
    if is_maze:  # side by side
        n_rows, n_columns, size = 1, n, (2.6 * n, 3.0)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False,
                                layout="constrained")
    writer = PillowWriter(fps=1 / 0.7)
    with writer.saving(figure, path, dpi=100):
        for films in texts:
            for shown in frames(films):
                for axis, name, (number, frame, before) in zip(axes.flat, names, shown):
                    axis.clear()
                    title = f"{LABELS.get(name, name)}, step {number}"
                    if is_maze:
                        draw(frame, axis, title)
                    else:
                        lines = lines_of(frame, before, tokenizer, width)
                        draw_text(lines, axis, title, width, n_lines)
                writer.grab_frame()
            for _ in range(2):
                writer.grab_frame()
    plt.close(figure)


# -----------------------------------------------------------------------------
# Command line
def check(args, cfg, model, path, known):
    """UserError for flags that do not go together, and for texts that `model` cannot write."""
    T, is_open, is_teacher = len(known), known == model.vocab_size, isinstance(model, Teacher)
    L, longest = (1, math.inf) if is_teacher else (model.block_size, model.seq_len)
    is_plain = (cfg.tau[0], cfg.top_p, (cfg.temperature or [0])[0]) == (1, 1, 0)
    is_verified = args.apd is not None
    block = torch.arange(T) // (1 if is_verified else L)        # the teacher decides one by one
    for is_wrong, message in [
            (args.ckpt and len(args.ckpt) > 1 and not (args.animate or args.gif),
             "--ckpt: give one checkpoint without --eval and --animate"),
            (is_verified and (args.animate or args.gif), "--animate shows how one model writes: "
             "leave --exact and --apd out"),
            (args.out and (args.animate or args.gif), f"--out {args.out}: is for texts; leave "
             "--animate and --gif out"),
            (args.gif and not args.gif.endswith(".gif"), f"--gif {args.gif}: must end in .gif"),
            (max(len(cfg.nfe), len(cfg.tau), len(cfg.temperature or [])) > 1,
             "--nfe, --tau, --temperature: give one number each without --eval"),
            (is_verified and not 0 <= args.apd <= 1, f"--apd {args.apd}: must lie between 0 and 1"),
            (is_verified and (is_teacher or not L == T == longest), f"{path}: --exact and --apd "
             "need a student that drafts a whole text: no teacher, no --block-size, no --length"),
            (is_verified and not is_plain, "--exact and --apd read the noise as it is: leave "
             "--tau, --top-p and --temperature out"),
            (T % L and T > L or T > longest and 2 * L > longest,
             f"--length {T}: {path} writes blocks of {L} with {longest} tokens in view; train with "
             "a smaller --block-size, or give another length"),
            ((block[~is_open] > block[is_open].min()).any(),
             f"--prompt {args.prompt!r}: what comes after the gap is not seen when text is written "
             "from left to right; end the prompt before the gap")]:
        if is_wrong:
            raise UserError(message)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", help="checkpoints (the newest student under out/)")
    parser.add_argument("-n", type=int, help="number of texts (4; with --eval 1000)")
    parser.add_argument("--length", type=int, help="tokens of a text (the model's seq_len); "
                        "students in blocks may write longer ones")
    parser.add_argument("--prompt", default="", help="text to begin with; each _ is one token to "
                        "fill in")
    parser.add_argument("--apd", type=float, metavar="R", help="adaptive parallel decoding: the "
                        "student drafts, the teacher verifies; 1 is the student alone")
    parser.add_argument("--exact", dest="apd", action="store_const", const=0.0, help="--apd 0: "
                        "what the teacher alone would write, in fewer calls")
    parser.add_argument("--animate", action="store_true", help="show how a text unmasks, step by "
                        "step; by several checkpoints from the same noise")
    parser.add_argument("--gif", metavar="FILE", help="the same as a moving picture in this file")
    parser.add_argument("--out", help="write the texts to this file, one JSON object a line")
    parser.add_argument("--eval", action="store_true", help="judge the checkpoints, in a table")
    parser.add_argument("--floors", action="store_true", help="with --eval: also judge texts that "
                        "no model wrote, which a good score must put last")
    parser.add_argument("--judge", default="gpt2-large", help="with --eval: whose perplexity; a "
                        "causal model of transformers, a folder, or teacher (gpt2-large)")
    parser.add_argument("--featurizer", default="gpt2-large", help="with --eval: whose features "
                        "MAUVE compares, likewise (gpt2-large)")
    add_flags(parser, *FLAGS, nfe=[8], batch_size=1000, out_dir="out/eval")
    args = parser.parse_args()
    paths = args.ckpt or [newest_student()]
    model, tokenizer, saved = load_model(paths[0], "cpu")
    given = {name: getattr(args, name) for name in FLAGS}
    for name in ("train_files", "val_files"):
        given[name] = given[name] or getattr(saved["config"], name)
    n = args.n
    if n is None:
        n = 1000 if args.eval else 4
    cfg = resolve(dataclasses.replace(saved["config"], grad_accum=1, n_samples=n, **given))
    if args.eval:
        if (args.prompt or args.apd is not None or args.animate or args.gif or args.out
                or args.length):
            raise UserError("--eval judges whole texts: leave --prompt, --exact, --apd, --animate, "
                            "--gif, --out and --length out")
        return evaluate(paths, args, cfg)
    if args.floors:
        raise UserError("--floors: texts for the table of --eval; add --eval")
    T = cfg.seq_len if args.length is None else args.length
    if T < 1:
        raise UserError(f"--length {T}: must be 1 or more")
    known = prompt_ids(args.prompt, tokenizer, T)
    check(args, cfg, model, paths[0], known)
    if args.animate or args.gif:
        animate(paths, args, cfg, known.to(cfg.device))
    else:
        write(args, cfg, model.to(cfg.device), tokenizer, saved, paths[0], known.to(cfg.device))


def animate(paths, args, cfg, known):
    """The films of all models, in the terminal or, with --gif, in a file."""
    models = load_models(paths, cfg)
    for path, (model, _, _) in zip(paths, models):
        check(args, cfg, model, path, known.cpu())
    texts = []
    for number in range(cfg.n_samples):
        texts.append([film(model, number, cfg.seed, known, **settings_of(model, cfg))
                      for model, _, _ in models])
    tokenizer = models[0][1]
    names = [model.name for model, _, _ in models]
    if len(set(names)) < len(names):
        names = [name_of(path, model) for path, (model, _, _) in zip(paths, models)]
    is_maze = cfg.dataset == "maze" and len(known) == cfg.seq_len
    if args.gif:
        write_gif(texts, names, tokenizer, is_maze, args.gif)
        print(f"{args.gif} written: {len(texts)} texts")
        return
    for films in texts:
        play(films, names, tokenizer, is_maze)


def write(args, cfg, model, tokenizer, saved, path, known):
    """Texts of one model, printed or written to a file."""
    n, settings = cfg.n_samples, settings_of(model, cfg)
    print(f"{path}: {model.name}, step {saved['step']}, {cfg.dataset}")
    if args.apd is not None:
        teacher = teacher_of(path, saved, tokenizer, cfg)
        x = verified(model, teacher, n, cfg.seed, known, args.apd)
    else:
        x = generate(model, n, len(known), cfg.seed, known, cfg.batch_size, "texts", **settings)
    if args.out:
        with open(args.out, "w") as f:
            for i, row in enumerate(x.tolist()):
                text = dict(index=i, seed=cfg.seed, text=tokenizer.decode(row), ids=row, **settings)
                f.write(json.dumps(text) + "\n")
        print(f"{n} texts written to {args.out}")
        return
    for row in x[:4] if args.apd is not None else x:
        print(show(row.cpu(), cfg.dataset, tokenizer) + "\n")


if __name__ == "__main__":
    run_cli(main)
