"""Gumbel Distillation for Parallel Text Generation, in one file.

Paper: Zhang, Hu, Liu and Liu, ICLR 2026, arXiv 2603.22216. Official code: hxixixh/gumbel-distill

    python gumbel_distill.py                                           # the maze: minutes on a CPU
    python gumbel_distill.py --dataset cities                          # toy sentences, likewise
    python gumbel_distill.py --dataset text --train-files input.txt    # your own text
    python gumbel_distill.py --dataset lm1b                            # LM1B, on one GPU

A parallel decoder fills many positions at once and draws their tokens independently, so "San" can
meet "Angeles". An autoregressive (AR) teacher draws one token after the other, each draw being
argmax(logp + xi) with Gumbel noise xi. Given that noise its text is determined: hand the noise to
the parallel student, and learning a joint distribution becomes learning a map from noise to text.
The noise that belongs to a real text is drawn from a closed-form posterior, in one teacher pass.

Glossary (V = vocab_size, T = seq_len, M = number of masked positions in a batch)
    x0, xt      (B, T) long   clean and masked token ids; BOS is not among them
    t           (B, T/L')     time in (0, 1], one for each block of L' = block_size tokens; MDLM has
                              L' = T. P(token masked) = t, P(token kept) = alpha_t = 1 - t
    xi          (B, T, V)     Gumbel noise; xi[:, i] decides token i, given the tokens before it
    logits      (B, T, V)     logp: logits normalised over V, in nats
    is_masked   (B, T) bool   where xt is [MASK], the id mask_id = V: an input row, never an output
    nfe                       number of function evaluations = denoising steps of a sample
    tau                       scale of xi when sampling; 1 as trained

What differs from the paper and the official code stands in README.md, "Differences".
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# torchrun starts WORLD processes with numbers RANK from 0; without it there is one.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """Something the user can mend; the message names the value and the cure."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# -----------------------------------------------------------------------------
# 1. Config: every field is a command-line flag of the same name

def option(default, help, choices=None, low=None, high=math.inf):
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class Config:
    """Settings of a run. None means: as PRESETS says for the dataset."""
    # data
    dataset: str = option("maze", "what to learn", ["maze", "cities", "text", "lm1b", "owt"])
    train_files: str = option(None, "text, .jsonl or .parquet: a file or a quoted glob; or the hub")
    val_files: str = option(None, "files to validate on; or the last 10%% of the training text")
    tokenizer: str = option(None, "tokens of text; gpt2-N: the first N of GPT-2's, for a CPU",
                            ["char", "gpt2", "gpt2-1024", "gpt2-4096"])
    seq_len: int = option(None, "tokens per sequence", low=2)
    max_tokens: int = option(None, "use at most this many training tokens", low=1)
    # model: teacher and students have one shape
    n_layer: int = option(None, "Transformer blocks", low=1)
    n_head: int = option(None, "attention heads", low=1)
    n_embd: int = option(None, "width", low=2)
    dropout: float = option(None, "dropout probability", low=0, high=0.9)
    block_size: int = option(None, "BD3-LM's block length; seq_len, the default, is MDLM", low=1)
    init_from: str = option(None, "checkpoint of a student whose weights to start from")
    # noise
    noise: str = option("none,gumbel", "one student for each; independent: of the text, a control",
                        ["none", "gumbel", "gaussian", "uniform", "independent"])
    noise_map: str = option(None, "noise -> embedding; softmax is the paper's",
                            ["softmax", "raw", "learned", "draft"])
    inject: str = option("replace", "noise embedding in place of [MASK]'s, or added (draft: added)",
                         ["replace", "add"])
    labels: str = option("data", "real text with posterior noise, the teacher's texts, or in turn",
                         ["data", "teacher", "mixture"])
    loss: str = option("ce", "cross-entropy with the text, or with the teacher's distributions",
                       ["ce", "kd"])
    clip: bool = option(False, "BD3-LM's clipped schedule: times where the loss varies least")
    teacher: str = option(None, "a checkpoint, gpt2, gpt2-large or a folder; or --out-dir's own")
    # training
    batch_size: int = option(None, "sequences per optimiser step; of sample.py: texts at once",
                             low=1)
    grad_accum: int = option(None, "pieces to split a batch into, to save memory", low=1)
    max_steps: int = option(None, "optimiser steps of each model", low=1)
    teacher_steps: int = option(None, "of the teacher, if not --max-steps", low=1)
    lr: float = option(None, "peak learning rate of AdamW", low=0)
    warmup: int = option(None, "steps of linear warm-up", low=0)
    schedule: str = option(None, "learning rate after the warm-up", ["cosine", "constant"])
    ema: float = option(None, "decay per step of the averaged weights; 0: none", low=0, high=1)
    eval_every: int = option(None, "steps between validations; each writes the checkpoint", low=1)
    # sampling
    nfe: str = option(None, "function evaluations per sample (BD3-LM: per block), like 1,2,4")
    tau: str = option("1", "scale of the noise, or several, like 0.8,1")
    temperature: str = option(None, "of the student, or several; with noise 0 (argmax), without 1")
    top_p: float = option(1.0, "nucleus: the likeliest tokens of this total", low=0, high=1)
    order: str = option("random", "which masked tokens to fill first",
                        ["random", "first-hitting", "confidence", "left"])
    apd: float = option(0.5, "R of adaptive parallel decoding; 0 is exact mode", low=0, high=1)
    lookahead: int = option(10, "tokens that one round of --apd may fill", low=1)
    n_samples: int = option(None, "samples per row of the table", low=1)
    # machine
    seed: int = option(0, "seed of every random draw")
    device: str = option("auto", "auto: a GPU if there is one", ["auto", "cpu", "cuda"])
    dtype: str = option("auto", "of the training; auto: bfloat16 on a GPU, else float32",
                        ["auto", "float32", "bfloat16"])
    compile: str = option("auto", "torch.compile the Transformer blocks; auto: on a GPU",
                          ["auto", "on", "off"])
    resume: bool = option(False, "go on with an interrupted run")
    ablate: bool = option(False, "train and print the table of ablation.py")
    out_dir: str = option(None, "folder of this run (out/<dataset>; of sample.py out/eval)")


COMMON = dict(
    noise_map="draft", dropout=0.0, grad_accum=1, warmup=100, schedule="cosine", ema=0.999)
WEB = dict(
    noise_map="draft", tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, dropout=0.1, lr=3e-4,
    grad_accum=4, warmup=2500, schedule="constant", ema=0.9999, eval_every=1000,
    max_steps=20_000, teacher_steps=20_000)
PRESETS = {
    "maze": dict(
        COMMON, seq_len=10, n_layer=4, n_head=2, n_embd=64, batch_size=64, lr=2e-3,
        max_steps=3500, teacher_steps=2500, eval_every=500, nfe="1,2,3,5,10", n_samples=4000),
    "cities": dict(
        COMMON, seq_len=19, n_layer=4, n_head=2, n_embd=64, batch_size=64, lr=2e-3,
        max_steps=4000, teacher_steps=1500, eval_every=500, nfe="1,2,4,8,19", n_samples=1000),
    "text": dict(
        COMMON, tokenizer="char", seq_len=64, n_layer=4, n_head=4, n_embd=128,
        batch_size=32, lr=2e-3, max_steps=1500, teacher_steps=1500, eval_every=300, nfe="1,4,16,64",
        n_samples=200),
    "lm1b": dict(WEB, seq_len=128, batch_size=256, nfe="4,16,64", n_samples=256),
    "owt": dict(WEB, seq_len=1024, batch_size=32, nfe="16,64,256", n_samples=32),
}


def flag(name):
    return "--" + name.replace("_", "-")


def resolve(cfg):
    """Fill in the dataset's preset and check every value; returns a new Config."""
    given = {k: v for k, v in vars(cfg).items() if v is not None}
    preset = PRESETS.get(cfg.dataset, {})
    if cfg.max_steps is not None:
        preset = {**preset, "teacher_steps": cfg.max_steps}
    cfg = Config(**{**preset, "out_dir": f"out/{cfg.dataset}", **given})
    for f in dataclasses.fields(Config):
        value, meta = getattr(cfg, f.name), f.metadata
        if value is None:
            continue
        names = value.split(",") if f.name == "noise" else [value]
        if meta["choices"] and not set(names) <= set(meta["choices"]):
            raise UserError(f"{flag(f.name)} {value}: choose from {', '.join(meta['choices'])}")
        low, high = meta["low"], meta["high"]
        if low is not None and not low <= value <= high:
            raise UserError(f"{flag(f.name)} {value}: must lie between {low} and {high}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu or auto")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("nfe", "tau", "temperature"):
        numbers(cfg, name)
    cfg.block_size = cfg.block_size or cfg.seq_len
    if cfg.seq_len % cfg.block_size:
        raise UserError(f"--block-size {cfg.block_size}: must divide --seq-len {cfg.seq_len}")
    if cfg.n_embd % (2 * cfg.n_head):
        raise UserError(f"--n-embd {cfg.n_embd}: must be a multiple of {2 * cfg.n_head}, twice "
                        "--n-head")
    if cfg.grad_accum % WORLD:
        cfg.grad_accum *= WORLD
    if cfg.batch_size % cfg.grad_accum:
        raise UserError(f"--batch-size {cfg.batch_size} does not split into --grad-accum "
                        f"{cfg.grad_accum} equal pieces")
    is_generated = cfg.dataset in ("maze", "cities")
    for name in ("train_files", "val_files", "tokenizer", "seq_len", "max_tokens"):
        if is_generated and getattr(cfg, name) != preset.get(name):
            raise UserError(f"{flag(name)} goes with --dataset text, lm1b or owt; {cfg.dataset} is "
                            "generated")
    return cfg


