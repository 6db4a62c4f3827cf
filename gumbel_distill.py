"""Gumbel Distillation for Parallel Text Generation, small enough to read.

Paper: Zhang, Hu, Liu and Liu, ICLR 2026, arXiv 2603.22216. Official code: hxixixh/gumbel-distill

    python gumbel_distill.py                                           # a maze: two minutes
    python gumbel_distill.py --dataset text --train-files input.txt    # your own text
    python gumbel_distill.py --dataset lm1b                            # LM1B, on one GPU

A parallel decoder draws many tokens in one step, each on its own, so "San" can meet "Angeles". An
autoregressive (AR) teacher draws its tokens one after the other. Each draw is argmax(logp + xi)
with Gumbel noise xi, so the noise determines the text. Show this noise to the parallel student, and
the student no longer has to learn a joint distribution. It learns a function from noise to text:

    1. mask each token of a text x0 with probability t                     q_sample
    2. one pass of the teacher: how likely was each masked token?          Teacher
    3. draw the noise with which the teacher would have written x0         posterior_gumbel
    4. the student sees the unmasked tokens and the noise of the others    Student
    5. cross-entropy with the masked tokens, weighted by 1/t               student_loss
    6. to write a text: fresh noise, a few steps, no teacher               sample

Glossary (B = batch, T = seq_len, V = vocab_size, C = n_embd, M = number of masked tokens)
    x0, xt   (B, T) long   clean and masked token ids; [MASK] is the id mask_id = V
    t        (B, T/L')     time in (0, 1] of each block of L' tokens: P(masked) = t, P(kept) =
                           alpha_t = 1 - t. MDLM has one block, L' = T
    xi       (B, T, V)     Gumbel noise; xi[:, i] decides token i, given the tokens before it
    logp     (..., V)      logits normalised over V, in nats
    nfe                    number of function evaluations = denoising steps of a text
    tau                    scale of xi in sampling; 1 as in training
"""

import argparse
import copy
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import PRESETS, Data, Tokenizer, UserError, load_data, load_pretrained
from data import print_table, run_cli, token_entropy


# -----------------------------------------------------------------------------
# 1. Transformer: causal for the teacher; bidirectional, or in blocks, for the student
class Block(nn.Module):
    """Attention and MLP. The MLP has ReLU^2 (So et al. 2021) where the official code has GELU."""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(n_embd, bias=False)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.attn_out = nn.Linear(n_embd, n_embd, bias=False)
        self.norm2 = nn.LayerNorm(n_embd, bias=False)
        self.mlp_in = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.mlp_out = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, rope, mask, is_causal, cache):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x))                           # (B, T, 3 C)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)                        # (3, B, nh, T, hs)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        if cache is not None:
            k, v = cache.extend(self, k, v)                     # (B, nh, start + T, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        y = self.attn_out(y.transpose(1, 2).reshape(B, T, C))
        x = x + F.dropout(y, self.dropout, self.training)
        y = F.relu(self.mlp_in(self.norm2(x)))                  # (B, T, 4 C)
        y = self.mlp_out(y.square())
        return x + F.dropout(y, self.dropout, self.training)


def rotary(pos, head_size, dtype):
    """Rotary position embedding: cos and sin of the angles at positions pos (T,), (T, hs) each."""
    freq = 10000.0 ** (-torch.arange(0, head_size, 2, device=pos.device) / head_size)
    angle = pos[:, None] * freq                                 # (T, hs / 2)
    angle = torch.cat([angle, angle], dim=-1)                   # (T, hs)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rope):
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class Transformer(nn.Module):
    """Token embedding, blocks, final norm, output head. There are V outputs, but V + 1 input rows:
    the last row is BOS for the teacher, [MASK] for a student."""

    def __init__(self, cfg, vocab_size, causal):
        super().__init__()
        self.causal = causal
        self.head_size = cfg.n_embd // cfg.n_head
        self.embed = nn.Embedding(vocab_size + 1, cfg.n_embd)
        self.blocks = nn.ModuleList()
        for _ in range(cfg.n_layer):
            self.blocks.append(Block(cfg.n_embd, cfg.n_head, cfg.dropout))
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        self.head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            # As GPT-2. But a student's attention begins larger in a narrow model (0.02 at width
            # 768). With 0.02 it stays flat for long, and MDLM predicts mere token frequencies.
            is_residual = name.endswith("out.weight")
            std = 0.02 / math.sqrt(2 * cfg.n_layer) if is_residual else 0.02
            if name.endswith("qkv.weight") and not causal:
                std = 0.55 / math.sqrt(cfg.n_embd)
            if p.dim() == 2:
                nn.init.normal_(p, std=std)

    def forward(self, x, mask=None, pos=None, cache=None, between=None):
        """Embeddings x (B, T, C) at positions pos (T,) -> hidden states (B, T, C).
        mask     (T, S) bool, True where a position may look; None: causal or full attention
        cache    KVCache of the tokens before x; a causal one takes one token at a time
        between  function that changes the hidden states, called at each quarter of the layers
        """
        T, start = x.size(1), cache.start if cache else 0
        if pos is None:
            pos = torch.arange(start, start + T, device=x.device)
        rope = rotary(pos, self.head_size, x.dtype)
        n_layer = len(self.blocks)
        for i, block in enumerate(self.blocks):
            if between and i in (n_layer // 4, n_layer // 2, n_layer * 3 // 4):
                x = between(x)
            x = block(x, rope, mask, self.causal and T > 1, cache)
        return self.norm(x)

    def logits(self, h):
        """Logits (..., V) of hidden states h (..., C), in float32 also under autocast."""
        logits = self.head(h)
        return logits.float() if logits.dtype == torch.bfloat16 else logits


class KVCache:
    """Keys and values of each Block. The first `start` tokens are final, the caller counts them."""

    def __init__(self):
        self.start, self.kv = 0, {}

    def extend(self, block, k, v):
        """Keys and values (2, B, nh, start + T, hs): those of the final tokens and of T others."""
        kv = torch.stack([k, v])                                # (2, B, nh, T, hs)
        if self.start > 0:
            kv = torch.cat([self.kv[block][:, :, :, :self.start], kv], dim=3)
        self.kv[block] = kv
        return kv


# -----------------------------------------------------------------------------
# 2. Teacher: an AR language model
class Teacher(nn.Module):
    """p(x0) = prod_i p(x0[i] | BOS, x0[:i]). The teacher itself puts BOS in front."""
    name = "teacher"

    def __init__(self, cfg, tokenizer, net=None):
        super().__init__()
        self.vocab_size = tokenizer.vocab_size
        self.bos_id = tokenizer.bos_id
        self.net = net or Transformer(cfg, self.vocab_size, causal=True)

    def hidden(self, x0):
        """Hidden states (B, T, C): state i has read BOS and the tokens of x0 (B, T) before i."""
        bos = torch.full_like(x0[:, :1], self.bos_id)
        x = torch.cat([bos, x0[:, :-1]], dim=1)
        return self.net(self.net.embed(x))

    def forward(self, x0, is_masked=None):
        """logp of the tokens of x0 (B, T), given those before: (B, T, V); of the masked: (M, V)."""
        h = self.hidden(x0)                                     # (B, T, C)
        if is_masked is not None:
            h = h[is_masked]                                    # (M, C)
        # Logits rounded to bfloat16 would contradict the teacher that writes texts in float32.
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.net.head.weight.dtype)
            return self.net.logits(h).log_softmax(dim=-1)


