"""Judge what trained models write: a table of scores, for each model and setting of its sampler.

    python judge.py                                        # the newest student under out/
    python judge.py --ckpt A.pt B.pt --nfe 1 4 16 --floors
    python judge.py --ckpt A.pt --judge gpt2-large --featurizer gpt2-large -n 1000

docs/results.md says what each column means. judged.json has more columns, and standard errors.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from config import UserError, add_flags, print_table, run_cli
from data import GENERATED, load_data, load_transformers, token_entropy
from gumbel_distill import compare_with_teacher, generate, rng, sampler_settings, sampling_batches
from gumbel_distill import stratified_times, student_loss
from sample import load_models, name_of, teacher_of

OWN_MODEL = "the word teacher: our own AR model"
JUDGED_COLUMNS = {"model": "", "nfe": "d", "tau": "g", "temperature": "g", "gen_ppl": ".2f",
                  "entropy": ".3f", "mauve": ".3f", "energy": ".4f", "words": ".1%",
                  "pairs": ".1%", "valid": ".1%", "tv": ".3f"}
BETTER = {"gen_ppl": -1, "mauve": 1, "energy": -1, "energy_ngrams": -1, "words": 1, "pairs": 1}


# -----------------------------------------------------------------------------
# Generative perplexity
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


def bootstrap(statistic, n, n_draws=200):
    """Standard error of statistic(weights): n texts are drawn anew from the n at hand, again and
    again, and weights (n,) says how often each was drawn."""
    draw = np.random.default_rng(0).multinomial
    return float(np.std([statistic(draw(n, np.full(n, 1 / n))) for _ in range(n_draws)], ddof=1))


def ratio(parts, wholes, transform=float):
    """transform(sum of parts / sum of wholes), where each text has a part and a whole; and its
    standard error, as the texts vary. ValueError where the wholes are 0."""
    parts, wholes = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    if not wholes.any():
        raise ValueError("the texts are too short to have any")

    def score(weights):
        return transform(weights @ parts / max(1.0, weights @ wholes))
    return score(np.ones(len(parts))), bootstrap(score, len(parts))


# -----------------------------------------------------------------------------
# MAUVE and energy distance compare the features of two sets of texts
@torch.no_grad()
def teacher_features(x, teacher):
    """Mean hidden state of each half of texts x (N, T) under our own AR model, (N, 2 C) float32.

    The last hidden state alone could not tell repeated text from real text (docs/results.md, LM1B).
    Here the two halves of repeated text are too much alike. A text of one token has nan.
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


def ngram_features(x, n_buckets=2048):
    """Counts of hashed 1-, 2- and 3-grams of texts x (N, T), each row of length 1: (N, n_buckets).
    They need no model. The square root keeps frequent tokens from deciding alone."""
    counts = torch.zeros(len(x), n_buckets)
    for n in range(1, min(3, x.size(1)) + 1):
        grams = x.cpu().unfold(1, n, 1)                         # (N, T - n + 1, n)
        bucket = (grams * torch.tensor([1, 7919, 104_729])[:n] + n).sum(dim=-1) % n_buckets
        counts.scatter_add_(1, bucket, torch.ones(bucket.shape))
    return torch.nn.functional.normalize(counts.sqrt(), dim=1).numpy()


@contextlib.contextmanager
def silence():
    """Keep off the terminal what C++ writes to stderr: faiss warns of few points."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
    scores, redrawn = [], []
    with silence():
        for seed in seeds:
            rows = np.random.default_rng(seed).integers(len(p), size=len(p))
            scores.append(compute_mauve(p_features=p, q_features=q, seed=seed).mauve)
            redrawn.append(compute_mauve(p_features=p[rows], q_features=q, seed=seed).mauve)
    return float(np.mean(scores)), float(np.std(redrawn, ddof=1))


def energy_distance(p, q):
    """Energy distance (Szekely and Rizzo 2013) of features p (n, d) and q (m, d), unbiased:
        2 E|P - Q| - E|P - P'| - E|Q - Q'|
    0 where both have one distribution (estimates may be negative), else above 0.
    Returns: the distance; its standard error, as the texts of p vary
    Raises: ValueError for fewer than 10 texts, and for features that are not finite
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
        return 2 * weights @ to_q / n - weights @ within_p @ weights / n_pairs - within_q
    return float(distance(np.ones(n))), bootstrap(distance, n)


