"""Judge what trained models write: a table of scores, for each model and setting of its sampler.

    python judge.py                                        # the newest student under out/
    python judge.py --ckpt A.pt B.pt --nfe 1 4 16 --floors
    python judge.py --ckpt A.pt --judge gpt2-large --featurizer gpt2-large -n 1000

docs/columns.md says what each column means. judged.json has more columns, and standard errors.
"""

import itertools
import json
import math
import os
import re
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import Parser, UserError, add_flags, print_table, run_cli
from data import GENERATED, load_data, load_transformers, token_entropy
from gumbel_distill import compare_with_teacher, generate, rng, sampler_settings, sampling_batches
from gumbel_distill import stratified_times, student_loss
from sample import load_models, teacher_of

OWN_MODEL = "the word teacher: our own AR model"
JUDGED_COLUMNS = {"model": "", "nfe": "d", "tau": "g", "temperature": "g", "gen_ppl": ".2f",
                  "entropy": ".3f", "mauve": ".3f", "energy": ".4f", "words": ".1%",
                  "pairs": ".1%", "valid": ".1%", "tv": ".3f"}
BETTER = {"gen_ppl": -1, "mauve": 1, "energy": -1, "words": 1, "pairs": 1}


# -----------------------------------------------------------------------------
# Generative perplexity
@torch.no_grad()
def hf_nll(texts, model, tokenizer, device="cpu"):
    """Sum of -log p in nats, and number of tokens scored, of each text under a transformers model.
    Texts are tokenised anew for the judge. The first token of a text and ends of text are not
    scored. A text that is longer than the judge can read is read in windows that overlap by half.
    """
    longest = getattr(model.config, "max_position_embeddings", 1024)
    half = longest // 2
    totals, counts = torch.zeros(2, len(texts))
    model.to(device)
    for i, text in enumerate(tqdm(texts, desc="judge", disable=None, leave=False)):
        text = text.replace("<|endoftext|>", tokenizer.eos_token or "")
        ids = torch.tensor(tokenizer.encode(text), device=device)
        if len(ids) < 2:
            continue
        for start in range(0, max(1, len(ids) - longest + half), half):
            window = ids[start:start + longest]
            logits = model(window[None]).logits[0, :-1].float()
            nll = F.cross_entropy(logits, window[1:], reduction="none")
            is_scored = window[1:] != tokenizer.eos_token_id
            if start > 0:  # the window before has scored these
                is_scored[:longest - half - 1] = False
            totals[i] += nll[is_scored].sum().item()
            counts[i] += is_scored.sum().item()
    return totals, counts


@torch.no_grad()
def teacher_nll(x, teacher):
    """The same of token ids x (N, T) under our own AR model, without tokenising anew."""
    totals, counts = [], []
    for index in sampling_batches(len(x), x.size(1), teacher.vocab_size):
        rows = x[index]
        logp = teacher(rows).gather(-1, rows[..., None])        # (b, T, 1)
        nll = -logp[:, 1:, 0]                                   # (b, T - 1)
        is_scored = rows[:, 1:] != teacher.bos_id
        totals.append((nll * is_scored).sum(dim=1).cpu())
        counts.append(is_scored.sum(dim=1).cpu())
    return torch.cat(totals), torch.cat(counts)


def bootstrap(statistic, n, n_draws=200):
    """Standard error of statistic(weights): n texts are drawn anew from the n at hand, again and
    again, and weights (n,) says how often each was drawn."""
    draw = np.random.default_rng(0).multinomial
    share = np.full(n, 1 / n)
    values = [statistic(draw(n, share)) for _ in range(n_draws)]
    return float(np.std(values, ddof=1))


def ratio(parts, wholes, transform=float):
    """transform(sum of parts / sum of wholes), where each text has a part and a whole; and its
    standard error, as the texts vary. ValueError where the wholes are 0."""
    parts = np.asarray(parts, dtype=float)
    wholes = np.asarray(wholes, dtype=float)
    if not wholes.any():
        raise ValueError("there is nothing to score")

    def score(weights):
        return transform(weights @ parts / max(1.0, weights @ wholes))
    return score(np.ones(len(parts))), bootstrap(score, len(parts))


