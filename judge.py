"""Judge what trained models write: a table of scores, for each model and setting of its sampler.

    python judge.py                                        # the newest student under out/
    python judge.py --ckpt A.pt B.pt --nfe 1 4 16 --floors --judge teacher
"""

import argparse
import itertools
import json
import math
import os
import re
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import gumbel_distill as gd
from data import Tokenizer, config_of, load_transformers
from sample import check_ranges, load_models, note, nucleus, settings_of

SETTINGS = ["nfe", "tau", "temperature", "top_p"]
COLUMNS = ["model", *SETTINGS, "gen_ppl", "entropy", "mauve", "energy", "words", "pairs", "valid",
           "tv", "gain", "cross_gain"]


# --- Readers of texts: our own AR model, or (model, tokenizer) of transformers --------------------
@torch.no_grad()
def own_read(teacher, x):
    """Of texts x (N, T), by our own AR model: the sum of -log p in nats and the number of tokens,
    without the first one and ends of text; features (N, 2 C), the mean state of each half."""
    parts = []
    for rows in x.split(16):
        h = teacher.hidden(rows)                                # (b, T, C)
        nll = -teacher.logp(h[:, 1:]).gather(-1, rows[:, 1:, None])[..., 0]
        is_scored = rows[:, 1:] != teacher.bos_id
        halves = h.float().tensor_split(2, dim=1)               # of repeated text they are alike
        features = torch.cat([half.mean(dim=1) for half in halves], dim=1)
        parts.append(((nll * is_scored).sum(dim=1), is_scored.sum(dim=1), features))
    return [torch.cat(part).cpu().numpy() for part in zip(*parts)]


@torch.no_grad()
def hf_read(model, tokenizer, words, x):
    """The same by a model of transformers, which has tokens of its own; in windows that overlap by
    half where a text is longer than it reads. Features are last hidden states (N, C)."""
    longest = getattr(model.config, "max_position_embeddings", 1024)
    half, scores, features = longest // 2, np.zeros((2, len(x))), []
    for i, ids in enumerate(x.tolist()):
        text = words.decode(ids).replace("<|endoftext|>", tokenizer.eos_token or "")
        ids = torch.tensor(tokenizer.encode(text) or [tokenizer.eos_token_id], device=model.device)
        for start in range(0, max(1, len(ids) - longest + half), half):
            window = ids[start:start + longest]
            out = model(window[None], output_hidden_states=True)
            logp = out.logits[0, :-1].float().log_softmax(dim=-1)          # (L - 1, V)
            is_scored = window[1:] != tokenizer.eos_token_id
            if start == 0:
                features.append(out.hidden_states[-1][0, -1].float().cpu())
            else:  # the window before has scored these
                is_scored[:longest - half - 1] = False
            nll = -logp.gather(-1, window[1:, None])[is_scored].sum().item()
            scores[:, i] += nll, is_scored.sum().item()
    return *scores, torch.stack(features).numpy()


def load_reader(name, device):
    """A causal model of transformers, which --judge names, and its tokenizer."""
    model, tokenizer = load_transformers(name, "--judge", "the word teacher: our own AR model")
    return model.to(device), tokenizer


# --- Scores and their standard errors -------------------------------------------------------------
def bootstrap(statistic, n, n_draws=200):
    """A statistic of n texts, and its standard error: n of them are drawn anew, again and again.
    statistic(weights) is told how often each was drawn, (n,)."""
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
    scores = []                                                 # of p, and of n rows drawn from it
    stderr = os.dup(2)                                          # faiss warns of few points in C++
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        from mauve import compute_mauve
        for seed in seeds:
            drawn = p[np.random.default_rng(seed).integers(len(p), size=len(p))]
            scores.append([compute_mauve(p_features=f, q_features=q, seed=seed).mauve
                           for f in (p, drawn)])
    except (Exception, SystemExit) as e:  # not installed, or broken: any type
        raise ValueError(f"mauve-text fails ({type(e).__name__}: {e})") from e
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    scores, redrawn = np.array(scores).T
    return float(scores.mean()), float(redrawn.std(ddof=1))


def energy_distance(p, q):
    """Energy distance (Szekely and Rizzo 2013) of features p (n, d) and q (m, d), unbiased:
        2 E|P - Q| - E|P - P'| - E|Q - Q'|
    It is 0 where both have one distribution (an estimate may be negative), else above 0."""
    p, q = torch.as_tensor(p, dtype=torch.double), torch.as_tensor(q, dtype=torch.double)
    if min(len(p), len(q)) < 10 or not (p.isfinite().all() and q.isfinite().all()):
        raise ValueError("it takes 10 texts, of two tokens or more")
    to_q = torch.cdist(p, q).mean(dim=1).numpy()                # (n,)
    within_p = torch.cdist(p, p).numpy()                        # (n, n)
    within_q = torch.cdist(q, q).sum().item() / (len(q)**2 - len(q))
    # n @ n of the pairs are a text and itself: they do not count
    return bootstrap(lambda n: 2 * n @ to_q / n.sum() - within_q
                     - n @ within_p @ n / (n.sum()**2 - n @ n), len(p))