# -----------------------------------------------------------------------------
# Words, repetition, the bound on the likelihood, texts without a model
MAX_WORD_TOKENS = 20_000_000        # of the training text, read for its words


def words_of(text):
    """The words of a text: runs of English letters, lower-cased, don't being one. The first and
    the last may be cut off, and are left out."""
    text = text.replace("<|endoftext|>", " ").lower()
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text)[1:-1]


def training_words(data, piece=2**20, overlap=1000):
    """The words of the training text, and its pairs of neighbouring words, as two sets."""
    words, pairs = set(), set()
    for start in range(0, min(len(data.train), MAX_WORD_TOKENS), piece):
        # A piece reaches into the next one, where words_of leaves out the first word.
        found = words_of(data.tokenizer.decode(data.train[start:start + piece + overlap]))
        words.update(found)
        pairs.update(zip(found, found[1:]))
    return words, pairs


def rep_n(x, n=4):
    """Share of the n-grams of each text x (N, T) that stand in it before, (N,) (Rep-n)."""
    if x.size(1) < n:
        raise ValueError(f"a text of {x.size(1)} tokens has no {n} in a row")
    grams = x.unfold(1, n, 1)                                   # (N, T - n + 1, n)
    n_different = [len(of_one_text.unique(dim=0)) for of_one_text in grams]
    return 1 - torch.tensor(n_different) / grams.size(1)


@torch.no_grad()
def nelbo(student, x0, n_draws=20):
    """MDLM's or BD3-LM's bound on -log p of texts x0 (N, T), nats per token, without noise.

    Returns: its mean over n_draws of times and masks, and the standard error of this mean
    """
    n_blocks, means = x0.size(1) // student.block_size, []
    for draw in range(n_draws):
        g, total = rng("nelbo", draw, device=x0.device), 0.0
        for rows in x0.split(256):
            t = stratified_times(torch.rand(len(rows), n_blocks, generator=g, device=x0.device))
            order = torch.randperm(len(rows), generator=g, device=x0.device)
            total += student_loss(student, None, rows[order], t, g).item() * len(rows)
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
    texts = {"floor: unigram": token[drawn].view(n, T)}
    if data.n_train < n:
        print(f"warning: no floors 'periodic' and 'mirror': they begin with {n} different training "
              f"texts, and there are {data.n_train}", file=sys.stderr)
        return texts
    rows = np.random.default_rng(seed).choice(data.n_train, size=n, replace=False)
    start = data.rows(rows)[:, :half]
    texts["floor: periodic"] = start.repeat(1, 2)[:, :T]
    texts["floor: mirror"] = torch.cat([start, start.flip(1)], dim=1)[:, :T]
    return texts