def teacher_loss(teacher, x0, *_):
    """Cross-entropy of x0 (B, T), in nats per token. (train hands every loss more than that.)"""
    logits = teacher.net.logits(teacher.hidden(x0))             # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), x0.flatten())


# -----------------------------------------------------------------------------
# 3. Gumbel-Max labelling: token = argmax(logp + xi)                      (Theorem 4.1)
def rng(*key, device="cpu"):
    """A torch.Generator seeded by `key`, which says what its draws are for: (seed, "batch", 3)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def sample_exponential(shape, generator, dtype=torch.float32):
    """E = -log(1 - u) ~ Exp(1), never 0 or infinite. u = (n + 1/2) / 2^31 with 31 random bits n
    stays precise near 0, where xi = -log E is large: it reaches 22, with torch.rand only 16.6."""
    bits = torch.empty(shape, dtype=torch.int32, device=generator.device)
    bits.random_(generator=generator)
    E = bits.to(dtype)              # in place from here: memory limits the speed of large noise
    E += 0.5
    E *= -(1 - 2**-24) / 2**31      # -u, above -1 when rounded to float32, too
    E.log1p_()
    return E.neg_()


def sample_gumbel(shape, generator, dtype=torch.float32):
    """iid Gumbel(0,1) noise, xi = -log E. Gumbel-Max: argmax(logp + xi) is then a draw from p."""
    return -sample_exponential(shape, generator, dtype).log()


def posterior_gumbel(logp, x0, generator):
    """Draw the noise that would have made the teacher pick x0: parallel extraction (Theorem 4.1).
    With p = exp(logp) and E, E0 ~ Exp(1):   xi[k]  = -log(E[k] + p[k] E0)      for the losers
                                             xi[x0] = -log E0 - log p[x0]       for the winner
    This is the paper's formula with zeta = -log E, in a form that cannot overflow.
    Args:    logp (..., V) float, nats, normalised over V;  x0 (...) long in [0, V)
    Returns: xi (..., V) of logp's dtype; argmax(logp + xi) == x0 (in float32 rounding breaks a
             near-tie about once in 1e6 positions); xi is iid Gumbel(0,1) when x0 ~ p
    Raises:  ValueError if the shapes disagree
    Official code: utils.py get_posterior_gumbel.   Test: tests/test_gumbel.py
    """
    if logp.shape[:-1] != x0.shape:
        raise ValueError(f"logp {tuple(logp.shape)} and x0 {tuple(x0.shape)} disagree")
    E = sample_exponential(logp.shape, generator, logp.dtype)
    E0 = sample_exponential(x0.shape, generator, logp.dtype)[..., None]    # (..., 1)
    winner = x0[..., None]                                      # (..., 1)
    E += logp.exp() * E0
    xi = -E.log_()
    return xi.scatter_(-1, winner, -E0.log() - logp.gather(-1, winner))


@torch.no_grad()
def serial_extraction(teacher, xi, xt=None):
    """Serial extraction: sample the teacher with recorded noise, x_i = argmax(logp_i + xi_i).
    Fresh xi (B, T, V) gives an exact sample x0 (B, T), tau * xi one at temperature tau. Known
    tokens of xt (B, T) are kept, it is V elsewhere. Takes T cached passes.
    """
    B, T, V = xi.shape
    net = teacher.net
    cache = KVCache()
    x0 = []
    token = torch.full((B, 1), teacher.bos_id, device=xi.device)
    for i in range(T):
        h = net(net.embed(token), cache=cache)                  # (B, 1, C)
        cache.start += 1
        logp = net.logits(h[:, 0]).log_softmax(dim=-1)          # (B, V)
        token = (logp + xi[:, i]).argmax(dim=-1, keepdim=True)  # (B, 1)
        if xt is not None:
            known = xt[:, i:i + 1]                              # (B, 1)
            token = torch.where(known == V, token, known)
        x0.append(token)
    return torch.cat(x0, dim=1)


# -----------------------------------------------------------------------------
# 4. Student: a masked diffusion model that is shown the noise
STUDENTS = ["mdlm", "bd3lm", "gumbel", "gumbel-draft", "gaussian", "gaussian-draft", "uniform",
            "uniform-draft", "independent", "independent-draft"]
DRAFT_TOKENS = 8                    # a draft mixes the embeddings of that many tokens


class Student(nn.Module):
    """Masked diffusion model. Its name says which noise it reads at the masked tokens, and how.
    mdlm, bd3lm   no noise. MDLM (Sahoo et al. 2024) has one block. BD3-LM (Arriola et al. 2025) is
                  autoregressive over blocks, with masked diffusion in each
    gumbel        the paper's noise injection: W softmax(xi) replaces the embedding of [MASK]
    gumbel-draft  ours: at each quarter of the layers the student drafts the tokens that Gumbel-Max
                  would draw from its own logits; the layers above see them and make them agree
    gaussian, uniform: the same noise through its CDF;  independent: a control, knows no text
    SUBS holds by construction: [MASK] is no output, and only masked positions get logits.
    """

    def __init__(self, cfg, name, vocab_size):
        super().__init__()
        if name not in STUDENTS:
            raise ValueError(f"student {name!r}: choose from {STUDENTS}")
        self.name = name
        self.vocab_size = self.mask_id = vocab_size
        self.seq_len = cfg.seq_len
        self.block_size = cfg.block_size
        self.noise = None if name in ("mdlm", "bd3lm") else name.removesuffix("-draft")
        self.is_draft = name.endswith("-draft")
        self.net = Transformer(cfg, vocab_size, causal=False)
        # Rotary positions are relative: where all is masked, every position looks alike. The
        # official code has the unmasked BOS as an anchor, we have an embedding per position.
        self.embed_pos = nn.Embedding(cfg.seq_len, cfg.n_embd)
        nn.init.normal_(self.embed_pos.weight, std=0.02)
        if self.is_draft:
            self.scale = nn.Parameter(torch.ones(()))           # s
        elif self.noise:
            self.embed_noise = nn.Parameter(torch.empty(vocab_size, cfg.n_embd))    # W
            nn.init.uniform_(self.embed_noise, -vocab_size**-0.5, vocab_size**-0.5)

    def forward(self, xt, xi=None, x0=None, cache=None):
        """Logits at the masked positions of xt (B, T), row by row: (M, V).
        xi     (M, V) Gumbel noise of these positions, in the same order
        x0     (B, T) clean text, in training: each block of xt sees the blocks of x0 before it
        cache  KVCache of the blocks before xt
        """
        T = xt.size(1)
        start = cache.start if cache else 0
        pos = torch.arange(start, start + T, device=xt.device)
        mask = None
        if x0 is not None and self.block_size < self.seq_len:
            xt = torch.cat([xt, x0], dim=1)                     # (B, 2T)
            pos = pos.repeat(2)
            mask = block_mask(T, self.block_size, xt.device)
        is_masked = xt == self.mask_id                          # (B, T or 2T), M of them True
        x = self.net.embed(xt)                                  # (B, T or 2T, C)
        between = None
        if self.noise and xi is not None:
            z = change_noise(xi, self.noise)                    # (M, V)
            if self.is_draft:
                between = partial(self.add_drafts, is_masked=is_masked, z=z)
            else:
                x = put(x, is_masked, z.softmax(dim=-1) @ self.embed_noise)
        h = self.net(x + self.embed_pos(pos), mask, pos, cache, between)
        return self.net.logits(h[is_masked])

    def add_drafts(self, h, is_masked, z):
        """Hidden states h (B, T, C) plus, where masked, a draft: E softmax(s (logits + z)) over the
        best tokens alone, with the student's own logits and the noise z (M, V). It is a soft form
        of the token argmax(logits + z)."""
        net = self.net
        k = min(DRAFT_TOKENS, self.vocab_size)
        h_masked = net.norm(h[is_masked])                       # (M, C)
        # all logits, without gradient, to choose; then those of the k best again, with it
        score = F.linear(h_masked.detach(), net.head.weight.detach()) + z  # (M, V)
        best = score.topk(k, dim=-1).indices                    # (M, k)
        logits = torch.einsum("mkc,mc->mk", F.embedding(best, net.head.weight), h_masked)
        score = logits + z.gather(-1, best)                     # (M, k)
        weight = (self.scale * score).softmax(dim=-1)
        draft = torch.einsum("mk,mkc->mc", weight, F.embedding(best, net.embed.weight))
        return h + put(torch.zeros_like(h), is_masked, draft)

    def nfe_of_text(self, nfe):
        """Function evaluations of a whole text: nfe for each block, but at most one a token."""
        n_blocks = self.seq_len // self.block_size
        return min(nfe, self.block_size) * n_blocks


def put(x, is_masked, embeddings):
    """x (B, T, C) with embeddings (M, C) at its masked positions."""
    return x.masked_scatter(is_masked[..., None], embeddings.to(x.dtype))


def change_noise(xi, noise):
    """Gumbel noise as it is or, sent through its CDF, as "uniform" U(0,1) or "gaussian" N(0,1)."""
    if noise not in ("uniform", "gaussian"):
        return xi
    z = torch.exp(-torch.exp(-xi.double()))                     # the CDF; float64 resolves its ends
    if noise == "gaussian":
        z = torch.special.ndtri(z.clamp(1e-300, 1 - 1e-16))
    return z.to(xi.dtype)


def block_mask(seq_len, block_size, device):
    """BD3-LM's training mask over xt and then x0: (2T, 2T) bool, True where a row sees a column.
    A block of xt sees itself and the earlier blocks of x0. A block of x0 sees x0 up to itself."""
    i = torch.arange(2 * seq_len, device=device)
    block = i % seq_len // block_size
    is_xt = i < seq_len
    same_block = block[:, None] == block
    same_copy = is_xt[:, None] == is_xt
    x0_before = (block[:, None] > block) & ~is_xt
    return (same_block & same_copy) | x0_before


# -----------------------------------------------------------------------------
# 5. Loss: masked diffusion with alpha_t = 1 - t, weight 1/t
T_MIN = 1e-3                        # smallest time: the weight 1/t stays bounded


def stratified_times(u):
    """Times (B, n), one in each of B n equal parts of [T_MIN, 1]; u (B, n) in [0, 1) says where."""
    part = torch.arange(u.numel(), device=u.device).view(u.shape)
    return T_MIN + (1 - T_MIN) * (part + u) / u.numel()


def q_sample(x0, t, mask_id, generator):
    """Forward process: each token of x0 (B, T) becomes mask_id with probability t (B, T)."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    return torch.where(u < t, mask_id, x0)


