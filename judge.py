"""Judge what trained models write: a table of scores, for each model and setting of its sampler.

    python judge.py                                        # the newest student under out/
    python judge.py --ckpt A.pt B.pt --nfe 1 4 16 --floors
    python judge.py --ckpt A.pt --judge gpt2-large -n 1000

judged.json has more scores than the table, and standard errors.
"""

import argparse
import itertools
import json
import math
import os
import re
import secrets
import urllib.request
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import gumbel_distill as gd
from data import Tokenizer, config_of, load_transformers
from sample import load_models, note, nucleus, settings_of

COLUMNS = ("nfe tau temperature top_p gen_ppl entropy mauve energy words pairs valid tv gain "
           "cross_gain").split()
SETTINGS = ["tau", "temperature", "top_p"]
BETTER = {"gen_ppl": -1, "mauve": 1, "energy": -1, "words": 1, "pairs": 1}


# --- Readers of texts: our own AR model, or (model, tokenizer) of transformers --------------------
@torch.no_grad()
def own_read(x, teacher):
    """What our own AR model says of texts x (N, T): the sum of -log p of each text in nats, and its
    number of tokens, without the first one and ends of text; features (N, 2 C), the mean hidden
    state of each half. (The last state alone could not tell repeated text from real text.)"""
    parts = []
    for rows in x.split(16):
        bos = torch.full_like(rows[:, :1], teacher.bos_id)
        h = teacher.net(teacher.net.embed(torch.cat([bos, rows], dim=1)))  # (b, T + 1, C)
        nll = -teacher.logp(h[:, 1:-1]).gather(-1, rows[:, 1:, None])[..., 0]
        is_scored = rows[:, 1:] != teacher.bos_id
        halves = h[:, 1:].float().tensor_split(2, dim=1)        # each state has read its token
        features = torch.cat([half.mean(dim=1) for half in halves], dim=1)
        parts.append(((nll * is_scored).sum(dim=1), is_scored.sum(dim=1), features))
    return [torch.cat(part).cpu().numpy() for part in zip(*parts)]


@torch.no_grad()
def hf_read(texts, model, tokenizer):
    """The same of strings by a model of transformers, which tokenises them anew. Features (N, C)
    are the last hidden states, as in mauve-text. A text that is longer than the model can read is
    scored in windows that overlap by half."""
    longest = getattr(model.config, "max_position_embeddings", 1024)
    half, scores, features = longest // 2, np.zeros((2, len(texts))), []
    for i, text in enumerate(texts):
        text = text.replace("<|endoftext|>", tokenizer.eos_token or "")
        ids = tokenizer.encode(text) or [tokenizer.eos_token_id]
        ids = torch.tensor(ids, device=model.device)
        for start in range(0, max(1, len(ids) - longest + half), half):
            window = ids[start:start + longest]
            out = model(window[None], output_hidden_states=True)
            nll = F.cross_entropy(out.logits[0, :-1].float(), window[1:], reduction="none")
            is_scored = window[1:] != tokenizer.eos_token_id
            if start == 0:
                features.append(out.hidden_states[-1][0, -1].float().cpu())
            else:  # the window before has scored these
                is_scored[:longest - half - 1] = False
            scores[:, i] += nll[is_scored].sum().item(), is_scored.sum().item()
    return *scores, torch.stack(features).numpy()


def load_reader(name, teacher):
    """What --judge names: our own `teacher`, or (model, tokenizer) of transformers."""
    if name == "teacher":
        return teacher
    try:
        os.path.isdir(name) or urllib.request.urlopen("https://huggingface.co", timeout=5)
    except OSError:  # else transformers asks again and again, for most of a minute
        os.environ["HF_HUB_OFFLINE"] = "1"
    model, tokenizer = load_transformers(name, "--judge", "the word teacher: our own AR model")
    return model.to(next(teacher.parameters()).device), tokenizer


# --- Scores with their standard errors. MAUVE and energy compare the features of two sets of texts 
def bootstrap(statistic, n, n_draws=200):
    """A statistic of n texts, and its standard error: n texts are drawn anew from those at hand,
    again and again. statistic(weights) is told how often each was drawn, (n,)."""
    draw = np.random.default_rng(0).multinomial
    values = [statistic(draw(n, np.full(n, 1 / n))) for _ in range(n_draws)]
    return float(statistic(np.ones(n))), float(np.std(values, ddof=1))


def ratio(parts, wholes, transform=float):
    """transform(sum of parts / sum of wholes), where each text has a part and a whole."""
    parts, wholes = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    if not wholes.any():
        raise ValueError("there is nothing to score")
    return bootstrap(lambda n: transform(n @ parts / max(1.0, n @ wholes)), len(parts))