# -----------------------------------------------------------------------------
# MAUVE and energy distance compare the features of two sets of texts
@torch.no_grad()
def teacher_features(x, teacher):
    """Mean hidden state of each half of texts x (N, T) under our own AR model, (N, 2 C) float32.
    The last hidden state alone could not tell repeated text from real text. Here the two halves of
    repeated text are too much alike. A text of one token has nan.
    """
    features = []
    for rows in x.split(256):
        bos = torch.full_like(rows[:, :1], teacher.bos_id)
        ids = torch.cat([bos, rows], dim=1)
        h = teacher.net(teacher.net.embed(ids))[:, 1:].float()  # (b, T, C): has read each token
        halves = h.tensor_split(2, dim=1)
        means = [half.mean(dim=1) for half in halves]           # (b, C) each
        features.append(torch.cat(means, dim=1).cpu())
    return torch.cat(features).numpy()


def text_features(texts, name, max_tokens):
    """Last hidden state of each text, by mauve-text's own featuriser, a model of transformers."""
    load_transformers(name, "--featurizer", OWN_MODEL)
    from mauve.compute_mauve import get_features_from_input
    device = 0 if torch.cuda.is_available() else -1
    return get_features_from_input(None, None, texts, name, max_tokens, device, "texts", 16)


def mauve(p, q, seeds=range(25, 30)):
    """MAUVE (Pillutla et al. 2021) of features p, q (n, d), mean over the seeds of its k-means.
    Returns: MAUVE; its standard error, from as many draws of n rows of p with replacement.
    ValueError where features are degenerate: the library answers 0.75 then
    """
    for name, f in (("generated", p), ("reference", q)):
        n_distinct = len(np.unique(np.round(f, 5), axis=0))
        if not np.isfinite(f).all() or n_distinct < max(5, len(f) // 20):
            raise ValueError(f"only {n_distinct} of {len(f)} {name} features are distinct")
    from mauve import compute_mauve
    scores, redrawn = [], []
    stderr = os.dup(2)                                          # faiss warns of few points in C++
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        for seed in seeds:
            rows = np.random.default_rng(seed).integers(len(p), size=len(p))
            scores.append(compute_mauve(p_features=p, q_features=q, seed=seed).mauve)
            redrawn.append(compute_mauve(p_features=p[rows], q_features=q, seed=seed).mauve)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return float(np.mean(scores)), float(np.std(redrawn, ddof=1))


def energy_distance(p, q):
    """Energy distance (Szekely and Rizzo 2013) of features p (n, d) and q (m, d), unbiased:
        2 E|P - Q| - E|P - P'| - E|Q - Q'|
    0 where both have one distribution (estimates may be negative), else above 0.
    Returns: the distance; its standard error, as the texts of p vary. ValueError without any
    """
    p, q = torch.as_tensor(p, dtype=torch.double), torch.as_tensor(q, dtype=torch.double)
    n, m = len(p), len(q)
    if min(n, m) < 10:
        raise ValueError(f"only {min(n, m)} texts, it takes 10")
    to_q = torch.cdist(p, q).mean(dim=1).numpy()                # (n,)
    if not np.isfinite(to_q).all():
        raise ValueError("features that are no numbers: a text of one token has no two halves")
    within_p = torch.cdist(p, p).numpy()                        # (n, n)
    within_q = torch.cdist(q, q).sum().item() / (m * (m - 1))

    def distance(weights):
        n_pairs = weights.sum()**2 - (weights**2).sum()         # pairs of two different texts
        between = weights @ to_q / n
        within = weights @ within_p @ weights / n_pairs
        return 2 * between - within - within_q
    return float(distance(np.ones(n))), bootstrap(distance, n)


# -----------------------------------------------------------------------------
# Words, repetition, the bound on the likelihood, texts without a model
MAX_WORD_TOKENS = 20_000_000        # of the training text, read for its words


def words_of(text):
    """Runs of English letters, lower-cased; not the first and the last, which may be cut off."""
    text = text.replace("<|endoftext|>", " ").lower()
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text)[1:-1]


def training_words(data, piece=2**20):
    """The words of the training text, and its pairs of neighbouring words, as two sets. What the
    borders of the pieces, which save memory, cut apart is left out."""
    words, pairs = set(), set()
    for start in range(0, min(len(data.train), MAX_WORD_TOKENS), piece):
        found = words_of(data.tokenizer.decode(data.train[start:start + piece]))
        words.update(found)
        pairs.update(pairs_of(found))
    return words, pairs


def pairs_of(words):
    return list(zip(words, words[1:]))


def share_known(texts, known):
    """The share of all items of the texts (lists of items) that are in the set `known`."""
    n_known = [sum(item in known for item in text) for text in texts]
    n_items = [len(text) for text in texts]
    return ratio(n_known, n_items)