def student_loss(student, teacher, x0, t, generator, xi=None, loss="ce"):
    """- E [ 1/t sum over masked i of log p_theta(x0_i | xt, xi) ] / T, in nats per token.

    Without noise it is the MDLM objective or, in blocks, the BD3-LM objective: a bound on the
    negative log-likelihood (NELBO). With posterior noise it is no likelihood: the noise knows x0.
    Args: x0 (B, T) long;  t (B, T/L') in (0, 1];  generator of the mask and of the noise
          xi (B, T, V): recorded noise of x0 (serial extraction); None: posterior noise, drawn here
          loss: "kd" is token-level KD, the teacher's p(. | x0[:i]) in place of x0_i
    """
    # 1. mask each token of x0 with probability t. All that is V wide is computed for these only
    t = t.repeat_interleave(student.block_size, dim=1)          # (B, T)
    xt = q_sample(x0, t, student.mask_id, generator)
    is_masked = xt == student.mask_id                           # M of them True
    target = x0[is_masked]                                      # (M,)
    with torch.no_grad():
        # 2. one pass of the teacher: how likely was each masked token, given those before it?
        is_posterior = student.noise not in (None, "independent") and xi is None
        if is_posterior or loss == "kd":
            logp = teacher(x0, is_masked)                       # (M, V)
        # 3. the noise with which the teacher would have written x0
        if is_posterior:
            xi = posterior_gumbel(logp, target, generator)      # (M, V)
        elif student.noise == "independent":
            xi = sample_gumbel((len(target), student.vocab_size), generator)
        elif xi is not None:
            xi = xi[is_masked]
        if loss == "kd":
            target = logp.exp()                                 # (M, V)
    # 4. the student sees the unmasked tokens, and the noise of the masked ones
    logits = student(xt, xi, x0)                                # (M, V)
    # 5. cross-entropy with the masked tokens, weighted by 1/t
    nll = F.cross_entropy(logits, target, reduction="none")     # (M,)
    return (nll / t[is_masked]).sum() / x0.numel()