def mauve(p, q, seeds=range(25, 30)):
    """MAUVE (Pillutla et al. 2021) of features p, q (n, d), mean over the seeds of its k-means."""
    for name, f in (("generated", p), ("reference", q)):
        n_distinct = len(np.unique(np.round(f, 5), axis=0))
        if not np.isfinite(f).all() or n_distinct < max(5, len(f) // 20):  # mauve-text says 0.75
            raise ValueError(f"only {n_distinct} of {len(f)} {name} features are distinct")
    scores, redrawn = [], []                                    # of draws of n rows of p
    stderr = os.dup(2)                                          # faiss warns of few points in C++
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        from mauve import compute_mauve
        for seed in seeds:
            rows = np.random.default_rng(seed).integers(len(p), size=len(p))
            scores.append(compute_mauve(p_features=p, q_features=q, seed=seed).mauve)
            redrawn.append(compute_mauve(p_features=p[rows], q_features=q, seed=seed).mauve)
    except Exception as e:  # not installed, or broken: any type
        raise ValueError(f"mauve-text fails ({type(e).__name__}: {e})") from e
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return float(np.mean(scores)), float(np.std(redrawn, ddof=1))


def energy_distance(p, q):
    """Energy distance (Szekely and Rizzo 2013) of features p (n, d) and q (m, d), unbiased:
        2 E|P - Q| - E|P - P'| - E|Q - Q'|
    It is 0 where both have one distribution (an estimate may be negative), else above 0."""
    p, q = torch.as_tensor(p, dtype=torch.double), torch.as_tensor(q, dtype=torch.double)
    m = len(q)
    if min(len(p), m) < 10 or not (p.isfinite().all() and q.isfinite().all()):
        raise ValueError("it takes 10 texts, of two tokens or more")
    to_q = torch.cdist(p, q).mean(dim=1).numpy()                # (n,)
    within_p = torch.cdist(p, p).numpy()                        # (n, n)
    within_q = torch.cdist(q, q).sum().item() / (m * (m - 1))

    def distance(n):
        n_pairs = n.sum()**2 - (n**2).sum()                     # of two different texts
        return 2 * n @ to_q / n.sum() - n @ within_p @ n / n_pairs - within_q
    return bootstrap(distance, len(p))


def words_of(text):
    """Runs of English letters, lower-cased; not the first and the last, which may be cut off."""
    text = text.replace("<|endoftext|>", " ").lower()
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text)[1:-1]