def numbers(cfg, name):
    """--nfe 1,2,4 -> [1, 2, 4]; whole numbers from 1 up, for other flags numbers from 0 up"""
    text = getattr(cfg, name)
    kind, low, what = (int, 1, "whole numbers") if name == "nfe" else (float, 0, "numbers")
    try:
        values = [kind(k) for k in text.split(",")] if text is not None else []
    except ValueError:
        values = [-1]
    if not all(low <= k < math.inf for k in values):
        raise UserError(f"{flag(name)} {text}: give {what} from {low} up, like 1,2,4")
    return values


def rng(*key, device="cpu"):
    """A torch.Generator seeded by `key`, e.g. (seed, "batch", step).

    Every draw of a run is keyed by what it is for, never by what was drawn before it: a resumed
    run sees the same noise, and so does a text that is sampled in another batch.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
    return torch.Generator(device).manual_seed(seed)


# -----------------------------------------------------------------------------
# 2. Data: the maze -> batches of token ids; toy sentences and running text: text.py

class Tokenizer:
    """A list of words joined by `sep` or, with words None, the first `size` tokens of GPT-2's BPE.

    bos_id is what the teacher puts in front: <|endoftext|> of GPT-2, else vocab_size, an input row
    of its own. eos_ids end a document. `state` rebuilds the tokenizer: Tokenizer(**state).
    """

    def __init__(self, words=None, sep="", size=50257):
        self.words, self.sep = words, sep
        if words is None:
            from text import load_gpt2_bpe
            self.bpe = load_gpt2_bpe(size)
            self.vocab_size, self.bos_id = size, self.bpe.eot_token
            self.eos_ids = [self.bos_id]
        else:
            self.ids = {w: i for i, w in enumerate(words)}
            self.vocab_size = self.bos_id = len(words)
            self.eos_ids = [self.ids["\n"]] if "\n" in self.ids else []
        self.state = {"words": words, "sep": sep, "size": size}

    def encode(self, text, where="the text"):
        """Token ids of a text, uint16; UserError for what the vocabulary lacks."""
        return np.array(self.encode_batch([text], where)[0], dtype=np.uint16)

    def encode_batch(self, texts, where="the text"):
        """One list of token ids for each text; GPT-2's BPE works on all cores."""
        if self.words is None:
            return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        texts = [text.split() if self.sep else text for text in texts]
        unknown = sorted(set().union(*texts) - self.ids.keys())
        if unknown:
            raise UserError(f"{where}: {unknown[0]!r} is not among the {self.vocab_size} tokens of "
                            f"the training text ({self.words[0]!r} to {self.words[-1]!r}); leave "
                            "it out, or train on text that has it")
        return [[self.ids[piece] for piece in text] for text in texts]

    def decode(self, ids):
        if self.words is None:
            return self.bpe.decode([int(i) for i in ids])
        return self.sep.join(self.words[int(i)] for i in ids)


class Data:
    """Token ids: train and val, 1-D uint16 arrays, read as sequences of seq_len.

    stride    distance between the starts of training sequences; 1 in running text
    judge(x)  metrics of generated ids (N, T), a dict
    """

    def __init__(self, train, val, seq_len, tokenizer, stride=1, judge=None):
        for name, tokens in (("training", train), ("validation", val)):
            if len(tokens) < seq_len:
                raise UserError(f"the {name} text has {len(tokens)} tokens, too few: one sequence "
                                f"has {seq_len}; give more text, or a smaller --seq-len")
        self.train, self.val, self.seq_len, self.tokenizer = train, val, seq_len, tokenizer
        self.stride, self.judge = stride, judge or (lambda x: {})
        self.n_train = (len(train) - seq_len) // stride + 1
        digest = hashlib.sha1(repr((tokenizer.state, len(train))).encode())
        digest.update(np.ascontiguousarray(train[:2**20]))
        self.fingerprint = digest.hexdigest()[:12]

    def rows(self, index):
        """Training sequences number `index` (n,) -> (n, T) long."""
        starts = np.asarray(index)[:, None] * self.stride
        return torch.from_numpy(self.train[starts + np.arange(self.seq_len)].astype(np.int64))

    def val_rows(self, n):
        """The first validation sequences, n at most, without overlap -> (<= n, T) long."""
        n = min(n, len(self.val) // self.seq_len)
        tokens = self.val[:n * self.seq_len].astype(np.int64)
        return torch.from_numpy(tokens).view(n, self.seq_len)


def total_variation(counts, n_outside=0):
    """Distance from uniform of counts over the allowed outcomes, n_outside draws being others."""
    share = np.append(counts, n_outside) / max(1, counts.sum() + n_outside)
    return 0.5 * float(np.abs(share - np.append(np.full(len(counts), 1 / len(counts)), 0)).sum())


def tv_exact_sampler(n_outcomes, n):
    """The total variation that n exact draws from n_outcomes still show (mean of simulations)."""
    draws = np.random.default_rng(0).multinomial(n, np.full(n_outcomes, 1 / n_outcomes), size=50)
    return float(np.mean([total_variation(d) for d in draws]))


END = "<end>"                  # fills a short sentence up
MAZE_SIZE = 6
MAZE = """
+---+---+---+---+---+---+
|                   |   |
+   +   +   +   +   +---+
|                       |
+   +   +   +---+   +   +
|   |   |               |
+   +   +   +   +   +   +
|       |               |
+   +   +---+---+   +   +
|   |               |   |
+   +---+   +   +   +   +
|                       |
+---+---+---+---+---+---+
""".strip().split("\n")


def maze_paths(row=0, col=0):
    """All shortest paths from a cell of MAZE to the bottom right one, lists of the cells entered.

    Cell (row, col) is token 6 row + col. The start is implied; a shortest path goes right or down.
    """
    if row == col == MAZE_SIZE - 1:
        return [[]]
    is_open = {(row, col + 1): MAZE[2 * row + 1][4 * col + 4] == " ",
               (row + 1, col): MAZE[2 * row + 2][4 * col + 2] == " "}
    return [[MAZE_SIZE * r + c] + rest for r, c in is_open if is_open[r, c]
            for rest in maze_paths(r, c)]


def draw_maze(path):
    """MAZE as text with the start and the cells of `path` (token ids) marked."""
    canvas = [list(line) for line in MAZE]
    for cell in [0, *path]:
        canvas[2 * (int(cell) // MAZE_SIZE) + 1][4 * (int(cell) % MAZE_SIZE) + 2] = "o"
    return "\n".join("".join(line) for line in canvas)


def load_maze(cfg):
    """Paths drawn uniformly from all the shortest ones, so that the true distribution is known."""
    paths = np.array(maze_paths(), dtype=np.uint16)             # (51, 10)
    number = {tuple(p): i for i, p in enumerate(paths.tolist())}

    def judge(x):
        hits = [number[tuple(p)] for p in x.tolist() if tuple(p) in number]
        counts = np.bincount(hits, minlength=len(paths))
        return {"valid": len(hits) / len(x), "distinct": int((counts > 0).sum()),
                "distinct_of": len(paths), "tv": total_variation(counts, len(x) - len(hits)),
                "tv_exact_sampler": tv_exact_sampler(len(paths), len(x))}

    rows = paths[np.random.default_rng(0).integers(len(paths), size=22_000)]
    words = ["abcdef"[i % MAZE_SIZE] + str(i // MAZE_SIZE + 1) for i in range(MAZE_SIZE**2)]
    return Data(rows[:20_000].ravel(), rows[20_000:].ravel(), cfg.seq_len, Tokenizer(words, " "),
                stride=cfg.seq_len, judge=judge)


def load_data(cfg):
    if cfg.dataset == "maze":
        return load_maze(cfg)
    import text  # toy sentences, files, the Hugging Face hub
    return text.load_cities(cfg) if cfg.dataset == "cities" else text.load_text(cfg)


def show(ids, dataset, tokenizer):
    """One sequence of token ids (T,) as text to print; of the maze's length, as a drawing."""
    if dataset == "maze" and len(ids) == PRESETS["maze"]["seq_len"]:
        return draw_maze(ids)
    return tokenizer.decode(ids).split(" " + END)[0]


# -----------------------------------------------------------------------------
# 3. Transformer: one for teacher (causal) and students (full or block-wise attention)

class Block(nn.Module):
    """Pre-norm attention and MLP, without biases.

    The MLP has ReLU^2 (So et al. 2021) where the official student has tanh-GELU: noise must be
    compared, which it learns in fewer steps (README, "Differences"), and it is faster on a CPU.
    """

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.norm1 = nn.LayerNorm(n_embd, bias=False)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.attn_out = nn.Linear(n_embd, n_embd, bias=False)
        self.norm2 = nn.LayerNorm(n_embd, bias=False)
        self.mlp_in = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.mlp_out = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, rope, mask, is_causal, cache):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)                        # (3, B, nh, T, hs)
        (q, k), v = rotate(qkv[:2], *rope), qkv[2]
        if cache is not None:
            k, v = cache.extend(self, k, v)                     # (B, nh, start + T, hs)
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask)        # knows no dropout
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                               dropout_p=self.dropout if self.training else 0.0)
        y = self.attn_out(y.transpose(1, 2).reshape(B, T, C))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp_out(F.relu(self.mlp_in(self.norm2(x))).square())
        return x + F.dropout(y, self.dropout, self.training)


def rotary(pos, head_size):
    """cos and sin of the rotary angles at positions pos (T,), each (T, head_size)."""
    freq = 10000.0 ** (-torch.arange(0, head_size, 2, device=pos.device) / head_size)
    angle = (pos[:, None] * freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-x2, x1], dim=-1) * sin).to(x.dtype)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class KVCache:
    """Keys and values of the `start` positions seen so far, for every block of a Transformer."""

    def __init__(self, max_len):
        self.max_len, self.start, self.kv = max_len, 0, {}

    def extend(self, block, k, v):
        B, nh, T, hs = k.shape
        if block not in self.kv:
            self.kv[block] = k.new_empty(2, B, nh, self.max_len, hs)
        kv = self.kv[block]
        kv[0, :, :, self.start:self.start + T] = k
        kv[1, :, :, self.start:self.start + T] = v
        return kv[:, :, :, :self.start + T]