def rep_n(x, n=4):
    """Share of the n-grams of each text x (N, T) that stand in it before, (N,) (Rep-n)."""
    if x.size(1) < n:
        raise ValueError(f"a text of {x.size(1)} tokens has no {n} in a row")
    grams = x.unfold(1, n, 1)                                   # (N, T - n + 1, n)
    n_different = [len(of_one_text.unique(dim=0)) for of_one_text in grams]
    return 1 - torch.tensor(n_different) / grams.size(1)


@torch.no_grad()
def nelbo(student, x0, n_draws=20):
    """MDLM's or BD3-LM's bound on -log p of texts x0 (N, T), nats per token, without noise: the
    mean of n_draws of times and masks, and its standard error."""
    means = []
    n_blocks = x0.size(1) // student.block_size
    for draw in range(n_draws):
        g = rng("nelbo", draw, device=x0.device)
        total = 0.0
        order = torch.randperm(len(x0), generator=g, device=x0.device)
        for rows in x0[order].split(256):
            u = torch.rand(len(rows), n_blocks, generator=g, device=x0.device)
            loss = student_loss(student, None, rows, stratified_times(u), g)
            total += loss.item() * len(rows)
        means.append(total / len(x0))
    return float(np.mean(means)), float(np.std(means, ddof=1) / n_draws**0.5)


def floors(data, n, seed):
    """Texts without a model, which a good score must put below real text: name -> (n, T) long
    (after arXiv 2606.08417). Each begins with real training text, or has its T frequent tokens."""
    T = data.seq_len
    half = (T + 1) // 2
    counts = torch.from_numpy(data.train[:2**20].astype(np.int64)).bincount()
    best, token = counts.topk(min(T, int((counts > 0).sum())))
    drawn = torch.multinomial(best.double(), n * T, replacement=True, generator=rng(seed, "floor"))
    number = np.random.default_rng(seed).integers(data.n_train, size=n)
    start = data.rows(number)[:, :half]
    return {"floor: unigram": token[drawn].view(n, T),
            "floor: periodic": start.repeat(1, 2)[:, :T],
            "floor: mirror": torch.cat([start, start.flip(1)], dim=1)[:, :T]}


# -----------------------------------------------------------------------------
# Judge: all scores of texts
class Judge:
    """The scores of texts, some of them in comparison with the real texts (n, T)."""

    def __init__(self, args, cfg, data, teacher, real):
        is_text = cfg.dataset not in GENERATED
        own = "gpt2-large" if is_text else "teacher"
        self.judge, self.featurizer = args.judge or own, args.featurizer or own
        self.data, self.teacher, self.real = data, teacher, real
        self.device = cfg.device
        self.reference = self.features(real)
        self.words = self.pairs = set()
        if is_text:
            self.words, self.pairs = training_words(data)

    def decode(self, x):
        return [self.data.tokenizer.decode(row) for row in x]

    def nll(self, x):
        if self.judge == "teacher":
            return teacher_nll(x, self.teacher)
        model = load_transformers(self.judge, "--judge", OWN_MODEL)
        return hf_nll(self.decode(x), *model, device=self.device)

    def features(self, x):
        if self.featurizer == "teacher":
            return teacher_features(x, self.teacher)
        return text_features(self.decode(x), self.featurizer, x.size(1))

    def scores(self, x, name):
        """A dict with scores NAME of texts x (N, T) and their standard errors NAME_se. What such
        texts cannot have is left out, and stderr says why of `name`."""
        n = len(self.real)
        ones = np.ones(len(x))
        features = self.features(x[:n])
        ways = {
            "gen_ppl": lambda: ratio(*self.nll(x), math.exp),
            "entropy": lambda: ratio([token_entropy(row[None]) for row in x], ones),
            "rep_4": lambda: ratio(rep_n(x), ones),
            "mauve": lambda: mauve(features, self.reference),
            "energy": lambda: energy_distance(features, self.reference)}
        if self.words:
            words = [words_of(text) for text in self.decode(x)]
            pairs = [pairs_of(of_text) for of_text in words]
            ways["words"] = lambda: share_known(words, self.words)
            ways["pairs"] = lambda: share_known(pairs, self.pairs)
        row = {}
        for score, way in ways.items():
            try:
                row[score], row[score + "_se"] = way()
            except ValueError as e:
                print(f"warning: no {score} of {name}: {e}", file=sys.stderr)
        return {**row, **self.data.judge(x)}