def training_words(data, limit=20_000_000):
    """The words of the training text, `limit` tokens of it, and its pairs of words: a set."""
    T, tokenizer, known = data.val.size(1), Tokenizer(**data.tokenizer), set()
    for index in torch.arange(0, min(data.n_train, limit), T).split(1 + 2**20 // T):
        words = words_of(tokenizer.decode(data.rows(index).flatten().tolist()))
        known.update(words, zip(words, words[1:]))
    return known


class Judge:
    """Scores texts; some scores compare them with texts `real` (n, T) of the data. reader: a
    Teacher, or (model, tokenizer) of transformers.  without: scores that are not wanted"""

    def __init__(self, data, real, reader, without=()):
        self.data, self.reader, self.without = data, reader, without
        self.tokenizer = Tokenizer(**data.tokenizer)
        self.reference = self.read(real)[2]
        self.known = set()
        if not self.tokenizer.sep:                              # running text, no paths or toys
            self.known = training_words(data)

    def read(self, x):
        if isinstance(self.reader, gd.Teacher):
            return own_read(x, self.reader)
        return hf_read([self.tokenizer.decode(ids) for ids in x.tolist()], *self.reader)

    def count(self, ids):
        """Of one text: score -> (part, whole), which add up over texts."""
        share = np.unique(ids, return_counts=True)[1] / len(ids)
        grams = [tuple(ids[i:i + 4]) for i in range(len(ids) - 3)]
        counts = dict(entropy=(-(share * np.log(share)).sum(), 1),
                      rep_4=(len(grams) - len(set(grams)), len(grams)))
        if self.known:
            words = words_of(self.tokenizer.decode(ids))
            for score, items in (("words", words), ("pairs", list(zip(words, words[1:])))):
                counts[score] = sum(item in self.known for item in items), len(items)
        return counts

    def scores(self, x, name):
        """A dict with scores NAME of texts x (N, T) and their standard errors NAME_se. What such
        texts cannot have is left out, and stderr says why of `name`."""
        nll, n_tokens, features = self.read(x)
        features = features[:len(self.reference)]
        counts = [self.count(ids) for ids in x.tolist()]
        ways = {score: partial(ratio, *zip(*[of_text[score] for of_text in counts]))
                for score in counts[0]}
        ways["gen_ppl"] = partial(ratio, nll, n_tokens, math.exp)
        ways["mauve"] = partial(mauve, features, self.reference)
        ways["energy"] = partial(energy_distance, features, self.reference)
        row = {}
        for score in ways.keys() - set(self.without):
            try:
                row[score], row[score + "_se"] = ways[score]()
            except ValueError as e:
                note(f"no {score} of {name}: {e}")
        return {**row, **self.data.judge(x)}


# --- Texts without a model, and what a student learns from the noise ------------------------------
def floors(data, n, seed):
    """Texts that a good score must put below real text: name -> (n, T) long (after arXiv
    2606.08417). Each begins with real training text, or has its T frequent tokens."""
    T, g = data.val.size(1), gd.rng(seed, "floors")
    rows = data.rows(torch.randint(data.n_train, (max(n, 2000),), generator=g))
    counts, token = rows.flatten().bincount().topk(min(T, len(rows.unique())))
    drawn = torch.multinomial(counts.double(), n * T, replacement=True, generator=g)
    start = rows[:n, :(T + 1) // 2]
    return {"floor: unigram": token[drawn].view(n, T),
            "floor: periodic": start.repeat(1, 2)[:, :T],
            "floor: mirror": torch.cat([start, start.flip(1)], dim=1)[:, :T]}


def fooled(rows):
    """(column, model) where a column puts text without a model above real text, the first row, by
    two standard errors."""
    for row, column in itertools.product(rows, BETTER):
        if row["model"].startswith("floor") and column in row and column in rows[0]:
            lead = BETTER[column] * (row[column] - rows[0][column])
            if lead > 2 * math.hypot(row[column + "_se"], rows[0][column + "_se"]):
                yield column, row["model"]


@torch.no_grad()
def probe(student, teacher, n, share=1.0, seed=0):
    """It guesses one token each of n texts of the teacher, of which a share is masked. Its
    cross-entropy in nats, if it sees
        A  the noise of the text    B  that of the token, elsewhere fresh noise    D  fresh noise
    Returns gain = D - A, and cross_gain = B - A: what it learns from the noise of other tokens.
    Only this makes better text: noise of its own is independent of all that a token must fit."""
    T, gains = student.embed_pos.num_embeddings, []
    x0 = gd.generate(teacher, n, T, seed)
    g, n_masked = gd.rng(seed, "probe", device=x0.device), max(1, round(share * T))
    for rows in x0.split(16):
        rank = torch.rand(rows.shape, generator=g, device=x0.device).argsort(dim=1)
        is_masked = rank < n_masked
        is_guessed = rank[is_masked] == 0                       # (M,)
        xt, target = torch.where(is_masked, student.mask_id, rows), rows[is_masked]
        true = student.label(teacher.logp(teacher.hidden(rows)[is_masked]), target, g)
        fresh = gd.sample_gumbel(true.shape, g, true.dtype)
        own = torch.where(is_guessed[:, None], true, fresh)
        student.x0 = rows                                       # blocks see the text before them
        nll = [student.net.nll(student(xt, xi), target) for xi in (true, own, fresh)]
        student.x0 = None
        A, B, D = torch.stack(nll)[:, is_guessed]               # (b,) each
        gains.append(torch.stack([D - A, B - A]))
    gain, cross_gain = torch.cat(gains, dim=1).cpu().numpy()
    row = {}
    row["gain"], row["gain_se"] = ratio(gain, np.ones(n))
    row["cross_gain"], row["cross_gain_se"] = ratio(cross_gain, np.ones(n))
    return row


# --- Command line ---------------------------------------------------------------------------------
def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], help="checkpoints (the newest student under out/)")
    add("-n", type=int, default=1000, help="number of texts (1000)")
    add("--nfe", type=int, nargs="+", default=[8], help="steps, one or more numbers (8)")
    add("--tau", type=float, nargs="+", default=[None], help="scales of the noise (1)")
    add("--temperature", type=float, nargs="+", default=[None], help="0: argmax (the model's way)")
    add("--top-p", type=float, help="draw from the likeliest tokens of this probability (1)")
    add("--floors", action="store_true", help="also judge texts that no model wrote")
    add("--judge", help="a causal model of transformers, its folder, or teacher: our own AR model "
        "(gpt2-large for text, teacher for maze and cities)")
    add("--teacher", help="its checkpoint (teacher.pt beside the first of --ckpt)")
    add("--seed", type=int, default=0, help="seed of all draws (0)")
    add("--device", default="cuda" if gd.HAS_GPU else "cpu", help="cpu or cuda")
    add("--out-dir", default="out/judge", help="folder of judged.json (out/judge)")
    return parser.parse_args(words)