# -----------------------------------------------------------------------------
# 6. Sampling: the noise is drawn once and kept over all steps
def sequence_noise(seed, index, seq_len, model):
    """All draws of the texts number `index` (n,); they depend on (seed, number) alone. xi (n, T, V)
    is the noise. u (n, 2, T) in [0, 1) says when a token is filled, and which one is drawn."""
    like = next(model.parameters())
    xi, u = [], []
    for i in index.tolist():
        g = rng(seed, "sequence", i, device=like.device)
        u.append(torch.rand(2, seq_len, generator=g, dtype=torch.float64, device=like.device))
        xi.append(sample_gumbel((seq_len, model.vocab_size), g, like.dtype))
    return torch.stack(xi), torch.stack(u)


def draw_tokens(logits, u, temperature, top_p):
    """Tokens (M,) from logits (M, V), at temperature 0 by argmax, else by inverse CDF at u (M,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:  # nucleus: the likeliest tokens, up to and with the one that reaches top_p
        likeliest, token = p.sort(dim=-1, descending=True)
        total_before = likeliest.cumsum(dim=-1) - likeliest
        likeliest = likeliest.masked_fill(total_before > top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, token, likeliest)
    cdf = p.cumsum(dim=-1)
    point = u[:, None] * cdf[:, -1:]                            # (M, 1)
    return (cdf <= point).sum(dim=-1)


def is_among_best(score, is_masked, n):
    """The n (B,) masked positions of highest score (B, L), in each row: (B, L) bool."""
    score = score.double().masked_fill(~is_masked, -math.inf)
    best_first = score.argsort(dim=1, descending=True, stable=True)        # rank -> position
    rank = best_first.argsort(dim=1)                                       # position -> rank
    return is_masked & (rank < n[:, None])


@torch.no_grad()
def sample(student, xi, u, nfe, tau=1.0, temperature=0.0, top_p=1.0, order="random", xt=None,
           on_step=None):
    """Fill all masked tokens, from t = 1 to t = 0: at once or, with blocks, one after the other.
    Each block takes nfe steps. A text longer than seq_len is written in a moving window.
    order: random         ancestral, as MDLM: a token is filled when time falls below its u[:, 0].
                          A step from time t to s fills a masked token with probability (t - s) / t
           first-hitting  the same order, but the same number each step (Zheng et al. 2025)
           confidence     the same number each step, the student's surest tokens first
           left           the same number each step, from left to right
    xi (B, T, V) and u (B, 2, T) come from sequence_noise. Known tokens of xt (B, T) are kept, it is
    mask_id elsewhere. on_step is called with the text after each step. Returns: (B, T) long
    """
    B, _, T = u.shape
    L = student.block_size
    mask_id = student.mask_id
    text = torch.full((B, T), mask_id, device=u.device)
    if xt is not None:
        text = xt.clone()
    cache = KVCache()
    for start in range(0, T, L):
        block = slice(start, start + L)
        if cache.start + L > student.seq_len:  # the window is full: its second half begins another
            cache = KVCache()
            n_seen = student.seq_len // 2 // L * L
            for i in range(start - n_seen, start, L):
                student(text[:, i:i + L], cache=cache)
                cache.start += L
        xt = text[:, block]                                     # (B, L), a view of text
        u_when = u[:, 0, block]                                 # (B, L)
        u_what = u[:, 1, block]
        n_start = (xt == mask_id).sum(dim=1)                    # (B,)
        for k in range(1, nfe + 1):                             # time falls to 1 - k / nfe
            is_masked = xt == mask_id
            n_fill = is_masked.sum(dim=1) - n_start * (nfe - k) // nfe     # (B,)
            if order == "random":
                n_fill = (is_masked & (u_when >= 1 - k / nfe)).sum(dim=1)
            if not n_fill.any():
                continue
            logits = student(xt, tau * xi[:, block][is_masked], cache=cache)         # (M, V)
            tokens = draw_tokens(logits, u_what[is_masked], temperature, top_p)      # (M,)
            score = u_when
            if order == "left":
                score = torch.arange(L, 0, -1, device=u.device)[:xt.size(1)].expand_as(xt)
            if order == "confidence":
                surest = logits.double().softmax(dim=-1).amax(dim=-1)
                score = u_when.masked_scatter(is_masked, surest)
            is_filled = is_among_best(score, is_masked, n_fill)
            xt[is_filled] = xt.masked_scatter(is_masked, tokens)[is_filled]
            if on_step:
                on_step(text.clone())
        if start + L < T:  # the block is final: read it once more, into the cache
            student(xt, cache=cache)
            cache.start += L
    return text


def sampling_batches(n, seq_len, vocab_size, batch_size=1000):
    """Numbers 0..n-1 of texts, in batches whose noise (B, T, V) stays under 256 MiB."""
    limit = max(1, 2**26 // (seq_len * vocab_size))
    return torch.arange(n).split(min(batch_size, limit))


@torch.no_grad()
def generate(model, n, seq_len, seed=0, known=None, batch_size=1000, progress=None, **settings):
    """n texts (n, T) long of a Student (settings as in `sample`) or of a Teacher (tau only).
    Text i depends on (seed, i) alone. All keep the tokens of `known` (T,), which is V elsewhere."""
    texts = []
    batches = sampling_batches(n, seq_len, model.vocab_size, batch_size)
    for index in tqdm(batches, desc=progress, disable=None if progress else True):
        xi, u = sequence_noise(seed, index, seq_len, model)
        xt = None if known is None else known.expand(len(index), seq_len)
        if isinstance(model, Teacher):
            texts.append(serial_extraction(model, settings.get("tau", 1.0) * xi, xt))
        else:
            texts.append(sample(model, xi, u, xt=xt, **settings))
    return torch.cat(texts)


# -----------------------------------------------------------------------------
# 7. Settings: every field of Config is a command-line flag of the same name
HAS_GPU = torch.cuda.is_available()
TOKENIZERS = ["char", "gpt2", "gpt2-1024", "gpt2-4096"]
ORDERS = ["random", "first-hitting", "confidence", "left"]


def option(default, help, **how):
    """A field of Config; `how` goes to argparse's add_argument. With nargs it is a list."""
    return dataclasses.field(default=default, metadata=dict(how, help=help))