def print_fooled(rows):
    """Name the columns that put text without a model above real text, the first row, by two
    standard errors."""
    real = rows[0]
    floors = [row for row in rows if row["model"].startswith("floor")]
    for row, (column, sign) in itertools.product(floors, BETTER.items()):
        if column not in row or column not in real:
            continue
        error = math.hypot(row[column + "_se"], real[column + "_se"])
        if sign * (row[column] - real[column]) > 2 * error:
            print(f"fooled: {column} prefers {row['model']!r} to real text")


# -----------------------------------------------------------------------------
# Command line
def write_rows(args, names, models, data, teacher, real, cfg):
    """The rows: real text against other real text (the ceiling), floors, the teacher, each student
    with each setting of the sampler. judged.json is written after each row; returns them all."""
    T, n = cfg.seq_len, len(real) // 2
    judge = Judge(args, cfg, data, teacher, real[:n])
    written = partial(generate, n=cfg.n_samples, seq_len=T, seed=cfg.seed,
                      batch_size=cfg.batch_size, progress="texts")
    teacher_text = written(teacher)
    rows = []

    def add(x, **about):
        rows.append({**about, **judge.scores(x, about["model"])})
        if "tau" in about:
            rows[-1].update(compare_with_teacher(x, teacher_text, teacher))
        with open(os.path.join(cfg.out_dir, "judged.json"), "w") as f:
            json.dump(rows, f, indent=1)

    add(real[n:], model="real text (ceiling)")
    if args.floors:
        for name, x in floors(data, cfg.n_samples, cfg.seed).items():
            add(x.to(cfg.device), model=name)
    add(teacher_text, model="teacher", nfe=T)
    for name, model in zip(names, models):
        if model.name == "teacher":                             # it stands above
            continue
        bound = {}
        if not model.reads_noise:
            bound["nelbo"], bound["nelbo_se"] = nelbo(model, real[:n])
        for settings in sampler_settings(model, cfg):
            x = written(model, **settings)
            add(x, model=name, **settings, **bound)
    return rows


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", help="checkpoints (the newest student under out/)")
    parser.add_argument("-n", "--n-samples", type=int, default=1000, metavar="N",
                        help="number of texts (1000)")
    parser.add_argument("--floors", action="store_true", help="also judge texts that no model "
                        "wrote, which a good score must put last")
    parser.add_argument("--judge", help="whose perplexity: a causal model of transformers, a "
                        "folder, or teacher (gpt2-large for text, teacher for generated data)")
    parser.add_argument("--featurizer", help="whose features MAUVE compares, likewise")
    add_flags(parser, "teacher", "nfe", "tau", "temperature", "top_p", "seed", "device",
              "batch_size", "train_files", "val_files", "out_dir", nfe=[8], batch_size=1000,
              out_dir="out/judge")
    args = parser.parse_args()
    names, models, tokenizer, saved, cfg = load_models(args)
    data = load_data(cfg)
    if data.tokenizer.state != tokenizer.state:
        raise UserError(f"{args.ckpt[0]} knows other tokens than the text at hand; name the text "
                        "that it was trained on with --train-files and --val-files")
    teacher = models[0]
    if teacher.name != "teacher":
        teacher = teacher_of(args.ckpt[0], saved, tokenizer, cfg)
    real = data.val_rows(2 * cfg.n_samples).to(cfg.device)
    if len(real) < 4:
        raise UserError(f"-n {cfg.n_samples}: the validation text has {len(real)} sequences of "
                        f"{cfg.seq_len} tokens for two sets of that many, at least 2 each")
    if len(real) < 2000 or cfg.seq_len < 32:
        print(f"warning: {len(real) // 2} texts of {cfg.seq_len} tokens are few for MAUVE; compare "
              "scores of this table only, and with the ceiling", file=sys.stderr)
    os.makedirs(cfg.out_dir, exist_ok=True)
    rows = write_rows(args, names, models, data, teacher, real, cfg)
    shown = [{name: row[name] for name in JUDGED_COLUMNS if name in row} for row in rows]
    print_table(shown, JUDGED_COLUMNS)
    print_fooled(rows)
    print(f"\n{cfg.out_dir}/judged.json has standard errors and more scores; "
          f"notebooks/classroom.py --judged {cfg.out_dir} draws it")


if __name__ == "__main__":
    run_cli(main)