@functools.lru_cache
def block_mask(seq_len, block_size, device):
    """Which of 2T positions, T of xt and then T of x0, may look at which: (2T, 2T) bool.

    A noisy block (xt) sees itself and the clean blocks (x0) before it, a clean block the clean ones
    up to itself. On a GPU as FlexAttention's BlockMask, which skips what is all False.
    """
    def may_look(batch, head, q, k):
        q_block, k_block = q % seq_len // block_size, k % seq_len // block_size
        q_noisy, k_noisy = q < seq_len, k < seq_len
        return ((q_block == k_block) & (q_noisy == k_noisy)) | ((q_block > k_block) & ~k_noisy)

    if device.type == "cuda":
        return create_block_mask(may_look, None, None, 2 * seq_len, 2 * seq_len, device)
    i = torch.arange(2 * seq_len, device=device)
    return may_look(None, None, i[:, None], i)


class Transformer(nn.Module):
    """Token embedding, blocks, final norm, output head.

    There are vocab_size outputs but vocab_size + 1 input rows: the last one is BOS for the teacher
    and [MASK] for a student.
    """

    def __init__(self, cfg, vocab_size, causal):
        super().__init__()
        self.causal = causal
        self.head_size = cfg.n_embd // cfg.n_head
        self.embed = nn.Embedding(vocab_size + 1, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg.n_embd, cfg.n_head, cfg.dropout)
                                    for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        self.head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's initialisation, scaled where a block writes to the residual
                is_residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if is_residual else 0.02)

    def forward(self, x, mask=None, pos=None, cache=None, change=None):
        """Embeddings x (B, T, C) -> hidden states (B, T, C), ready for `head`.

        mask:  (T, S) bool, True where a position may look, or block_mask(); None is causal or full
               attention
        pos:   (T,) long, positions; by default they go on from where the cache ends
        cache: KVCache of the positions before x
        change: function of the hidden states that changes them, at each quarter of the layers
        """
        T, start = x.size(1), cache.start if cache else 0
        if pos is None:
            pos = torch.arange(start, start + T, device=x.device)
        if self.causal and mask is None and start > 0 and T > 1:
            mask = pos[:, None] >= torch.arange(start + T, device=x.device)
        is_causal = self.causal and mask is None and start == 0
        rope = [a.to(x.dtype) for a in rotary(pos, self.head_size)]
        for i, block in enumerate(self.blocks):
            if change and i in [len(self.blocks) * k // 4 for k in (1, 2, 3)]:
                x = change(x)
            x = block(x, rope, mask, is_causal, cache)
        if cache:
            cache.start += T
        return self.norm(x)

    def logits(self, h):
        """Logits (..., V), in float32 at least, of hidden states h (..., C)."""
        return at_least_float32(self.head(h))


# -----------------------------------------------------------------------------
# 4. Teacher: an AR language model

class Teacher(nn.Module):
    """p(x0) = prod_i p(x0[i] | BOS, x0[:i]); puts BOS in front by itself."""

    def __init__(self, cfg, tokenizer, net=None):
        super().__init__()
        self.name, self.file = "teacher", "teacher.pt"
        self.vocab_size, self.bos_id = tokenizer.vocab_size, tokenizer.bos_id
        self.net = net or Transformer(cfg, self.vocab_size, causal=True)

    def hidden(self, x0):
        """Hidden states (B, T, C), of which `logp` makes what the tokens of x0 (B, T) come from."""
        x = torch.cat([torch.full_like(x0[:, :1], self.bos_id), x0[:, :-1]], dim=1)
        return self.net(self.net.embed(x))

    def logp(self, h):
        """log p(token | those before it) in nats, (..., V), of hidden states h (..., C)."""
        return F.log_softmax(at_least_float32(self.net.head(h)), dim=-1)

    def forward(self, x0):
        """logp for the tokens of x0 (B, T), given those before each: (B, T, V)."""
        return self.logp(self.hidden(x0))


T_MIN = 1e-3                              # smallest time: the weight 1/t stays bounded
CHUNK = {"cpu": 2**25, "cuda": 2**27}     # largest V-wide tensor of a training step, in elements


def in_chunks(fn, x0, vocab_size):
    """torch.cat of fn(rows), rows being slices of the batch x0 (B, T), for fn with V-wide tensors.

    A slice has so few tokens that V-wide tensors of them stay small; these are not kept for the
    backward pass but computed again. A batch that fits in one slice is computed once.
    """
    size = max(1, CHUNK[x0.device.type] // (x0.size(1) * vocab_size))
    rows = [slice(i, i + size) for i in range(0, len(x0), size)]
    if len(rows) == 1:
        return fn(rows[0])
    return torch.cat([checkpoint(fn, r, use_reentrant=False, preserve_rng_state=False)
                      for r in rows])


def teacher_loss(teacher, x0):
    """Cross-entropy of x0 (B, T), in nats per token."""
    h = teacher.hidden(x0)

    def nll(rows):
        return F.cross_entropy(teacher.logp(h[rows]).transpose(1, 2), x0[rows], reduction="none")
    return in_chunks(nll, x0, teacher.vocab_size).mean()


# -----------------------------------------------------------------------------
# 5. Gumbel-Max: token = argmax(logp + xi)                        (Theorem 4.1)

def sample_exponential(shape, generator, dtype=torch.float32):
    """E = -log(1 - u) ~ Exp(1), never 0; in float64, as in float32 it stops at 6e-8, xi at 16.6.

    (torch's exponential_ is several times slower on a CPU, and in float32 on CUDA stops as early.)
    """
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return u.neg_().log1p_().neg_().clamp_min_(1e-30).to(dtype)


def sample_gumbel(shape, generator, dtype=torch.float32):
    """iid Gumbel(0,1) noise, xi = -log E with E ~ Exp(1), on the generator's device.

    Gumbel-Max: argmax(logp + xi) is a draw from p. Given xi the token is determined.
    """
    return -sample_exponential(shape, generator, dtype).log()


def posterior_gumbel(logp, x0, generator):
    """Draw the noise that would have made the teacher pick x0: parallel extraction (Theorem 4.1).

    With p = exp(logp) and E, E0 ~ Exp(1):   xi[k]  = -log(E[k] + p[k] E0)      for the losers
                                             xi[x0] = -log E0 - log p[x0]       for the winner
    the paper's formula with zeta = -log E, in a form that cannot overflow.

    Args:    logp (..., V) float, nats, normalised over V;  x0 (...) long in [0, V)
    Returns: xi (..., V) of logp's dtype; argmax(logp + xi) == x0 (rounding breaks a near-tie once
             in about 1e6 positions in float32); xi is iid Gumbel(0,1) when x0 ~ p
    Raises:  ValueError if the shapes disagree
    Official code: utils.py get_posterior_gumbel.   Test: tests/test_gumbel.py
    """
    if logp.shape[:-1] != x0.shape:
        raise ValueError(f"logp {tuple(logp.shape)} and x0 {tuple(x0.shape)} disagree")
    E = sample_exponential(logp.shape, generator, logp.dtype)
    E0 = sample_exponential(x0.shape, generator, logp.dtype)[..., None]    # (..., 1)
    winner = x0[..., None]                                      # (..., 1)
    xi = -torch.log(E + logp.exp() * E0)
    return xi.scatter(-1, winner, -E0.log() - logp.gather(-1, winner))


@torch.no_grad()
def serial_extraction(teacher, xi, xt=None):
    """Serial extraction: sample the teacher with recorded noise, x_i = argmax(logp_i + xi_i).

    Token by token, T passes, KV-cached. This is also the teacher's sampler: fresh xi gives an exact
    sample, tau * xi one at temperature tau.

    Args:    xi (B, T, V) Gumbel noise;  xt (B, T) long, known tokens kept, mask_id = V elsewhere
    Returns: x0 (B, T) long, and gap (B, T), how far the winner's logp + xi lies above the second's
    """
    B, T, V = xi.shape
    cache, net = KVCache(T), teacher.net
    token = torch.full((B, 1), teacher.bos_id, device=xi.device)
    x0, gaps = [], []
    for i in range(T):
        logp = teacher.logp(net(net.embed(token), cache=cache)[:, -1])     # (B, V)
        top = (logp + xi[:, i]).topk(2, dim=-1)
        token = top.indices[:, :1]
        if xt is not None:
            token = torch.where(xt[:, i:i + 1] == V, token, xt[:, i:i + 1])
        x0.append(token)
        gaps.append(top.values[:, :1] - top.values[:, 1:])
    return torch.cat(x0, dim=1), torch.cat(gaps, dim=1)


# -----------------------------------------------------------------------------
# 6. Student: the Transformer plus the noise embedding

def change_noise(xi, noise):
    """Gumbel noise as it is, or sent through its CDF F to "uniform" U(0,1), "gaussian" N(0,1).

    F(xi) = exp(-E) with E = exp(-xi); N(0,1) takes each tail from the side where it does not round.
    """
    if noise not in ("uniform", "gaussian"):
        return xi
    E = torch.exp(-xi)
    if noise == "uniform":
        return torch.exp(-E)
    tiny = torch.finfo(xi.dtype).tiny
    from_below = torch.special.ndtri(torch.exp(-E).clamp_min(tiny))
    from_above = -torch.special.ndtri((-torch.expm1(-E)).clamp_min(tiny))
    return torch.where(E > math.log(2), from_below, from_above)


class NoiseEmbedding(nn.Module):
    """Noise injection: noise of single positions (M, V) -> embeddings (M, C), a linear map of

    softmax  softmax(xi): the paper's map; squashes the long tail, keeps the ranks
    raw      xi, standardised
    learned  softmax(s (xi + b)) with a learned s (at first 1) and b per token (at first its log
             frequency): starts near the paper's map and learns which tokens' noise matters
    draft    softmax(s (xi + logp)) with the student's own logp, read off between its layers: the
             token that it would draw as things stand. The linear map is that of the tokens
    """
    MEAN_STD = {"gumbel": (0.5772156649, math.pi / 6**0.5), "gaussian": (0.0, 1.0),
                "uniform": (0.5, 12**-0.5)}

    def __init__(self, cfg, vocab_size, log_freq=None):
        super().__init__()
        self.noise, self.noise_map = cfg.noise, cfg.noise_map
        if self.noise_map in ("learned", "draft"):
            self.scale = nn.Parameter(torch.ones(()))
        if self.noise_map == "learned":
            self.bias = nn.Parameter(torch.zeros(vocab_size) if log_freq is None else log_freq)
        if self.noise_map != "draft":
            self.proj = nn.Linear(vocab_size, cfg.n_embd, bias=False)
            nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, xi, h, net):
        """xi (M, V), hidden states h (M, C) there -> (M, C);  net: the student's Transformer."""
        z = change_noise(xi, self.noise)
        if self.noise_map == "raw":
            mean, std = self.MEAN_STD.get(self.noise, self.MEAN_STD["gumbel"])
            return self.proj((z - mean) / std)
        if self.noise_map == "draft":
            z = self.scale * (z + net.logits(net.norm(h)))      # logp but for a constant per row
            return z.softmax(dim=-1) @ net.embed.weight[:-1]    # the row of [MASK] is the last
        if self.noise_map == "learned":
            z = self.scale * (z + self.bias)
        return self.proj(z.softmax(dim=-1))


class Student(nn.Module):
    """Masked diffusion model, with noise injection unless noise is none.

    With block_size = seq_len it is MDLM (Sahoo et al. 2024). With shorter blocks it is BD3-LM
    (Arriola et al. 2025): autoregressive over blocks, masked diffusion within each. SUBS holds by
    construction: there is no output for [MASK], and only masked positions get logits.
    """

    def __init__(self, cfg, vocab_size, log_freq=None):
        super().__init__()
        self.seq_len, self.block_size = cfg.seq_len, cfg.block_size or cfg.seq_len
        self.is_block = self.block_size < cfg.seq_len
        self.name = cfg.noise
        if cfg.noise == "none":
            self.name = "bd3lm" if self.is_block else "mdlm"
        self.file = f"student-{cfg.noise}.pt"
        self.noise, self.inject = cfg.noise, cfg.inject
        self.is_draft = cfg.noise != "none" and cfg.noise_map == "draft"
        self.vocab_size = self.mask_id = vocab_size
        self.register_buffer("t_range", torch.tensor([T_MIN, 1.0]))        # of the training times
        self.net = Transformer(cfg, vocab_size, causal=False)
        # Rotary positions are relative: with all tokens masked every position would look alike. The
        # official code has the unmasked BOS as an anchor, we have an embedding per position.
        self.embed_pos = nn.Embedding(cfg.seq_len, cfg.n_embd)
        nn.init.normal_(self.embed_pos.weight, std=0.02)
        if self.noise != "none":
            self.noise_embedding = NoiseEmbedding(cfg, vocab_size, log_freq)

    def nfe_of_text(self, nfe):
        """Function evaluations of a whole text, nfe of each block but at most one for a token."""
        return min(nfe, self.block_size) * self.seq_len // self.block_size

    def embed_noise(self, xi, h):
        """Noise xi (M, V) of masked tokens, whose hidden states are h (M, C), as (M, C)."""
        return self.noise_embedding(xi, h, self.net).to(h.dtype)

    def hidden(self, xt, embed_noise=None, x0=None, cache=None):
        """Hidden states (B, T, C) of xt (B, T), ready for net.logits.

        The paper's map (and raw, learned) injects the noise once, below the first layer. The map
        "draft" does so at each quarter of the layers. What argmax(logp + xi) would draw there is a
        token for each position without regard to the others, as MDLM does; the layers above see
        these drafts and make them agree.

        embed_noise: function of hidden states (B, T, C), the noise embeddings (M, C) of the masked
                     tokens, row by row; None: nothing is masked
        x0:    (B, T) long: every block of xt is noisy and sees the blocks of x0 before it (BD3-LM's
               training). Without x0 only the last block may be masked: it sees those before it
        cache: KVCache of the finished blocks before xt; takes up xt if nothing in it is masked
        """
        T, start = xt.size(1), cache.start if cache else 0
        pos = torch.arange(start, start + T, device=xt.device)
        mask = None
        if x0 is not None:
            xt, pos = torch.cat([xt, x0], dim=1), pos.repeat(2)            # x0 has nothing masked
            mask = block_mask(T, self.block_size, xt.device)
        elif T > self.block_size:
            seen = torch.arange(start + T, device=xt.device)
            mask = pos[:, None] // self.block_size >= seen // self.block_size
        is_masked = (xt == self.mask_id)[..., None]             # (B, T or 2T, 1)
        x = self.net.embed(xt)                                  # (B, T or 2T, C)

        def add_noise(x):
            return x + torch.zeros_like(x).masked_scatter(is_masked, embed_noise(x[:, :T]))

        has_noise = self.noise != "none" and embed_noise is not None
        if has_noise and not self.is_draft:
            x = add_noise(x if self.inject == "add" else x.masked_fill(is_masked, 0.0))
        h = self.net(x + self.embed_pos(pos), mask, pos, cache,
                     add_noise if has_noise and self.is_draft else None)
        if cache and embed_noise is not None:
            cache.start = start
        return h[:, :T]

    def forward(self, xt, xi=None, cache=None):
        """Logits at the masked positions of xt (B, T), row by row: (M, V).

        xi: (M, V) Gumbel noise of those positions (ignored without noise).
        """
        is_masked = xt == self.mask_id
        h = self.hidden(xt, lambda x: self.embed_noise(xi, x[is_masked]), cache=cache)
        return self.net.logits(h[is_masked])


# -----------------------------------------------------------------------------
# 7. Diffusion: masked diffusion with alpha_t = 1 - t, weight 1/t

def stratified_time(index, n, u, low=T_MIN, high=1.0):
    """t = low + (high - low) (i + u) / n: one time in each of n strata; index, u of one shape."""
    return low + (high - low) * (index + u) / n


def q_sample(x0, t, mask_id, generator):
    """Forward process: each token of x0 (B, T) becomes mask_id with probability t (B, T)."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    return torch.where(u < t, mask_id, x0)


def block_losses(student, teacher, x0, t, key, recorded=None, loss="ce"):
    """- E [ 1/t sum over masked i of log p_theta(x0_i | xt, xi) ] / L' of each block of L' tokens.

    In nats per token. Without noise its mean is the MDLM objective or, in blocks, the BD3-LM
    objective, a bound on the negative log-likelihood (NELBO). With posterior noise it is a
    conditional loss, no likelihood: that noise knows x0. Everything V-wide (teacher, noise, output
    head, cross-entropy) is computed at masked positions only, and in chunks.

    Args: x0 (B, T) long;  t (B, T/L') in (0, 1];  key: a tuple that names the draws, see rng
          recorded: function of a slice of the batch, its recorded noise (b, T, V); None: posterior
          loss: "kd" is token-level KD: the teacher's p(. | x0[:i]) takes the place of x0_i
    Returns: (B, T/L')
    """
    V, device = student.vocab_size, x0.device
    times = t.repeat_interleave(student.block_size, dim=1)      # (B, T)
    xt = q_sample(x0, times, student.mask_id, rng(*key, "mask", device=device))
    is_masked = xt == student.mask_id                           # (B, T)
    is_posterior = student.noise not in ("none", "independent") and recorded is None
    if is_posterior or loss == "kd":
        with torch.inference_mode():
            h_teacher = teacher.hidden(x0)                      # (B, T, C)

    @torch.no_grad()
    def noise(rows):
        """Noise (m, V) of the masked tokens of some sequences, the same whenever it is called."""
        g, where = rng(*key, "noise", rows.start, device=device), is_masked[rows]
        if student.noise == "independent":
            return sample_gumbel((int(where.sum()), V), g)
        if recorded is not None:
            return recorded(rows)[where]
        return posterior_gumbel(teacher.logp(h_teacher[rows][where]), x0[rows][where], g)

    def nll(rows):
        where = is_masked[rows]
        target = x0[rows][where]                                # (m,)
        if loss == "kd":
            target = teacher.logp(h_teacher[rows][where]).detach().exp()   # (m, V)
        return F.cross_entropy(student.net.logits(h[rows][where]), target, reduction="none")

    def embed_noise(x):
        return in_chunks(lambda rows: student.embed_noise(noise(rows), x[rows][is_masked[rows]]),
                         x0, V)                                 # (M, C)

    h = student.hidden(xt, embed_noise, x0 if student.is_block else None)  # (B, T, C)
    weighted = in_chunks(nll, x0, V) / times[is_masked]         # (M,)
    losses = torch.zeros_like(times, dtype=weighted.dtype).masked_scatter(is_masked, weighted)
    return losses.view(*t.shape, -1).mean(dim=-1)


def student_loss(*args, **settings):
    """The mean of block_losses: what a student minimises, in nats per token."""
    return block_losses(*args, **settings).mean()


def clipped_schedule(t, losses):
    """BD3-LM's clipped schedule: the interval of t, 0.5 to 0.9 wide, in which losses vary least.

    Uniform times fall uniformly into any interval, so one pass over the data judges them all.

    Args:    t and losses (B, T/L'), as from validation_losses
    Returns: low, high, the variance of the losses there, and that over all times
    """
    found = []
    for width in (0.5, 0.6, 0.7, 0.8, 0.9):
        for low in np.linspace(T_MIN, 1 - width, round((1 - width) / 0.05) + 1):
            inside = losses[(t >= low) & (t <= low + width)]
            if len(inside) > 1:
                found.append((inside.var().item(), float(low), float(low + width)))
    variance, low, high = min(found, default=(math.nan, T_MIN, 1.0))
    return low, high, variance, losses.var().item()


# -----------------------------------------------------------------------------
# 8. Sampling: noise kept over all steps; ancestral in every order, and exact

def sequence_noise(seed, index, seq_len, model):
    """All the draws of sequences number `index` (n,): each depends on (seed, its number) alone.

    Returns: xi (n, T, V) Gumbel noise of the model's dtype and device;  u (n, 2, T) float64 in
             [0, 1): when a position is filled, and where in its distribution the token is drawn
    """
    like, xi, u = next(model.parameters()), [], []
    for i in index.tolist():
        g = rng(seed, "sequence", i, device=like.device)
        u.append(torch.rand(2, seq_len, generator=g, dtype=torch.float64, device=like.device))
        xi.append(sample_gumbel((seq_len, model.vocab_size), g, like.dtype))
    return torch.stack(xi), torch.stack(u)


def draw_tokens(logits, u, temperature, top_p):
    """Tokens (M,) from logits (M, V), at temperature 0 by argmax, else by inverse CDF at u (M,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        p, order = probs.sort(dim=-1, descending=True)
        is_out = p.cumsum(dim=-1) - p >= top_p                  # the first that crosses it stays
        p[..., 1:][is_out[..., 1:]] = 0                         # and the likeliest at any top_p
        probs = torch.zeros_like(probs).scatter(-1, order, p)
    cdf = probs.cumsum(dim=-1)
    return (cdf <= u[:, None] * cdf[:, -1:]).sum(dim=-1)


@torch.no_grad()
def sample(student, xi, u, nfe, tau=1.0, temperature=0.0, top_p=1.0, order="random", xt=None,
           on_step=None, use_cache=True):
    """Fill all masked tokens, from t = 1 to t = 0: at once or, with blocks, one after the other.

    Each block takes nfe steps; the keys and values of finished blocks are cached. A text longer
    than the student's seq_len is written in a window that moves on by half when it is full: there
    positions start anew, and the text in it is read again.

    order: random         ancestral, as MDLM: a token is filled when time falls below u[:, 0], which
                          in a step from t to s is so with probability (t - s) / t
           first-hitting  the same order, but the same number each step; with nfe >= T one token a
                          step, which is the law of the process in continuous time, without its
                          idle steps (Zheng et al. 2025; the student does not read the time)
           confidence     the same number each step, those first of which the student is surest
           left           the same number each step, from left to right, as the teacher writes

    Args:    xi (B, T, V), u (B, 2, T) from sequence_noise; xt (B, T) long, known tokens kept,
             mask_id elsewhere (default: all masked); on_step: called with the whole text
             (B, T) after each step that filled a token
    Returns: (B, T) long. Nothing is masked, also when nfe > T
    Raises:  ValueError if T is no multiple of the block size, or too long for a student without
             blocks
    """
    B, _, T = u.shape
    L, longest, mask_id = student.block_size, student.seq_len, student.mask_id
    if T % L and T > L or T > longest and 2 * L > longest:
        raise ValueError(f"a text of {T} tokens cannot be written in blocks of {L} with at most "
                         f"{longest} tokens in view: it takes whole blocks and, beyond {longest} "
                         "tokens, a view of two blocks or more")
    text = torch.full((B, T), mask_id, device=u.device) if xt is None else xt.clone()
    first, cache = 0, None                                      # where the window starts
    for start in range(0, T, L):
        block = slice(start, start + L)
        if start + L - first > longest:
            first, cache = start - longest // 2 // L * L, None
        if use_cache and start > first:
            cache = cache or KVCache(longest)
            student.hidden(text[:, first + cache.start:start], cache=cache)
        seen = block if cache else slice(first, start + L)
        xt, u_when, u_what = text[:, block], u[:, 0, block], u[:, 1, block]           # (B, L)
        n_start = (xt == mask_id).sum(dim=1)                    # (B,)
        score = u_when
        if order in ("confidence", "left"):
            score = -torch.arange(xt.size(1), device=u.device).expand_as(xt).double()
        for k in range(1, nfe + 1):
            is_masked = xt == mask_id
            n_fill = is_masked.sum(dim=1) - n_start * (nfe - k) // nfe     # (B,)
            if order == "random":
                n_fill = (is_masked & (u_when >= 1 - k / nfe)).sum(dim=1)
            if not n_fill.any():
                continue
            logits = student(text[:, seen], tau * xi[:, block][is_masked], cache)     # (M, V)
            tokens = draw_tokens(logits, u_what[is_masked], temperature, top_p)
            if order == "confidence":
                top = logits.softmax(dim=-1).amax(dim=-1).to(score.dtype)
                score = score.masked_scatter(is_masked, top)
            rank = score.masked_fill(~is_masked, -math.inf).argsort(dim=1, descending=True,
                                                                    stable=True)
            is_filled = is_masked & (rank.argsort(dim=1) < n_fill[:, None])
            xt[is_filled] = xt.masked_scatter(is_masked, tokens)[is_filled]           # in text, too
            if on_step:
                on_step(text.clone())
    return text


@torch.no_grad()
def draft_and_verify(student, teacher, xi, xt=None, ratio=0.0, lookahead=None, on_round=None):
    """The student drafts, the teacher verifies: exact mode, or adaptive parallel decoding (APD).

    Each round drafts all masked tokens in one student pass: argmax(s) with s = logp_student + xi,
    or s = the logits of a student that has read xi. One teacher pass gives the target
        argmax(ratio s + (1 - ratio) (logp_teacher + xi))
    at all positions, valid wherever all tokens before it are. The agreeing prefix is kept and the
    target's next token, `lookahead` tokens at most; the rest is masked again.

    ratio 0: exact mode. The text equals serial_extraction(teacher, xi), up to rounding, in fewer
    rounds; after predictive sampling (Wiggers & Hoogeboom 2020). student None: the same without a
    forecaster, the teacher's last answer being the next draft (at first its argmax text).
    ratio above 0: APD (Israel et al. 2025), whose text is in between student's and teacher's.

    Args:    xi (B, T, V) Gumbel noise;  xt (B, T) known tokens, at the left only, mask_id = V after
             on_round: called after each round with the numbers (b,) of the texts that were open,
             draft and answer (b, T), and n_keep (b,), how many tokens of the answer stand now
    Returns: x0 (B, T) long;  rounds (B,) long, each one student and one teacher call
    """
    if student is None and ratio > 0:
        raise ValueError("APD needs a student: without one, ratio must be 0")
    B, T, V = xi.shape
    x = torch.full((B, T), V, device=xi.device) if xt is None else xt.clone()
    if student is None:
        guess = serial_extraction(teacher, torch.zeros_like(xi[:1]))[0].repeat(B, 1)       # (B, T)
    rounds = torch.zeros(B, dtype=torch.long, device=xi.device)
    live = (x == V).any(dim=1).nonzero()[:, 0]                  # numbers of the unfinished samples
    while len(live):
        draft, is_masked = x[live], x[live] == V                # (b, T)
        n_known = T - is_masked.sum(dim=1)                      # (b,)
        if student is None:
            draft[is_masked] = guess[live][is_masked]
        else:
            noise = xi[live][is_masked]                         # (M, V)
            score = student(draft, noise) + (noise if student.noise == "none" else 0)
            draft[is_masked] = score.argmax(dim=-1)
        target = teacher(draft) + xi[live]                      # (b, T, V)
        if ratio > 0:
            target[is_masked] = ratio * score + (1 - ratio) * target[is_masked]
        answer = target.argmax(dim=-1)                          # (b, T)
        agree = (draft == answer) | ~is_masked
        n_keep = agree.long().cumprod(dim=1).sum(dim=1) + 1     # (b,) agreeing prefix, next token
        n_keep = torch.minimum(n_keep, n_known + (lookahead or T)).clamp(max=T)
        is_kept = torch.arange(T, device=x.device) < n_keep[:, None]
        x[live] = torch.where(is_kept, torch.where(is_masked, answer, draft), V)
        if student is None:
            guess[live] = answer
        if on_round:
            on_round(live, draft, answer, n_keep)
        rounds[live] += 1
        live = live[n_keep < T]
    return x, rounds


def sampling_batches(n, seq_len, vocab_size, batch_size=1000):
    """Sample numbers 0..n-1 in batches whose noise (B, T, V) stays under 256 MiB."""
    return torch.arange(n).split(max(1, min(batch_size, 2**26 // (seq_len * vocab_size))))


@torch.no_grad()
def generate(model, n, seq_len, seed=0, known=None, batch_size=1000, progress=None, **settings):
    """n texts (n, T) long of a Student (settings as in `sample`) or of a Teacher (tau only).

    Text i depends on (seed, i) alone, whatever the batch.

    known: (T,) long, tokens to keep in every text; V where there is none
    progress: label of a progress bar
    """
    texts = []
    batches = sampling_batches(n, seq_len, model.vocab_size, batch_size)
    for index in tqdm(batches, desc=progress, disable=None if progress else True):
        xi, u = sequence_noise(seed, index, seq_len, model)
        xt = None if known is None else known.expand(len(index), seq_len)
        if isinstance(model, Teacher):
            texts.append(serial_extraction(model, settings.get("tau", 1.0) * xi, xt)[0])
        else:
            texts.append(sample(model, xi, u, xt=xt, **settings))
    return torch.cat(texts)


# -----------------------------------------------------------------------------
# 9. Evaluation: validation loss, spread, agreement; generative perplexity and MAUVE: sample.py

@torch.no_grad()
def validation_losses(model, teacher, data, cfg):
    """Losses on fixed validation rows, with fixed times, masks and noise, in nats per token.

    Returns: t and block_losses (N, T/L') there; for a Teacher its mean loss in each row (N, 1)
    """
    times, losses = [], []
    x0 = data.val_rows(8 * cfg.batch_size).to(next(model.parameters()).device)
    for i, rows in enumerate(x0.split(cfg.batch_size // cfg.grad_accum)):
        if isinstance(model, Teacher):
            losses.append(teacher_loss(model, rows).expand(len(rows), 1))
            continue
        strata = torch.arange(len(rows) * cfg.seq_len // model.block_size, device=x0.device)
        times.append(stratified_time(strata, len(strata), 0.5).view(len(rows), -1))
        losses.append(block_losses(model, teacher, rows, times[-1], ("validation", i)))
    return torch.cat(times) if times else None, torch.cat(losses)


def validation_loss(*args):
    """The mean of validation_losses: the teacher's NLL, MDLM's NELBO, or with noise a conditional
    loss, no likelihood (see block_losses)."""
    return validation_losses(*args)[1].double().mean().item()


def token_entropy(x):
    """Mean over sequences of the entropy of their token counts, x (N, T), in nats."""
    entropy = 0.0
    for row in x.cpu():
        share = row.unique(return_counts=True)[1] / len(row)
        entropy -= (share * share.log()).sum().item() / len(x)
    return entropy


@torch.no_grad()
def compare_with_teacher(x, teacher_text, teacher, seed):
    """How far texts x (N, T) are what the teacher writes from the same noise (that of `seed`).

    Returns: agree_token, agree_seq  share of positions, of whole texts, equal to teacher_text
             accept       share of tokens that the teacher, too, would choose after x's own prefix
             shuffled     agree_token of each text with the teacher's text for the next one's noise
             teacher_nll  -log p of x under the teacher, nats per token
    """
    accept, nll = 0.0, 0.0
    for index in sampling_batches(len(x), x.size(1), teacher.vocab_size):
        xi, _ = sequence_noise(seed, index, x.size(1), teacher)
        logp = teacher(x[index])
        accept += ((logp + xi).argmax(dim=-1) == x[index]).sum().item() / x.numel()
        nll -= logp.gather(-1, x[index][..., None]).sum().item() / x.numel()
    equal = x == teacher_text
    return {"agree_token": equal.float().mean().item(),
            "agree_seq": equal.all(dim=1).float().mean().item(), "accept": accept,
            "shuffled": (x == teacher_text.roll(1, 0)).float().mean().item(), "teacher_nll": nll}


def compare_exact(student, teacher, n, seq_len, seed, known=None, ratio=0.0, lookahead=None):
    """draft_and_verify against serial decoding on the same noise.

    Returns: the texts (n, T), and a dict: rounds per text; equal, the share of texts equal to those
    of serial decoding; near_ties, how many of these differ, but only from where its two best lay
    within 1e-4, which rounding can flip in float32; seconds and serial_seconds
    """
    texts = []
    sums = dict(rounds=0, equal=0, near_ties=0, seconds=0.0, serial_seconds=0.0)
    for index in sampling_batches(n, seq_len, teacher.vocab_size):
        xi, _ = sequence_noise(seed, index, seq_len, teacher)
        xt = None if known is None else known.expand(len(index), seq_len)
        start = time.perf_counter()
        x, rounds = draft_and_verify(student, teacher, xi, xt, ratio, lookahead)
        sums["rounds"] += rounds.sum().item()                   # .item() waits for a GPU
        middle = time.perf_counter()
        serial, gap = serial_extraction(teacher, xi, xt)
        differs = x != serial                                   # (B, T)
        n_differ = differs.any(dim=1).sum().item()
        sums["serial_seconds"] += time.perf_counter() - middle
        sums["seconds"] += middle - start
        gap_there = gap.gather(1, differs.long().argmax(dim=1, keepdim=True))[:, 0]
        n_ties = (differs.any(dim=1) & (gap_there < 1e-4)).sum().item()
        sums["near_ties"] += n_ties
        sums["equal"] += len(x) - n_differ + n_ties
        texts.append(x)
    return torch.cat(texts), {**sums, "rounds": sums["rounds"] / n, "equal": sums["equal"] / n}


def default_temperatures(student, cfg):
    """--temperature or, where it is not given: with noise argmax; without, the student's own
    probabilities, and argmax after them, to show how that collapses."""
    if cfg.temperature is not None:
        return numbers(cfg, "temperature")
    return [1.0, 0.0] if student.noise == "none" else [0.0]


def evaluate(teacher, students, data, cfg):
    """The rows of results.json: one dict for each model and sampling setting."""
    n, seq_len, rows = cfg.n_samples, cfg.seq_len, []

    def add(model, nfe, x, start, compare=True, **more):
        rows.append({"model": model, "nfe": nfe, **more, "seconds": time.perf_counter() - start})
        scores = compare_with_teacher(x, teacher_text, teacher, cfg.seed)
        if not compare:  # other draws than the noise decided these texts: nothing to agree about
            scores = {"teacher_nll": scores["teacher_nll"]}
        rows[-1].update({**data.judge(x), **scores, "entropy": token_entropy(x), **more})

    start = time.perf_counter()
    teacher_text = generate(teacher, n, seq_len, cfg.seed)
    add("teacher", seq_len, teacher_text, start, val_kind="NLL",
        val_loss=validation_loss(teacher, None, data, cfg))
    start = time.perf_counter()
    add("best constant text", 0, teacher_text.mode(dim=0).values.expand(n, seq_len), start)
    for student in students:
        val = dict(val_loss=validation_loss(student, teacher, data, cfg),
                   val_kind="NELBO" if student.noise == "none" else "conditional")
        taus = numbers(cfg, "tau") if student.noise != "none" else [1.0]
        for nfe, tau, temperature in itertools.product(numbers(cfg, "nfe"), taus,
                                                       default_temperatures(student, cfg)):
            settings = dict(tau=tau, temperature=temperature, top_p=cfg.top_p, order=cfg.order)
            start = time.perf_counter()
            x = generate(student, n, seq_len, cfg.seed, nfe=nfe, **settings)
            add(student.name, student.nfe_of_text(nfe), x, start,
                temperature == 0 and tau == 1, **settings, **val)
    whole = [s for s in students if not s.is_block]             # those that can draft a whole text
    for name, student, ratio, lookahead in (
            [("apd", s, cfg.apd, cfg.lookahead) for s in whole]
            + [("exact", s, 0.0, None) for s in whole + [None]]):
        start = time.perf_counter()
        x, report = compare_exact(student, teacher, n, seq_len, cfg.seed, None, ratio, lookahead)
        calls = report["rounds"] * (2 if student else 1)        # of student and teacher together
        add(f"{name}, {student.name if student else 'no student'}", calls, x, start, **report)
    return rows


COLUMNS = {"model": "", "nfe": ".4g", "tau": "g", "temperature": "g", "valid": ".1%",
           "distinct": "d", "tv": ".3f", "wrong_names": ".1%", "teacher_nll": ".3f",
           "entropy": ".3f", "agree_token": ".3f", "shuffled": ".3f", "agree_seq": ".3f",
           "accept": ".3f", "rounds": ".2f", "equal": ".2%", "val_loss": ".3f", "val_kind": "",
           "seconds": ".1f"}


def print_table(rows, columns=COLUMNS):
    """Rows (dicts) as aligned text, with those of the columns that any row has."""
    names = [c for c in columns if any(c in r for r in rows)]
    lines = [names] + [[format(r[c], columns[c]) if c in r else "" for c in names] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])]
        print("  ".join(cells).rstrip())


# -----------------------------------------------------------------------------
# 10. Training: one loop for teacher and student; checkpoints; log

# What decides a trained model: one that is there is reused only if all these are equal.
TEACHER_SETTINGS = ("seq_len n_layer n_head n_embd dropout batch_size grad_accum max_steps lr "
                    "warmup schedule ema seed").split()
STUDENT_SETTINGS = TEACHER_SETTINGS + "noise labels loss block_size clip init_from".split()
NOISE_SETTINGS = STUDENT_SETTINGS + ["noise_map", "inject"]


def load_checkpoint(path, *kinds):
    """A checkpoint as a dict of tensors and plain values; code in the file is refused."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; name a file like "
                        "out/maze/teacher.pt, or train it first")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["kind"]
    except Exception as e:  # torch raises many types for cut-off and foreign files
        raise UserError(f"{path}: cut off, or no checkpoint of this program "
                        f"({type(e).__name__}); name another file, or train it again") from e
    if found not in kinds:
        raise UserError(f"{path}: holds a {found}, but a {' or '.join(kinds)} is needed here")
    return saved


def load_weights(model, saved, device):
    """Put a checkpoint's averaged weights into `model`; returns it ready for use."""
    model.load_state_dict(saved["ema"])
    return model.to(device).eval().requires_grad_(False)


def start_from(model, path, tokenizer):
    """--init-from: a student begins with the weights of another, as BD3-LM with those of MDLM.

    The other may lack the noise embedding; all else must be there and of the same shape.
    """
    saved = load_checkpoint(path, "student")
    if saved["tokenizer"] != tokenizer.state:
        raise UserError(f"--init-from {path}: knows other tokens; use a student of the same data")
    if saved["config"]["n_head"] != model.net.blocks[0].n_head:
        raise UserError(f"--init-from {path}: has --n-head {saved['config']['n_head']}; give it "
                        "here, too")
    try:
        keys = model.load_state_dict({k: v for k, v in saved["ema"].items() if k != "t_range"},
                                     strict=False)
    except RuntimeError as e:
        raise UserError(f"--init-from {path}: has another shape; give its --n-layer, --n-embd, "
                        "--seq-len and --noise-map here, too") from e
    wrong = [k for k in keys.missing_keys if not k.startswith(("noise_embedding.", "t_range"))]
    if wrong or keys.unexpected_keys:
        raise UserError(f"--init-from {path}: does not fit, {(wrong + keys.unexpected_keys)[0]} is "
                        "not in both; give its --n-layer, --noise and --noise-map here, too")


def load_student(saved, device):
    """The Student of a checkpoint, and its Tokenizer."""
    tokenizer = Tokenizer(**saved["tokenizer"])
    student = Student(Config(**saved["config"]), tokenizer.vocab_size)
    return load_weights(student, saved, device), tokenizer


def load_teacher(path, tokenizer, seq_len, device, data_id=None):
    """A Teacher, from a checkpoint or from transformers.

    Raises: UserError if its vocabulary, length or (if given) data are not the caller's
    """
    if not path.endswith(".pt"):
        from text import load_pretrained
        return load_pretrained(path, tokenizer, seq_len).to(device)
    saved = load_checkpoint(path, "teacher")
    teacher = Teacher(Config(**saved["config"]), Tokenizer(**saved["tokenizer"]))
    if saved["tokenizer"] != tokenizer.state:
        raise UserError(f"{path}: its vocabulary ({teacher.vocab_size} tokens) is not the one here "
                        f"({tokenizer.vocab_size} tokens); use a teacher of the same data")
    if saved["config"]["seq_len"] != seq_len:
        raise UserError(f"{path}: its --seq-len is {saved['config']['seq_len']}, not {seq_len}")
    if data_id not in (None, saved["settings"]["data"]):
        raise UserError(f"{path}: was trained on other data; name its own with --teacher, or "
                        "another --out-dir to train one")
    return load_weights(teacher, saved, device)


def weights_id(model):
    """A number that models share if and (all but surely) only if their weights are equal."""
    return f"{sum(p.double().abs().sum().item() for p in model.parameters()):.15g}"


def is_finished(saved, settings, path, cfg):
    """Whether a checkpoint is finished (else to go on with); UserError if it is of another run."""
    there = saved["settings"]
    changed = [f"{name} {there.get(name)} there, {value} now" for name, value in settings.items()
               if there.get(name) != value]
    if changed:
        raise UserError(f"{path} was trained with other settings ({'; '.join(changed)}): name "
                        "another --out-dir, or delete that file")
    if saved["step"] < cfg.max_steps and not cfg.resume:
        raise UserError(f"{path} was interrupted at step {saved['step']}/{cfg.max_steps}: add "
                        "--resume to go on, name another --out-dir, or delete that file")
    return saved["step"] == cfg.max_steps


@contextlib.contextmanager
def catch_stop():
    """Yields a list that receives Ctrl-C and SIGTERM, so that a step is never cut in two."""
    caught = []
    before = {s: signal.signal(s, lambda number, frame: caught.append(number))
              for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate(cfg, step):
    """Linear warm-up, then constant or a cosine down to 0."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup) / max(1, cfg.max_steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def averaging(decay):
    """Update of torch's AveragedModel; the decay is warmed up, or short runs would average their
    initial weights."""
    def update(averaged, current, n):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(n)) / (10 + int(n))))
    return update


def batch(data, cfg, step, piece):
    """One of the cfg.grad_accum pieces of a step's batch.

    Returns: x0 (b, T) long;  s (b, T/L') in [0, 1), stratified over the whole batch and its blocks,
             to make times of;  index (b,), which sequences
    """
    size = cfg.batch_size // cfg.grad_accum
    g = rng(cfg.seed, "batch", step, piece)
    index = torch.randint(data.n_train, (size,), generator=g)
    n = cfg.seq_len // cfg.block_size
    strata = torch.arange(piece * size * n, (piece + 1) * size * n).view(size, n)
    s = stratified_time(strata, cfg.batch_size * n, torch.rand(size, n, generator=g), 0.0, 1.0)
    tensors = data.rows(index), s, index
    return [x.pin_memory() for x in tensors] if cfg.device == "cuda" else tensors


def one_ahead(fn, calls):
    """fn(*call) for each of calls, computed by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for call in calls:
            now, coming = coming, pool.submit(fn, *call)
            if now is not None:
                yield now.result()
        yield coming.result()


class Objective(nn.Module):
    """model and loss_fn as one module: DDP averages gradients of what runs in a forward()."""

    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *args):
        return self.loss_fn(self.model, *args)


def log_step(row, cfg, n_done, n_tokens):
    """Print a validation and append it to log.jsonl; n_done: steps since the start of this call."""
    row["tok_s"] = n_done * n_tokens / row["seconds"]
    left = round((cfg.max_steps - row["step"]) * n_tokens / row["tok_s"])
    print(f"step {row['step']:6d}/{cfg.max_steps} {row['step'] / cfg.max_steps:6.1%} | "
          f"loss {row['loss']:.4f} | val {row['val']:.4f} nats/token | lr {row['lr']:.1e} | "
          f"grad {row['grad']:.2f} | {row['tok_s'] / 1e3:.1f}k tok/s | "
          f"eta {left // 60}:{left % 60:02d}", flush=True)
    with open(os.path.join(cfg.out_dir, "log.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")


def train(model, loss_fn, teacher, data, cfg, setting_names, sources=None):
    """Train a Teacher or Student, or reuse a finished one, or with --resume go on.

    Each step has cfg.grad_accum pieces, dealt to the processes in turn. All draws are keyed by
    (seed, step, piece), so the step is all there is to save of the random state, and N processes
    take the steps of one.

    loss_fn(model, x0, s, index, step, piece): loss of a piece;  sources: where steps get their
    texts, in turn (default: data)
    Returns: the model with averaged weights, in eval mode
    """
    path = os.path.join(cfg.out_dir, model.file)
    kind = "teacher" if isinstance(model, Teacher) else "student"
    settings = {**{k: getattr(cfg, k) for k in setting_names}, "data": data.fingerprint,
                "teacher": weights_id(teacher) if teacher else None}
    saved = load_checkpoint(path, kind) if os.path.exists(path) else None
    if saved and is_finished(saved, settings, path, cfg):
        print(f"{model.name}: {path} is finished, reused")
        return load_weights(model, saved, cfg.device)
    model.to(cfg.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging(cfg.ema))
    step = 0
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        ema.module.load_state_dict(saved["ema"])
        ema.n_averaged.fill_(step)
        optimizer.load_state_dict(saved["optimizer"])
        print(f"{model.name}: {path} goes on from step {step}")

    def save():
        state = dict(kind=kind, step=step, settings=settings, config=dataclasses.asdict(cfg),
                     tokenizer=data.tokenizer.state, model=model.state_dict(),
                     ema=ema.module.state_dict(), optimizer=optimizer.state_dict(),
                     versions=dict(torch=str(torch.__version__), python=platform.python_version()))
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)  # a write that is cut off leaves the last checkpoint whole

    if cfg.compile == "on" or (cfg.compile == "auto" and cfg.device == "cuda"):
        for block in model.net.blocks:
            block.compile()
    objective = Objective(model, loss_fn)
    if WORLD > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    is_bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and cfg.device == "cuda")
    n_params, n_tokens = sum(p.numel() for p in model.parameters()), cfg.batch_size * cfg.seq_len
    print(f"{model.name}: device {cfg.device} x {WORLD} | {'bfloat16' if is_bf16 else 'float32'} | "
          f"{n_params / 1e6:.2f}M params | {n_tokens:,} tokens/step | "
          f"uniform loss ln V = {math.log(model.vocab_size):.2f} nats")
    pieces = range(RANK, cfg.grad_accum, WORLD)
    sources = itertools.cycle(sources or [data])
    calls = ((source, cfg, k, piece) for k, source in zip(range(cfg.max_steps), sources)
             if k >= step for piece in pieces)
    batches = one_ahead(batch, calls)
    start, first, losses, is_stopped = time.time(), step, [], False
    with catch_stop() as stop:
        while step < cfg.max_steps and not is_stopped:
            loss = 0.0
            for piece in pieces:
                x = [a.to(cfg.device, non_blocking=True) for a in next(batches)]
                torch.manual_seed(rng(cfg.seed, "dropout", step, piece).initial_seed())
                is_last = WORLD == 1 or piece == pieces[-1]
                with contextlib.nullcontext() if is_last else objective.no_sync():
                    with torch.autocast(cfg.device, torch.bfloat16, enabled=is_bf16):
                        piece_loss = objective(*x, step, piece) / len(pieces)
                    piece_loss.backward()
                loss += piece_loss.detach()
            grad = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            report = torch.stack([loss, grad, torch.full_like(loss, bool(stop))])
            if WORLD > 1:
                dist.all_reduce(report)
            loss, grad, is_stopped = (report / WORLD).tolist()
            if not math.isfinite(loss + grad):
                raise UserError(f"{model.name}: loss {loss}, gradient norm {grad} at step {step}; "
                                f"the last checkpoint is kept in {cfg.out_dir}. Try a lower --lr "
                                f"(now {cfg.lr:g}) or a longer --warmup")
            lr = optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update_parameters(model)
            losses.append(loss)
            step += 1
            if RANK == 0 and (step % cfg.eval_every == 0 or step == cfg.max_steps):
                if cfg.clip and kind == "student":
                    low, high, least, full = clipped_schedule(
                        *validation_losses(ema.module.eval(), teacher, data, cfg))
                    model.t_range.copy_(torch.tensor([low, high]))
                    print(f"clipped schedule: t in [{low:.2f}, {high:.2f}], variance of the loss "
                          f"{least:.3f}, over all times {full:.3f}")
                save()
                val = validation_loss(ema.module.eval(), teacher, data, cfg)
                log_step(dict(model=model.name, step=step, loss=sum(losses) / len(losses), val=val,
                              lr=lr, grad=grad, seconds=time.time() - start),
                         cfg, step - first, n_tokens)
                losses = []
    batches.close()
    if step < cfg.max_steps:
        if RANK == 0:
            save()
        raise UserError(f"{model.name}: stopped at step {step}/{cfg.max_steps}, saved in {path}; "
                        "the same command with --resume goes on",
                        code=128 + (stop or [signal.SIGTERM])[0])
    return ema.module.eval().requires_grad_(False)  # `model` may be compiled for training shapes


def prepare(cfg):
    """What every training command starts with: checked settings, data, the folder of the run."""
    cfg = resolve(cfg)
    if WORLD > 1 and not dist.is_initialized():
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)
        if RANK > 0:  # process 0 speaks and writes for all
            sys.stdout = open(os.devnull, "w")
            dist.barrier()
    data = load_data(cfg)
    if WORLD > 1 and RANK == 0:  # the others find the token cache that process 0 has written
        dist.barrier()
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        with open(os.path.join(cfg.out_dir, "log.jsonl"), "a"):
            pass
    except OSError as e:
        raise UserError(f"--out-dir {cfg.out_dir}: cannot be written ({e.strerror})") from e
    return cfg, data


def train_teacher(cfg, data):
    """The AR teacher of this run's folder, trained, resumed or reused."""
    cfg = dataclasses.replace(cfg, max_steps=cfg.teacher_steps)
    torch.manual_seed(cfg.seed)
    return train(Teacher(cfg, data.tokenizer), lambda model, x0, *_: teacher_loss(model, x0), None,
                 data, cfg, TEACHER_SETTINGS)


def get_teacher(cfg, data):
    """The teacher at --teacher, or the finished one in the run's folder, or one trained there."""
    path = cfg.teacher or os.path.join(cfg.out_dir, "teacher.pt")
    if not cfg.teacher:
        saved = load_checkpoint(path, "teacher") if os.path.exists(path) else None
        if saved is None or saved["step"] < saved["config"]["max_steps"]:
            return train_teacher(cfg, data)
    print(f"teacher: {path}")
    return load_teacher(path, data.tokenizer, cfg.seq_len, cfg.device, data.fingerprint)


def teacher_data(teacher, data, cfg):
    """A training set of the teacher's own texts, as Data, by serial extraction.

    Learned with their noise (--labels teacher --noise gumbel) it is the paper's serial variant,
    without (--noise none) sequence-level KD. Text i is what sequence_noise((seed, "labels"), i)
    makes of the teacher: only a seed is kept.
    """
    n, texts = min(len(data.train) // cfg.seq_len, cfg.max_steps * cfg.batch_size), []
    batches = sampling_batches(n, cfg.seq_len, teacher.vocab_size)
    for index in tqdm(batches, desc="serial extraction", disable=None):
        xi, _ = sequence_noise((cfg.seed, "labels"), index, cfg.seq_len, teacher)
        texts.append(serial_extraction(teacher, xi)[0].cpu().numpy().astype(np.uint16))
    return Data(np.concatenate(texts).ravel(), data.val, cfg.seq_len, data.tokenizer, cfg.seq_len)


def train_student(cfg, teacher, data):
    """The student with cfg.noise (a single one), trained, resumed or reused."""
    sources = []
    if cfg.labels != "teacher":
        sources.append(data)
    if cfg.labels != "data":
        sources.append(teacher_data(teacher, data, cfg))

    def loss_fn(model, x0, s, index, step, piece):
        def recorded(rows):
            return sequence_noise((cfg.seed, "labels"), index[rows], cfg.seq_len, model)[0]

        is_recorded = sources[step % len(sources)] is not data
        low, high = model.t_range
        return student_loss(model, teacher, x0, low + (high - low) * s,
                            (cfg.seed, "loss", step, piece), recorded if is_recorded else None,
                            cfg.loss)

    count = np.bincount(sources[0].train[:10**7], minlength=teacher.vocab_size) + 1.0
    log_freq = torch.tensor(count / count.sum()).log().to(torch.get_default_dtype())
    torch.manual_seed(cfg.seed)
    model = Student(cfg, teacher.vocab_size, log_freq)
    if cfg.init_from:
        start_from(model, cfg.init_from, data.tokenizer)
    names = STUDENT_SETTINGS if cfg.noise == "none" else NOISE_SETTINGS
    if cfg.clip:
        names = [*names, "eval_every"]                          # each validation sets the times
    return train(model, loss_fn, teacher, data, cfg, names, sources)


def run(cfg):
    """The whole experiment: data, teacher, a student for each noise, table; returns its rows."""
    start = time.time()
    cfg, data = prepare(cfg)
    teacher = get_teacher(cfg, data)
    students = [train_student(dataclasses.replace(cfg, noise=noise), teacher, data)
                for noise in cfg.noise.split(",")]
    if RANK > 0:
        return None
    rows = evaluate(teacher, students, data, cfg)
    path = os.path.join(cfg.out_dir, "results.json")
    with open(path, "w") as f:
        json.dump(rows, f, indent=1)
    print_table(rows)
    nfe = numbers(cfg, "nfe")[-1]
    for student in students:
        x = generate(student, 1, cfg.seq_len, cfg.seed, nfe=nfe, order=cfg.order,
                     temperature=default_temperatures(student, cfg)[0])
        print(f"\n{student.name}, nfe {nfe}:\n{show(x[0], cfg.dataset, data.tokenizer)}")
    print(f"\n{path} written; {time.time() - start:.0f} s in all")
    return rows


# -----------------------------------------------------------------------------
# 11. Command line

def add_flags(parser, *names, **defaults):
    """A flag for each named field of Config, or for all; `defaults` replace those of Config."""
    for f in dataclasses.fields(Config):
        if names and f.name not in names:
            continue
        text, choices = f.metadata["help"], f.metadata["choices"]
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=text)
            continue
        default = shown = defaults.get(f.name, f.default)
        if default is None and f.name not in defaults:
            presets = {dataset: p[f.name] for dataset, p in PRESETS.items() if f.name in p}
            shown = ", ".join(f"{dataset} {value}" for dataset, value in presets.items())
            if len(presets) > 1 and len(set(presets.values())) == 1:
                shown = next(iter(presets.values()))
        parser.add_argument(flag(f.name), type=f.type, default=default,
                            metavar="{" + ",".join(choices) + "}" if choices else f.type.__name__,
                            help=text if shown in ("", None) else f"{text} ({shown})")
    return parser


def run_cli(main):
    """Call main(); what a user can cause becomes one line on stderr, without a traceback."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as e:  # CUDA's out-of-memory error is a RuntimeError too
        text = str(e).splitlines()[0] if str(e) else ""
        if not isinstance(e, MemoryError) and "memory" not in text:
            raise
        print("error: out of memory: lower --batch-size, or split the batch into more pieces with "
              f"--grad-accum ({text or 'MemoryError'})", file=sys.stderr)
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser(
        description="Gumbel Distillation: trains a teacher and students, and prints how well each "
        "generates. In brackets: defaults, for each dataset where they differ.")
    cfg = Config(**vars(add_flags(parser).parse_args()))
    if cfg.ablate:
        from ablation import ablate
        ablate(cfg)
    else:
        run(cfg)


if __name__ == "__main__":
    import gumbel_distill  # so that there is one UserError, here and in what text.py imports
    gumbel_distill.run_cli(gumbel_distill.main)