@dataclasses.dataclass
class Config:
    """Settings of a run. None means: as PRESETS says for the dataset."""
    dataset: str = option("maze", "what to learn", choices=PRESETS)
    train_files: str = option(None, "text, .jsonl or .parquet: a file or a quoted glob; or the hub")
    val_files: str = option(None, "files to validate on; or the last 10%% of the training text")
    tokenizer: str = option(None, "gpt2-N: the first N tokens of GPT-2's BPE", choices=TOKENIZERS)
    max_tokens: int = option(None, "use at most this many training tokens")
    # model: teacher and students have one shape
    seq_len: int = option(None, "tokens per sequence")
    n_layer: int = option(None, "Transformer blocks")
    n_head: int = option(None, "attention heads")
    n_embd: int = option(None, "width")
    dropout: float = option(None, "dropout probability")
    block_size: int = option(None, "BD3-LM's block length; seq_len, the default, is MDLM")
    # distillation
    students: str = option(None, "(mdlm, in blocks bd3lm, and gumbel gumbel-draft)", nargs="+",
                           choices=STUDENTS)
    labels: str = option("data", "real text or the teacher's own", choices=["data", "teacher"])
    loss: str = option("ce", "against text or the teacher's probabilities", choices=["ce", "kd"])
    teacher: str = option(None, "a checkpoint, gpt2, gpt2-large or a folder; or --out-dir's own")
    init_from: str = option(None, "checkpoint of a student whose weights to start from")
    # training
    batch_size: int = option(None, "sequences per optimiser step; of sample.py: texts at once")
    grad_accum: int = option(None, "pieces to split a batch into, to save memory")
    max_steps: int = option(None, "optimiser steps of each model")
    lr: float = option(None, "peak learning rate of AdamW")
    warmup: int = option(None, "steps of linear warm-up")
    schedule: str = option(None, "learning rate after it", choices=["cosine", "constant"])
    ema: float = option(None, "decay per step of the averaged weights; 0: none")
    eval_every: int = option(None, "steps between validations; each writes the checkpoint")
    # sampling
    nfe: int = option(None, "function evaluations of each block, one or more numbers", nargs="+")
    tau: float = option((1.0,), "scale of the noise, one or more numbers", nargs="+")
    temperature: float = option(None, "likewise; with noise only if there is one tau "
                                "(with noise 0, without 1 0)", nargs="+")
    top_p: float = option(1.0, "nucleus: the likeliest tokens of this total")
    order: str = option("random", "which masked tokens to fill first", choices=ORDERS)
    n_samples: int = option(None, "texts per row of the table")
    # machine
    seed: int = option(0, "seed of every random draw")
    device: str = option("cuda" if HAS_GPU else "cpu", "cpu or cuda", choices=["cpu", "cuda"])
    dtype: str = option("bfloat16" if HAS_GPU else "float32", "of the training",
                        choices=["float32", "bfloat16"])
    compile: bool = option(HAS_GPU, "torch.compile", action=argparse.BooleanOptionalAction)
    out_dir: str = option(None, "folder of this run (out/<dataset>)")