# -----------------------------------------------------------------------------
# The judge, and the table: one row for each model and setting
class Judge:
    """The scores of texts, compared with the real texts (n, T)."""

    def __init__(self, args, cfg, data, teacher, real):
        own = "teacher" if cfg.dataset in GENERATED else "gpt2-large"
        self.judge, self.featurizer = args.judge or own, args.featurizer or own
        self.device, self.data, self.teacher, self.real = cfg.device, data, teacher, real
        self.reference = self.features(real)
        self.words, self.pairs = set(), set()
        if cfg.dataset not in GENERATED:
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

    def known(self, x, n):
        """The share of runs of n words, 1 or 2, that stand in the training text, too."""
        found = [words_of(text) for text in self.decode(x)]
        grams, there = (found, self.words)
        if n == 2:
            grams, there = [list(zip(words, words[1:])) for words in found], self.pairs
        return ratio([sum(g in there for g in of_text) for of_text in grams], list(map(len, grams)))

    def scores(self, x, name):
        """The scores of texts x (N, T): a dict with NAME and its standard error NAME_se. What these
        texts cannot have is left out, and stderr says why. `name` names them there."""
        n, ones = len(self.real), np.ones(len(x))
        ways = {
            "gen_ppl": lambda: ratio(*self.nll(x), math.exp),
            "entropy": lambda: ratio([token_entropy(row[None]) for row in x], ones),
            "rep_4": lambda: ratio(rep_n(x), ones),
            "mauve": lambda: mauve(features, self.reference),
            "energy": lambda: energy_distance(features, self.reference),
            "energy_ngrams": lambda: energy_distance(ngram_features(x[:n]),
                                                     ngram_features(self.real))}
        if self.words:
            ways.update(words=lambda: self.known(x, 1), pairs=lambda: self.known(x, 2))
        features = self.features(x[:n])
        row = {}
        for score, way in ways.items():
            try:
                row[score], row[score + "_se"] = way()
            except ValueError as e:
                print(f"warning: no {score} of {name}: {e}", file=sys.stderr)
        return {**row, **self.data.judge(x)}


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

    Returns: rows with, for each score, by how many standard errors the first model is better. The
    errors are those of the scores as the texts vary; other training seeds would add to them
    """
    curves = {}
    for row in sorted(rows, key=lambda row: row["entropy"]):
        if "tau" in row:
            curves.setdefault((row["nfe"], row["model"]), []).append(row)
    curves = {key: curve for key, curve in curves.items() if len(curve) > 1}
    result = []
    for (key, first), (other_key, second) in itertools.combinations(sorted(curves.items()), 2):
        (nfe, model), (other_nfe, other) = key, other_key
        if nfe != other_nfe:
            continue
        entropy = min(first[-1]["entropy"], second[-1]["entropy"])
        if max(first[0]["entropy"], second[0]["entropy"]) > entropy:
            print(f"nfe {nfe}: {model} and {other} have no entropy in common")
            continue
        result.append({"model": model, "against": other, "nfe": nfe, "entropy": entropy})
        for column, sign in BETTER.items():
            ours = at_entropy(first, column, entropy)
            theirs = at_entropy(second, column, entropy)
            if ours and theirs:
                error = math.hypot(ours[1], theirs[1])
                result[-1][column] = sign * (ours[0] - theirs[0]) / error if error else 0.0
    return result


def print_equal_entropy(rows):
    if rows:
        print("\nBy how many standard errors the first model is better, at equal entropy, between "
              "the nearest\nsettings of the sampler:")
        print_table(rows, {"model": "", "against": "", "nfe": "d", "entropy": ".3f",
                           **dict.fromkeys(BETTER, "+.1f")})


def print_fooled(rows):
    """Name the columns that put text without a model above real text, the first row, by two
    standard errors."""
    real, *others = rows
    for column, sign in BETTER.items():
        for row in others:
            if row["model"].startswith("floor") and column in row and column in real:
                error = math.hypot(row[column + "_se"], real[column + "_se"])
                if sign * (row[column] - real[column]) > 2 * error:
                    print(f"fooled: {column} is {row[column]:.4g} for {row['model']!r}, and "
                          f"{real[column]:.4g} for real text")


# -----------------------------------------------------------------------------
# Command line
def write_rows(args, names, models, data, teacher, real, cfg):
    """The rows: real text against other real text (the ceiling), floors, the teacher, each student
    with each setting of the sampler. judged.json is written after each row; returns them all."""
    T, n = cfg.seq_len, len(real) // 2
    judge = Judge(args, cfg, data, teacher, real[:n])
    teacher_text = generate(teacher, cfg.n_samples, T, cfg.seed, None, cfg.batch_size, "teacher")
    rows = []

    def add(x, **about):
        rows.append({**about, **judge.scores(x, about["model"])})
        if "tau" in about:
            rows[-1].update(compare_with_teacher(x, teacher_text, teacher, cfg.seed))
        with open(os.path.join(cfg.out_dir, "judged.json"), "w") as f:
            json.dump(rows, f, indent=1)

    add(real[n:], model="real text (ceiling)")
    if args.floors:
        for name, x in floors(data, cfg.n_samples, cfg.seed).items():
            add(x.to(cfg.device), model=name)
    add(teacher_text, model="teacher", nfe=T)
    for name, model in zip(names, models):
        if model.name == "teacher":
            continue
        bound = {}
        if not model.reads_noise:
            bound["nelbo"], bound["nelbo_se"] = nelbo(model, real[:n])
        for settings in sampler_settings(model, cfg):
            start = time.perf_counter()
            x = generate(model, cfg.n_samples, T, cfg.seed, None, cfg.batch_size,
                         f"{name}, {settings['nfe']} steps", **settings)
            x[-1, -1].item()                                    # waits for a GPU
            seconds = time.perf_counter() - start
            add(x, model=name, **settings, **bound, samples_s=len(x) / seconds)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", help="checkpoints (the newest student under out/)")
    parser.add_argument("-n", dest="n_samples", type=int, default=1000, help="number of texts "
                        "(1000)")
    parser.add_argument("--floors", action="store_true", help="also judge texts that no model "
                        "wrote, which a good score must put last")
    parser.add_argument("--judge", help="whose perplexity: a causal model of transformers, a "
                        "folder, or teacher (gpt2-large for text, teacher for generated data)")
    parser.add_argument("--featurizer", help="whose features MAUVE compares, likewise")
    add_flags(parser, "teacher", "nfe", "tau", "temperature", "top_p", "order", "seed", "device",
              "batch_size", "train_files", "val_files", "out_dir", nfe=[8], batch_size=1000,
              out_dir="out/judge")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")                    # a terminal may lack letters
    paths, loaded, cfg = load_models(args)
    models = [model for model, _, _ in loaded]
    first, tokenizer, saved = loaded[0]
    names = [name_of(path, model) for path, model in zip(paths, models)]
    if len(set(names)) < len(names):
        raise UserError(f"--ckpt: two of {', '.join(names)} have one name, and the table could not "
                        "tell them apart; rename a folder")
    data = load_data(cfg)
    if data.tokenizer.state != tokenizer.state:
        raise UserError(f"{paths[0]} knows other tokens than the text at hand; name the text that "
                        "it was trained on with --train-files and --val-files")
    teacher = first
    if first.name != "teacher":
        teacher = teacher_of(paths[0], saved, tokenizer, cfg)
    real = data.val_rows(2 * cfg.n_samples).to(cfg.device)
    if len(real) < 4:
        raise UserError(f"-n {cfg.n_samples}: the validation text has {len(real)} sequences of "
                        f"{cfg.seq_len} tokens for two sets of that many, at least 2 each")
    if len(real) < 2000 or cfg.seq_len < 32:
        print(f"warning: {len(real) // 2} texts of {cfg.seq_len} tokens are few for MAUVE; compare "
              "scores of this table only, and with the ceiling", file=sys.stderr)
    os.makedirs(cfg.out_dir, exist_ok=True)
    rows = write_rows(args, names, models, data, teacher, real, cfg)
    print_table([{k: v for k, v in row.items() if not k.endswith("_se")} for row in rows],
                JUDGED_COLUMNS)
    print_fooled(rows)
    print_equal_entropy(at_equal_entropy(rows))
    print(f"\n{cfg.out_dir}/judged.json has standard errors and more scores; "
          f"notebooks/classroom.py --judged {cfg.out_dir} draws it")


if __name__ == "__main__":
    run_cli(main)