def config_from(settings, base=gd.Config):
    """The settings, a dict, as a Config of their dataset. What it does not know is left out."""
    config = base if settings["dataset"] == "maze" else config_of(settings["dataset"], base)
    return config(**{name: value for name, value in settings.items() if hasattr(config, name)})


def student_rows(name, model, saved, judge, teacher, written, args):
    """The rows of a student, one for each setting of its sampler. written: the teacher's texts"""
    (n, T), seed, same, hows = written.shape, args.seed, gd.fingerprint(teacher), []
    for nfe, tau, temperature in itertools.product(args.nfe, args.tau, args.temperature):
        given = argparse.Namespace(nfe=nfe, tau=tau, temperature=temperature, top_p=args.top_p)
        how = settings_of(name, model, saved, given, torch.full((T,), model.vocab_size))
        hows += [how] if how not in hows else []
    about = {}
    if model.reads_noise:
        for end, share in ("", 1.0), ("_50", 0.5), ("_15", 0.15):
            gains = probe(model, teacher, n, share, seed)
            about.update({score + end: value for score, value in gains.items()})
    for how in tqdm(hows, desc=name, disable=None):
        model.draw = partial(nucleus, temperature=how["temperature"], top_p=how["top_p"])
        x = gd.generate(model, n, T, seed, how["nfe"], tau=how["tau"])
        row = dict(model=name, **how, **judge.scores(x, name), **about)
        if saved["about"]["teacher"] == gd.fingerprint(teacher):
            equal = (x == written).double()
            row.update(agree_token=equal.mean().item(), agree_seq=equal.prod(1).mean().item())
        yield row


def main(words=None):
    args = parse(words)
    loaded = load_models(args.ckpt, args.device)
    path, (model, _, saved) = next(iter(loaded.items()))
    if not isinstance(model, gd.Teacher):
        path = args.teacher or f"{os.path.dirname(path)}/teacher.pt"
    loaded = {**load_models([path], args.device), **loaded}
    teacher, n, seed = loaded[path][0], args.n, args.seed
    cfg = config_from(dict(saved["config"], device=args.device))
    data = cfg.load()
    for name, (_, _, saved) in loaded.items():
        if saved["tokenizer"] != data.tokenizer:
            raise gd.UserError(f"{name} has other tokens than the text at hand: restore the text, "
                               "or train again")
        if data.fingerprint not in saved["about"]["data"]:
            note(f"{name} was trained on another text than the one at hand")
        if saved["about"]["teacher"] not in (None, gd.fingerprint(teacher)):
            note(f"{name} learned from another teacher than {path}: no agreement with its texts")
    real = data.val[:2 * n]
    if cfg.dataset == "maze":  # 51 paths, equally likely
        real = data.val[torch.randint(51, (2 * n,), generator=gd.rng(seed, "real"))]
    real, other = real.to(args.device).chunk(2)
    reader = args.judge or ("teacher" if data.tokenizer["sep"] else "gpt2-large")
    judge = Judge(data, real, load_reader(reader, teacher))
    written = gd.generate(teacher, n, cfg.seq_len, seed)
    texts = {"other real text": other, "teacher": written}
    if args.floors:
        texts.update(floors(data, n, seed))
    rows = [dict(model=name, **judge.scores(x.to(args.device), name))
            for name, x in tqdm(texts.items(), desc="judge", disable=None)]
    for name, (model, _, saved) in loaded.items():
        if not isinstance(model, gd.Teacher):
            rows += student_rows(name, model, saved, judge, teacher, written, args)
            if not model.reads_noise:
                rows[-1]["nelbo"] = gd.mean_loss(model, real, cfg)
    columns = [column for column in COLUMNS
               if len({row.get(column) for row in rows} - {None}) > (column in SETTINGS)]
    width = max(len(row["model"]) for row in rows)
    gd.print_table([{"model".rjust(width): row["model"].rjust(width),
                     **{column: row.get(column, "") for column in columns}} for row in rows])
    for column, name in fooled(rows):
        print(f"fooled: {column} prefers {name!r} to real text")
    if any(row.get("energy", 0) < 0 for row in rows):
        print("an energy below 0: the estimate has no bias, so where the distance is 0 it may be")
    os.makedirs(args.out_dir, exist_ok=True)
    path = f"{args.out_dir}/judged.json"
    temporary = f"{path}.{secrets.token_hex(4)}"
    with open(temporary, "w") as f:
        json.dump(rows, f, indent=1)
    os.replace(temporary, path)                                 # whole, or not at all
    print(f"{path} has standard errors and more scores")


if __name__ == "__main__":
    main()