def flag(name):
    return "--" + name.replace("_", "-")


def resolve(cfg):
    """Fill in the dataset's preset, and check what argparse cannot; returns a new Config."""
    preset = dict(PRESETS[cfg.dataset], out_dir=f"out/{cfg.dataset}")
    missing = {name: value for name, value in preset.items() if getattr(cfg, name) is None}
    cfg = dataclasses.replace(cfg, **missing)
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)                            # a number, or several
        least = 0 if f.type is float or f.name in ("seed", "warmup") else 1
        most = 1 if f.name in ("dropout", "ema", "top_p") else math.inf
        if f.type in (int, float) and value is not None and not least <= np.min(value) <= most:
            raise UserError(f"{flag(f.name)} {value}: must lie between {least} and {most}")
    cfg.block_size = cfg.block_size or cfg.seq_len
    for whole, part, message in [
            (cfg.seq_len, cfg.block_size, "--seq-len {}: must be a multiple of --block-size {}"),
            (cfg.n_embd, 2 * cfg.n_head, "--n-embd {}: must be a multiple of {}, twice --n-head"),
            (cfg.batch_size, cfg.grad_accum, "--batch-size {}: must be a multiple of {}, the "
             "--grad-accum")]:
        if whole % part:
            raise UserError(message.format(whole, part))
    if cfg.grad_accum < WORLD:
        raise UserError(f"--grad-accum {cfg.grad_accum}: must be {WORLD} or more for {WORLD} "
                        "processes, which share the pieces of a batch")
    if cfg.device == "cuda" and not HAS_GPU:
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    cfg.students = cfg.students or ["mdlm", "gumbel", "gumbel-draft"]
    if cfg.block_size < cfg.seq_len:  # MDLM in blocks is BD3-LM
        cfg.students = [name.replace("mdlm", "bd3lm") for name in cfg.students]
    return cfg


def add_flags(parser, *names, **defaults):
    """A flag for each named field of Config, or for all; `defaults` replace those of Config."""
    for f in dataclasses.fields(Config):
        if names and f.name not in names:
            continue
        how = dict(f.metadata, default=defaults.get(f.name, f.default))
        if f.type is not bool:
            how["type"] = f.type
        presets = [f"{name} {preset[f.name]}" for name, preset in PRESETS.items()
                   if f.name in preset and f.name not in defaults]
        how["help"] += f" ({', '.join(presets) or how['default']})"
        parser.add_argument(flag(f.name), **how)
    return parser


# -----------------------------------------------------------------------------
# 8. Training: one loop for teacher and student
# torchrun starts WORLD processes with numbers RANK from 0; without it there is one.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

FORMAT = 2                          # of checkpoints; another format is not read
# What decides a trained model, beside its data
SHAPE = ["seq_len", "n_layer", "n_head", "n_embd"]
TEACHER_SETTINGS = SHAPE + ["dropout", "batch_size", "grad_accum", "max_steps", "lr", "warmup",
                            "schedule", "ema", "seed"]
STUDENT_SETTINGS = TEACHER_SETTINGS + ["block_size", "labels", "loss", "init_from"]


def load_checkpoint(path):
    """A checkpoint as a dict of tensors and plain values; code in the file is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}")
        return dict(saved, config=Config(**saved["config"]))
    except Exception as e:  # torch raises many types for cut-off and foreign files
        raise UserError(f"{path}: missing, cut off, or no checkpoint of this version ({e!r:.99}); "
                        "name another file like out/maze/teacher.pt, or train it again") from e


def load_model(path, device):
    """The Teacher or Student of a checkpoint, its Tokenizer, and what else the checkpoint holds."""
    saved = load_checkpoint(path)
    tokenizer = Tokenizer(**saved["tokenizer"])
    if saved["name"] == "teacher":
        model = Teacher(saved["config"], tokenizer)
    else:
        model = Student(saved["config"], saved["name"], tokenizer.vocab_size)
    model.load_state_dict(saved["ema"])
    return model.to(device).eval().requires_grad_(False), tokenizer, saved


def check_equal(path, there, here):
    """UserError unless the checkpoint's dict `there` has every value of the dict `here`."""
    for name, value in here.items():
        if there.get(name) != value:
            raise UserError(f"{path} was trained with {name} {there.get(name)}, not {value}: use "
                            "the same settings or another folder, or delete that file")


def weights_id(model):
    """A hash of the weights: equal models have equal hashes."""
    digest = hashlib.sha1()
    for p in model.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def learning_rate(cfg, step):
    """Linear warm-up to cfg.lr; with it a cosine down to 0, unless the schedule is constant."""
    rate = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1))
    if cfg.schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / cfg.max_steps)
    return rate


def backward(model, loss_fn, data, cfg, step):
    """Gradients of one step's batch, whose pieces the processes share out; returns its loss."""
    size = cfg.batch_size // cfg.grad_accum
    n_blocks = cfg.seq_len // cfg.block_size
    loss = torch.zeros((), device=cfg.device)
    for piece in range(RANK, cfg.grad_accum, WORLD):
        g = rng(cfg.seed, "batch", step, piece)
        index = torch.randint(data.n_train, (size,), generator=g)
        x0 = data.rows(index).to(cfg.device)                    # (b, T)
        t = stratified_times(torch.rand(size, n_blocks, generator=g)).to(cfg.device)
        g = rng(cfg.seed, "loss", step, piece, device=cfg.device)
        torch.manual_seed(g.initial_seed())                     # for dropout
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            piece_loss = loss_fn(model, x0, t, g, index) / cfg.grad_accum
        piece_loss.backward()
        loss += piece_loss.detach()
    if WORLD > 1:  # each process has the gradient of its own pieces: add them up
        for tensor in [loss] + [p.grad for p in model.parameters()]:
            dist.all_reduce(tensor)
    return loss