def words_of(text):
    """Runs of English letters, lower-cased; not the first and the last, which may be cut off."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.replace("<|endoftext|>", " ").lower())[1:-1]


class Judge:
    """Scores texts, some in comparison with texts `real`. reader: Teacher or (model, tokenizer)"""

    def __init__(self, data, real, reader, with_mauve=True):
        self.data, self.with_mauve = data, with_mauve
        self.tokenizer, self.known = Tokenizer(**data.tokenizer), set()
        self.read = partial(own_read, reader)
        if not isinstance(reader, gd.Teacher):
            self.read = partial(hf_read, *reader, self.tokenizer)
        self.reference = self.read(real)[2]
        if not self.tokenizer.sep:  # running text: its words and its pairs of words are known
            T, n = real.size(1), min(data.n_train, 20_000_000)
            for index in torch.arange(0, n, T).split(1 + 2**20 // T):
                words = words_of(self.tokenizer.decode(data.rows(index).flatten()))
                self.known.update(words, zip(words, words[1:]))

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
        """Scores NAME of texts x (N, T), with errors NAME_se; what is left out, stderr says."""
        nll, n_tokens, features = self.read(x)
        counts = [self.count(ids) for ids in x.tolist()]
        ways = {score: partial(ratio, *zip(*[of_text[score] for of_text in counts]))
                for score in counts[0]}
        ways["gen_ppl"] = partial(ratio, nll, n_tokens, np.exp)
        ways["energy"] = partial(energy_distance, features, self.reference)
        if self.with_mauve:
            ways["mauve"] = partial(mauve, features, self.reference)
        row = {}
        for score, way in ways.items():
            try:
                row[score], row[score + "_se"] = way()
            except ValueError as e:
                note(f"no {score} of {name}: {e}")
        return {**row, **self.data.judge(x)}


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


@torch.no_grad()
def probe(student, teacher, n, share=1.0, seed=0, n_fresh=16):
    """It guesses one token each of n texts of the teacher, of which a share is masked. Its cross-
    entropy in nats is A with the noise of the text, B with the noise of the guessed token alone, D
    with none: where noise is unknown, probabilities are averaged over n_fresh draws of fresh noise
    (few draws make B and D a little too large).
    Returns gain = D - A, and cross_gain = B - A, what the noise of other tokens tells (only this
    makes better text, see docs/text.md), with standard errors."""
    x0, losses = gd.generate(teacher, n, student.embed_pos.num_embeddings, seed), []
    g, n_masked = gd.rng(seed, "probe", device=x0.device), max(1, round(share * x0.size(1)))
    for rows in x0.split(16):
        rank = torch.rand(rows.shape, generator=g, device=x0.device).argsort(dim=1)
        is_masked = rank < n_masked
        is_guessed = rank[is_masked] == 0                       # (M,)
        xt, target = torch.where(is_masked, student.mask_id, rows), rows[is_masked]
        true = student.label(teacher.logp(teacher.hidden(rows)[is_masked]), target, g)
        student.x0 = rows                                       # blocks see the text before them
        known = [-student.net.nll(student(xt, true), target)[is_guessed]]  # logp (b,)
        own, none = [], []
        for _ in range(n_fresh):
            fresh = gd.sample_gumbel(true.shape, g, true.dtype)
            alone = torch.where(is_guessed[:, None], true, fresh)
            own.append(-student.net.nll(student(xt, alone), target)[is_guessed])
            none.append(-student.net.nll(student(xt, fresh), target)[is_guessed])
        losses.append(torch.stack([math.log(len(logp)) - torch.stack(logp).logsumexp(dim=0)
                                   for logp in (known, own, none)]))       # (3, b)
    student.x0 = None
    A, B, D = torch.cat(losses, dim=1).cpu().numpy()
    return dict(zip(("gain", "gain_se", "cross_gain", "cross_gain_se"),
                    ratio(D - A, np.ones(n)) + ratio(B - A, np.ones(n))))


# --- Command line ---------------------------------------------------------------------------------
def config_from(settings, base=gd.Config, **more):
    """Settings, a dict, as a Config of their dataset, which leaves out what it does not know."""
    config = base if settings["dataset"] == "maze" else config_of(settings["dataset"], base)
    return config(**{k: v for k, v in {**settings, **more}.items() if hasattr(config, k)})


def parse(words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], help="checkpoints (the newest student under out/)")
    add("-n", type=int, default=1000, help="number of texts (1000)")
    add("--nfe", type=int, nargs="+", default=[8], help="steps, one or more numbers (8)")
    add("--tau", type=float, nargs="+", default=[None], help="scales of the noise (1)")
    add("--temperature", type=float, nargs="+", default=[None], help="0: argmax (the model's way)")
    add("--top-p", type=float, help="draw from the likeliest tokens of this probability (1)")
    add("--floors", action="store_true", help="also judge texts that no model wrote")
    add("--judge", help="a model of transformers, or teacher (gpt2-large; teacher for toys)")
    add("--seed", type=int, default=0, help="seed of all draws (0)")
    add("--device", default=gd.Config.device, help="cpu or cuda")
    add("--out-dir", default="out/judge", help="folder of judged.json (out/judge)")
    return check_ranges(parser.parse_args(words))


def main(words=None):
    args = parse(words)
    os.makedirs(args.out_dir, exist_ok=True)
    loaded = load_models(args.ckpt, args.device)
    path, (_, _, saved) = next(iter(loaded.items()))
    cfg = config_from(saved["config"], device=args.device)
    data, n, seed, own = cfg.load(), args.n, args.seed, {}
    if data.pretrained:
        path = cfg.teacher
        teacher = gd.Teacher(cfg, data.vocab_size, data.bos_id, data.pretrained).to(args.device)
    else:
        path = os.path.join(os.path.dirname(path), "teacher.pt")
        own = load_models([path], args.device)
        teacher = own[path][0]
    for name, (_, tokenizer, saved) in {**own, **loaded}.items():
        if tokenizer.state != Tokenizer(**data.tokenizer).state:
            raise gd.UserError(f"{name} has other tokens than the text at hand: restore the text")
        if data.fingerprint not in saved["about"]["data"]:
            note(f"{name} learned from another text than the one at hand")
        if saved["about"]["teacher"] not in (None, gd.fingerprint(teacher)):
            note(f"{name} learned from another teacher than {path}: no agreement with its texts")
    real = data.val[:2 * n]
    if cfg.dataset == "maze":  # 51 paths, equally likely
        real = data.val[torch.randint(51, (2 * n,), generator=gd.rng(seed, "real"))]
    if len(real) < 20:
        raise gd.UserError(f"-n {n}: judging takes 20 real texts or more, and here are {len(real)}")
    real, other = real.to(args.device).chunk(2)
    reader = args.judge or ("teacher" if data.tokenizer["sep"] else "gpt2-large")
    judge = Judge(data, real, teacher if reader == "teacher" else load_reader(reader, args.device))
    written = gd.generate(teacher, n, cfg.seq_len, seed)
    texts = {"other real text": other, "teacher": written}
    texts.update(floors(data, n, seed) if args.floors else {})
    rows = [dict(model=name, **judge.scores(x.to(args.device), name))
            for name, x in tqdm(texts.items(), "judge", disable=None)]
    for name, (model, _, saved) in loaded.items():
        known = torch.full((cfg.seq_len,), data.vocab_size)
        given = itertools.product(args.nfe, args.tau, args.temperature, [args.top_p])
        hows = [settings_of(name, model, saved, known, dict(zip(SETTINGS, one))) for one in given]
        hows = [how for i, how in enumerate(hows) if how not in hows[:i]]
        about = probe(model, teacher, n, seed=seed) if model.reads_noise else dict(
            nelbo=gd.mean_loss(model, real, cfg))
        for how in tqdm(hows, name, disable=None):
            model.draw = partial(nucleus, temperature=how["temperature"], top_p=how["top_p"])
            x = gd.generate(model, n, cfg.seq_len, seed, how["nfe"], tau=how["tau"])
            rows.append(dict(model=name, **how, **judge.scores(x, name), **about))
            rows[-1]["teacher_nll"] = gd.mean_loss(teacher, x, cfg)
            if saved["about"]["teacher"] == gd.fingerprint(teacher):
                equal = (x == written).double()
                rows[-1]["agree_token"] = equal.mean().item()
                rows[-1]["agree_seq"] = equal.prod(dim=1).mean().item()
    path = f"{args.out_dir}/judged.json"
    with open(path + ".tmp", "w") as f:
        json.dump(rows, f, indent=1)
    os.replace(path + ".tmp", path)                             # whole, or not at all
    shown = [c for c in COLUMNS if len({str(row[c]) for row in rows if c in row}) > (c in SETTINGS)]
    gd.print_table([{column: row.get(column, "") for column in shown} for row in rows])
    print(f"An energy below 0 is an estimate of 0. {path} has standard errors and more scores")


if __name__ == "__main__":
    main()