def compile_blocks(model):
    """torch.compile each block, but none of a model of transformers."""
    for block in getattr(model.net, "blocks", []):
        block.compile()
    return model


def train(model, loss_fn, data, cfg, names, **settings):
    """Train a Teacher or Student, or go on from its checkpoint, bit for bit on a CPU.
    All draws are keyed by (seed, step, piece). So the step is all there is to save of the random
    state, and N processes take the same steps as one. loss_fn(model, x0, t, generator, index) is
    the loss of the sequences number `index` (b,). A checkpoint is used only if its settings are
    equal: those of cfg with these `names`, and `settings`. Returns the averaged weights, a model.
    """
    settings.update({name: getattr(cfg, name) for name in names}, data=data.fingerprint,
                    tokens=data.tokenizer.fingerprint)
    path = f"{cfg.out_dir}/{model.name}.pt"
    step = 0
    model.to(cfg.device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    if os.path.exists(path):
        saved = load_checkpoint(path)
        check_equal(path, saved["settings"], settings)
        step = saved["step"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
    if cfg.compile:
        compile_blocks(model)
    if cfg.device == "cuda":  # TF32 is precise enough for the logits of a teacher's labels
        torch.set_float32_matmul_precision("high")
    n_params = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{model.name}: {n_params:.2f}M parameters | {cfg.device} | {cfg.dtype} | uniform loss "
          f"{math.log(model.vocab_size):.2f} | from step {step}/{cfg.max_steps}")

    start = time.time()
    first_step = step
    losses = []
    while step < cfg.max_steps:
        try:
            losses.append(backward(model, loss_fn, data, cfg, step))
        except torch.OutOfMemoryError as e:
            raise UserError(f"{model.name}: out of memory; a piece of the batch has "
                            f"{cfg.batch_size // cfg.grad_accum} sequences, --grad-accum "
                            f"{2 * cfg.grad_accum} --out-dir ANOTHER halves it") from e
        grad = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(cfg, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (1 + step) / (10 + step))          # short runs forget the first steps
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 1 - decay)
        step += 1
        if step % cfg.eval_every and step < cfg.max_steps:
            continue

        loss = torch.stack(losses).mean().item()
        losses = []
        if not math.isfinite(loss):
            raise UserError(f"{model.name}: loss {loss} before step {step}; the last checkpoint is "
                            f"kept. Try a lower --lr (now {cfg.lr:g}) or a longer --warmup")
        if RANK > 0:
            continue
        row = dict(model=model.name, step=step, loss=loss, lr=lr, grad=grad.item(),
                   val=validation_loss(ema, loss_fn, data, cfg), seconds=time.time() - start)
        steps_s = (step - first_step) / row["seconds"]
        row["tok_s"] = steps_s * cfg.batch_size * cfg.seq_len
        print("step {step:6d} | loss {loss:.4f} | val {val:.4f} nats/token | lr {lr:.1e} | grad "
              "{grad:.2f} | {tok_s:,.0f} tok/s".format(**row),
              f"| {(cfg.max_steps - step) / steps_s:.0f} s left", flush=True)
        with open(f"{cfg.out_dir}/log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        state = dict(format=FORMAT, name=model.name, step=step, settings=settings, config=vars(cfg),
                     tokenizer=data.tokenizer.state, model=model.state_dict(),
                     ema=ema.state_dict(), optimizer=optimizer.state_dict())
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)     # a write that is cut off leaves the last one whole
    torch.set_float32_matmul_precision("highest")
    return ema


@torch.no_grad()
def validation_loss(model, loss_fn, data, cfg):
    """Mean loss on fixed rows, times, masks and noise: NLL, NELBO or, with noise, no likelihood."""
    size = cfg.batch_size // cfg.grad_accum
    x0 = data.val_rows(8 * cfg.batch_size).to(cfg.device)
    t = stratified_times(torch.full((len(x0), cfg.seq_len // cfg.block_size), 0.5)).to(cfg.device)
    total = 0.0
    for i, (rows, times) in enumerate(zip(x0.split(size), t.split(size))):
        g = rng("validation", i, device=cfg.device)
        total += len(rows) * loss_fn(model, rows, times, g).item()
    return total / len(x0)


def get_teacher(cfg, data):
    """The AR teacher named by --teacher, or that of this run's folder, trained if need be."""
    if cfg.teacher:
        return load_teacher(cfg.teacher, data.tokenizer, cfg)
    torch.manual_seed(cfg.seed)
    return train(Teacher(cfg, data.tokenizer), teacher_loss, data, cfg, TEACHER_SETTINGS)


def load_teacher(path, tokenizer, cfg):
    """The teacher of a checkpoint or from transformers; it must have the tokens and length here."""
    if path.endswith(".pt"):
        teacher, _, saved = load_model(path, cfg.device)
        check_equal(path, dict(saved["settings"], name=saved["name"]),
                    dict(name="teacher", tokens=tokenizer.fingerprint, seq_len=cfg.seq_len))
        return teacher
    teacher = Teacher(cfg, tokenizer, load_pretrained(path, tokenizer, cfg.seq_len))
    return teacher.to(cfg.device).eval().requires_grad_(False)


def teacher_data(teacher, data, cfg):
    """The teacher's own texts as training data: serial extraction, for mdlm sequence-level KD.
    Text i is written from sequence_noise((seed, "labels"), i). So only a seed is kept."""
    n = min(len(data.train) // cfg.seq_len, cfg.max_steps * cfg.batch_size)
    x = generate(teacher, n, cfg.seq_len, (cfg.seed, "labels"), progress="serial extraction")
    tokens = x.cpu().numpy().astype(np.uint16).ravel()
    return Data(tokens, data.val, cfg.seq_len, data.tokenizer, stride=cfg.seq_len)


def get_student(name, cfg, teacher, data):
    """The student of that name, trained or as it stands in this run's folder."""
    labeller = teacher
    if cfg.compile:  # a copy: the sampler's many lengths would each be compiled
        labeller = compile_blocks(copy.deepcopy(teacher))

    def loss_fn(model, x0, t, generator, index=None):
        xi = None
        if cfg.labels == "teacher" and model.noise and index is not None:
            xi, _ = sequence_noise((cfg.seed, "labels"), index, cfg.seq_len, model)
        return student_loss(model, labeller, x0, t, generator, xi, cfg.loss)

    torch.manual_seed(cfg.seed)
    student = Student(cfg, name, teacher.vocab_size)
    if cfg.init_from:  # e.g. BD3-LM from MDLM; what MDLM lacks (noise embedding) stays new
        saved = load_checkpoint(cfg.init_from)
        if saved["name"] not in (name, "mdlm", "bd3lm"):
            raise UserError(f"--init-from {cfg.init_from}: holds no mdlm and no {name}")
        here = {name: getattr(cfg, name) for name in SHAPE}
        check_equal(cfg.init_from, saved["settings"], dict(here, tokens=data.tokenizer.fingerprint))
        student.load_state_dict({**student.state_dict(), **saved["ema"]})
    return train(student, loss_fn, data, cfg, STUDENT_SETTINGS, teacher=weights_id(teacher))


# -----------------------------------------------------------------------------
# 9. Table: quality, spread, and agreement with the teacher for each number of steps
@torch.no_grad()
def compare_with_teacher(x, teacher_text, teacher, seed):
    """How far texts x (N, T) equal the teacher's texts from the same noise (that of `seed`).
    teacher_nll             -log p of x under the teacher, nats per token
    agree_token, agree_seq  share of tokens, of whole texts, equal to teacher_text
    accept                  share of tokens that the teacher, too, would choose after x's own prefix
    """
    equal, accepted, nll = x == teacher_text, [], []
    for index in sampling_batches(len(x), x.size(1), teacher.vocab_size):
        xi, _ = sequence_noise(seed, index, x.size(1), teacher)
        logp = teacher(x[index])                                # (B, T, V)
        accepted.append((logp + xi).argmax(dim=-1) == x[index])
        nll.append(-logp.gather(-1, x[index][..., None]))
    scores = {"teacher_nll": torch.cat(nll), "agree_token": equal, "agree_seq": equal.all(dim=1),
              "accept": torch.cat(accepted)}
    return {name: float(score.double().mean()) for name, score in scores.items()}


def scales(student, cfg, without_noise=(1.0, 0.0)):
    """Pairs (tau, temperature) to write with. A student with noise varies one of the two only."""
    if not student.noise:
        return list(itertools.product([1.0], cfg.temperature or without_noise))
    temperatures = cfg.temperature or [0.0]
    if len(cfg.tau) > 1 and len(temperatures) > 1:
        temperatures = [0.0]
    return list(itertools.product(cfg.tau, temperatures))


def evaluate(teacher, students, data, cfg):
    """The rows of results.json: one dict for each model and setting of the sampler."""
    n = cfg.n_samples
    rows = []
    teacher_text = generate(teacher, n, cfg.seq_len, cfg.seed)

    def add(name, x, **about):
        rows.append({"model": name, **about, **data.judge(x), "entropy": token_entropy(x)})
        rows[-1].update(compare_with_teacher(x, teacher_text, teacher, cfg.seed))

    add("teacher", teacher_text, nfe=cfg.seq_len)
    # two floors of agreement: the teacher's texts for other noise, and one text for all noise
    add("teacher, other noise", teacher_text.roll(1, 0))
    add("best constant text", teacher_text.mode(dim=0).values.repeat(n, 1))
    for student in students:
        for (tau, temperature), nfe in itertools.product(scales(student, cfg), cfg.nfe):
            settings = dict(tau=tau, temperature=temperature, top_p=cfg.top_p, order=cfg.order)
            x = generate(student, n, cfg.seq_len, cfg.seed, nfe=nfe, **settings)
            add(student.name, x, nfe=student.nfe_of_text(nfe), **settings)
    return rows


# -----------------------------------------------------------------------------
# 10. main: data, teacher, students, table
def prepare(cfg):
    """What every training command starts with: checked settings, the folder of the run, data."""
    cfg = resolve(cfg)
    os.makedirs(cfg.out_dir, exist_ok=True)
    if WORLD > 1:
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(days=1))        # tokenising takes long
    if RANK > 0:  # process 0 speaks for all, and writes the token cache for all
        sys.stdout = open(os.devnull, "w")
        dist.barrier()
    data = load_data(cfg)
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    return cfg, data


def finish():
    """Leave the group of processes together. Then end without the interpreter's clean-up, in which
    a thread of gloo that is still alive would abort the process."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def run(cfg):
    """The whole experiment; returns the rows of its table, in process 0."""
    cfg, data = prepare(cfg)
    teacher = get_teacher(cfg, data)
    texts = teacher_data(teacher, data, cfg) if cfg.labels == "teacher" else data
    students = [get_student(name, cfg, teacher, texts) for name in cfg.students]
    if RANK > 0:
        return
    rows = evaluate(teacher, students, data, cfg)
    print_table(rows)
    with open(f"{cfg.out_dir}/results.json", "w") as f:
        json.dump(rows, f, indent=1)
    print("gumbel is the paper's student; gumbel-draft, ours, adds the noise to its own guess. "
          f"All this is in {cfg.out_dir}; see texts with: python sample.py")
    return rows


def main():
    parser = argparse.ArgumentParser(description="Train a teacher and students, and print how well "
                                     "each of them writes. In brackets: the defaults.")
    run(Config(**vars(add_flags(parser).parse_args())))
    finish()


if __name__ == "__main__":
    run_cli(main)
