"""Gumbel Distillation for Parallel Text Generation, small enough to read.

Paper: Zhang, Hu, Liu and Liu, ICLR 2026, arXiv 2603.22216. Official code: hxixixh/gumbel-distill

    python gumbel_distill.py                                           # a maze: minutes on a CPU
    python gumbel_distill.py --dataset text --train-files input.txt    # your own text
    python gumbel_distill.py --dataset lm1b                            # LM1B, on one GPU

A parallel decoder draws many tokens in one step, each on its own, so "San" can meet "Angeles". An
autoregressive (AR) teacher draws its tokens one after the other. Each draw is argmax(logp + xi)
with Gumbel noise xi, so the noise determines the text. Show this noise to the parallel student, and
the student no longer has to learn a joint distribution. It learns a function from noise to text:

    1. mask each token of a text x0 with probability t                     q_sample
    2. one pass of the teacher: logp of all tokens at masked positions     Teacher
    3. draw noise that makes the teacher write x0                          posterior_gumbel
    4. the student sees the unmasked tokens and the noise of the others    Student
    5. cross-entropy with the masked tokens, weighted by 1/t               student_loss
    6. to write a text: fresh noise, a few steps, no teacher               sample

Glossary (B = batch, T = seq_len, V = vocab_size, C = n_embd, M = number of masked tokens)
    x0, xt   (B, T) long   clean and masked token ids; [MASK] is the id mask_id = V
    t        (B, 1)        time in (0, 1]: P(masked) = t, P(kept) = alpha_t = 1 - t
    xi       (B, T, V)     Gumbel noise, or (M, V) where masked; xi[:, i] decides token i
    logp     (..., V)      logits normalised over V, in nats
    nfe                    number of function evaluations: calls of the student, one a step
    tau                    scale of xi in sampling; 1 as in training
"""

import copy
import hashlib
import itertools
import json
import math
import os
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from config import EXAMPLES, RANK, SHAPE, STOP, STUDENT_SETTINGS, STUDENTS, TEACHER_SETTINGS, WORLD
from config import Config, Parser, UserError, add_flags, check_equal, join_group, load_checkpoint
from config import learning_rate, print_table, report, resolve, resume, run_cli, save_checkpoint
from config import side_by_side, weights_id
from data import Data, Tokenizer, load_data, load_pretrained, show_all, token_entropy


# -----------------------------------------------------------------------------
# 1. Transformer: causal for the teacher, bidirectional for the student
class Layer(nn.Module):
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
        q, k = rotate(qkv[:2], rope)
        v = qkv[2]
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
    """Token embedding, layers, final norm, output head. There are V outputs, but V + 1 input rows.
    The last row is [MASK] for a student, BOS for a teacher whose tokenizer has none."""

    def __init__(self, cfg, vocab_size, causal):
        super().__init__()
        self.causal = causal
        self.head_size = cfg.n_embd // cfg.n_head
        self.embed = nn.Embedding(vocab_size + 1, cfg.n_embd)
        self.layers = nn.ModuleList()
        for _ in range(cfg.n_layer):
            self.layers.append(Layer(cfg.n_embd, cfg.n_head, cfg.dropout))
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        self.head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            # As GPT-2. A narrow student needs larger attention weights (0.02 at width 768): with
            # 0.02 its attention stays uniform for long, and MDLM predicts mere frequencies.
            std = 0.02
            if name.endswith("out.weight"):
                std = 0.02 / math.sqrt(2 * cfg.n_layer)
            if name.endswith("qkv.weight") and not causal:
                std = 0.55 / math.sqrt(cfg.n_embd)
            if p.dim() == 2:
                nn.init.normal_(p, std=std)

    def forward(self, x, mask=None, pos=None, cache=None, add_drafts=None):
        """Embeddings x (B, T, C) at positions pos (T,) -> hidden states (B, T, C).
        mask        (T, S) bool, True where a position may look; None: causal or full attention
        cache       KVCache of the tokens before x; a causal net then reads one token at a time
        add_drafts  function of hidden states, called at each quarter of the layers (ours)"""
        T, start = x.size(1), cache.start if cache else 0
        if pos is None:
            pos = torch.arange(start, start + T, device=x.device)
        rope = rotary(pos, self.head_size, x.dtype)
        n_layer = len(self.layers)
        for i, layer in enumerate(self.layers):
            if add_drafts and i in (n_layer // 4, n_layer // 2, n_layer * 3 // 4):
                x = add_drafts(x)
            x = layer(x, rope, mask, self.causal and T > 1, cache)
        return self.norm(x)

    def logits(self, h):
        """Logits (..., V) of hidden states h (..., C), without the columns that `aligned` adds."""
        return F.linear(h, aligned(self.head.weight, 0))[..., :self.head.out_features]

    def nll(self, logits, x0):
        """-log p (M,) of the tokens x0 (M,), in float32 also under autocast. logits (M, V)"""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, x0, reduction="none")


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
        """logp (B, T, V) of every token at each position of x0 (B, T), given the tokens before it.
        With is_masked (B, T) bool: at the masked positions only, row by row, (M, V)."""
        h = self.hidden(x0)                                     # (B, T, C)
        if is_masked is not None:
            h = h[is_masked]                                    # (M, C)
        # Logits rounded to bfloat16 would be too coarse: serial_extraction has them in float32.
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.net.head.weight.dtype)
            return self.net.logits(h).log_softmax(dim=-1)

    def write(self, xi, u=None, xt=None, tau=1.0):
        """The texts (B, T) of serial_extraction, with the noise scaled by tau. u is not read."""
        return serial_extraction(self, tau * xi, xt)


def teacher_loss(teacher, x0, *_):
    """Cross-entropy of x0 (B, T), in nats per token. (train passes more, which is not read.)"""
    logits = teacher.net.logits(teacher.hidden(x0).flatten(0, 1))           # (B T, V)
    return teacher.net.nll(logits, x0.flatten()).mean()


# -----------------------------------------------------------------------------
# 3. Gumbel-Max labelling: token = argmax(logp + xi)                      (Theorem 4.1)
def rng(*key, device="cpu"):
    """A torch.Generator seeded by `key`, which says what it is for, like (seed, "batch", step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def sample_exponential(shape, generator, dtype=torch.float32):
    """E = -log(1 - u) ~ Exp(1), never 0 or infinite, with u = (n + 1/2) / 2^31 from 31 random bits.
    Small E matter: there xi = -log E is large. u is precise near 0, so that xi reaches 22. With
    torch.rand in float32, and with torch's exponential_ on a card, xi ends at 16.6."""
    bits = torch.empty(shape, dtype=torch.int32, device=generator.device)
    bits.random_(generator=generator)
    E = bits.to(dtype)              # in place from here: memory limits the speed of large noise
    E += 0.5
    E *= -(1 - 2**-24) / 2**31      # -u; the factor keeps a u that is rounded up below 1
    E.log1p_()
    return E.neg_()


def sample_gumbel(shape, generator, dtype=torch.float32):
    """iid Gumbel(0,1) noise, xi = -log E. Gumbel-Max: argmax(logp + xi) is then a draw from p."""
    return -sample_exponential(shape, generator, dtype).log()


def posterior_gumbel(logp, x0, generator):
    """Draw noise with which the teacher would have picked x0: parallel extraction (Theorem 4.1).
    With p = exp(logp) and E, E0 ~ Exp(1):   xi[k]  = -log(E[k] + p[k] E0)      for the losers
                                             xi[x0] = -log E0 - log p[x0]       for the winner
    This is the paper's formula with zeta = -log E, in a form that cannot overflow.
    Args:    logp (..., V) float, nats, normalised over V;  x0 (...) long in [0, V)
    Returns: xi (..., V) of logp's dtype; argmax(logp + xi) == x0 (float32 rounding picks another
             token about once in 1e6 positions); xi is iid Gumbel(0,1) when x0 ~ p
    Raises:  ValueError if the shapes disagree
    Official code: utils.py get_posterior_gumbel.   Test: tests/test_gumbel.py"""
    if logp.shape[:-1] != x0.shape:
        raise ValueError(f"logp {tuple(logp.shape)} and x0 {tuple(x0.shape)} disagree")
    E = sample_exponential(logp.shape, generator, logp.dtype)
    E0 = sample_exponential(x0.shape, generator, logp.dtype)[..., None]    # (..., 1)
    E += logp.exp() * E0
    xi = -E.log_()                                              # of the losers
    winner = x0[..., None]                                      # (..., 1)
    xi_winner = -E0.log() - logp.gather(-1, winner)
    return xi.scatter_(-1, winner, xi_winner)


@torch.no_grad()
def serial_extraction(teacher, xi, xt=None):
    """Serial extraction: sample the teacher with recorded noise, x_i = argmax(logp_i + xi_i).
    Fresh xi (B, T, V) gives an exact sample x0 (B, T), tau * xi one at temperature tau. Tokens of
    xt (B, T) that are not V are kept. Takes T cached passes."""
    B, T, V = xi.shape
    net = teacher.net
    cache = KVCache()                                           # section 7: what net has read
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
# 4. Student: a masked diffusion model, with or without the noise
DRAFT_TOKENS = 8                    # a draft mixes the embeddings of that many tokens


class Student(nn.Module):
    """Masked diffusion model (MDLM, Sahoo et al. 2024). Its name says how it reads the noise:
    mdlm          not at all (in blocks its name is bd3lm)
    gumbel        the paper's noise injection: softmax(xi) W replaces the embedding of [MASK]
    gumbel-draft  ours: at each quarter of the layers the student drafts the tokens that Gumbel-Max
                  would draw from its own logits; the layers above see them and make them agree
    As in MDLM (SUBS) [MASK] is never drawn and known tokens stay: only masked positions get logits.
    Official code: models/dit_gumbel.py GumbelDIT.   Test: tests/test_models.py"""

    def __init__(self, cfg, name, vocab_size):
        super().__init__()
        self.name = name
        self.vocab_size = self.mask_id = vocab_size
        self.seq_len = self.block_size = cfg.seq_len
        self.reads_noise = name not in ("mdlm", "bd3lm")
        self.is_draft = name.endswith("-draft")
        self.net = Transformer(cfg, vocab_size, causal=False)
        # Rotary positions are relative: where all is masked, every position looks alike. The
        # official code has the unmasked BOS as an anchor, we have an embedding per position.
        self.embed_pos = nn.Embedding(cfg.seq_len, cfg.n_embd)
        nn.init.normal_(self.embed_pos.weight, std=0.02)
        if self.is_draft:
            self.scale = nn.Parameter(torch.ones(()))           # s
        elif self.reads_noise:
            self.embed_noise = nn.Parameter(torch.empty(vocab_size, cfg.n_embd))    # W
            nn.init.uniform_(self.embed_noise, -vocab_size**-0.5, vocab_size**-0.5)

    def forward(self, xt, xi=None, x0=None):
        """Logits at the masked positions of xt (B, T), row by row: (M, V).
        xi  (M, V) Gumbel noise of these positions, in the same order. None: for mdlm, or if M = 0
        x0  is not read here. In section 7 a block of xt reads the blocks of x0 before it"""
        return self.logits(xt, xi, torch.arange(xt.size(1), device=xt.device))

    def logits(self, xt, xi, pos, mask=None, cache=None):
        is_masked = xt == self.mask_id                          # (B, T), M of them True
        x = self.net.embed(xt)                                  # (B, T, C)
        add_drafts = None
        if self.is_draft and xi is not None:
            add_drafts = partial(self.add_drafts, is_masked=is_masked, xi=xi)
        elif self.reads_noise and xi is not None:
            weight = xi.softmax(dim=-1)                         # (M, V)
            x = put(x, is_masked, aligned(weight, 1) @ aligned(self.embed_noise, 0))
        h = self.net(x + self.embed_pos(pos), mask, pos, cache, add_drafts)
        return self.net.logits(h[is_masked])

    def add_drafts(self, h, is_masked, xi):
        """Hidden states h (B, T, C) plus, where masked, a draft: softmax(s (logits + xi)) of the k
        best tokens times their embeddings, with the student's own logits and the noise xi (M, V).
        It is a soft form of the token argmax(logits + xi). The logits are those of a logit lens:
        the final norm and the output layer read an inner layer."""
        net = self.net
        k = min(DRAFT_TOKENS, self.vocab_size)
        h_masked = net.norm(h[is_masked])                       # (M, C)
        # choose the k best by all logits, without a gradient; compute these k again, with one
        logits = F.linear(h_masked.detach(), aligned(net.head.weight.detach(), 0))
        score = logits[:, :self.vocab_size] + xi                # (M, V)
        best = score.topk(k, dim=-1).indices                    # (M, k)
        logits = torch.einsum("mkc,mc->mk", F.embedding(best, net.head.weight), h_masked)
        score = logits + xi.gather(-1, best)                    # (M, k)
        weight = (self.scale * score).softmax(dim=-1)
        draft = torch.einsum("mk,mkc->mc", weight, F.embedding(best, net.embed.weight))
        return h + put(torch.zeros_like(h), is_masked, draft)

    def needs_teacher(self, cfg):
        return self.reads_noise or "teacher" in (cfg.init_from, cfg.labels)

    def possible_nfe(self, nfe):
        """nfe, but at most one function evaluation a token."""
        return min(nfe, self.seq_len)


def aligned(x, dim):
    """On a card: x (., .) with zeros up to a multiple of 64 in dimension dim. With V = 50,257 rows
    that are not aligned make a product take three to five times as long."""
    n = -x.size(dim) % 64 if x.is_cuda else 0
    return F.pad(x, (0, n) if dim == 1 else (0, 0, 0, n))


def put(x, is_masked, embeddings):
    """x (B, T, C) with embeddings (M, C) at its masked positions."""
    return x.masked_scatter(is_masked[..., None], embeddings.to(x.dtype))


# -----------------------------------------------------------------------------
# 5. Loss: masked diffusion with alpha_t = 1 - t, weight 1/t
T_MIN = 1e-3                        # smallest time, unless --t-min says another: 1/t stays bounded


def stratified_times(u, t_min=T_MIN):
    """Times (B, n): a column has one time in each of B equal parts of [t_min, 1], and u (B, n) in
    [0, 1) says where in it. A text's n blocks have times that are about B / n parts apart."""
    B, n = u.shape
    row, column = torch.arange(B, device=u.device), torch.arange(n, device=u.device)
    part = (row[:, None] + column * B // n) % B                 # (B, n)
    return t_min + (1 - t_min) * (part + u) / B


def q_sample(x0, t, mask_id, generator):
    """Forward process: each token of x0 (B, T) becomes mask_id with probability t (B, T)."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    return torch.where(u < t, mask_id, x0)


def student_loss(student, teacher, x0, t, generator, xi=None):
    """- E [ 1/t sum over masked i of log p_theta(x0_i | xt, xi) ] / T, in nats per token.
    Without noise it is the MDLM objective or, in blocks, the BD3-LM objective: a bound on the
    negative log-likelihood (NELBO). With posterior noise it is no likelihood: the noise knows x0.
    Args: teacher: for a student that reads posterior noise, drawn here; else None
          x0 (B, T) long;  t (B, 1) in (0, 1], one time a text (one a block in section 7)
          generator of the mask and of the noise
          xi (B, T, V): recorded noise of x0 (serial extraction), in place of posterior noise
    Official code: diffusion.py.   Test: tests/test_models.py"""
    # 1. mask each token of x0 with probability t. Logits and noise are computed for these only
    t = t.repeat_interleave(x0.size(1) // t.size(1), dim=1)     # (B, T)
    xt = q_sample(x0, t, student.mask_id, generator)
    is_masked = xt == student.mask_id                           # M of them True
    target = x0[is_masked]                                      # (M,)
    with torch.no_grad():
        if xi is not None:
            xi = xi[is_masked]                                  # (M, V)
        elif teacher is not None:
            # 2. one pass of the teacher: log-probabilities of all tokens at masked positions
            logp = teacher(x0, is_masked)                       # (M, V)
            # 3. noise that makes the teacher write x0
            xi = posterior_gumbel(logp, target, generator)      # (M, V)
    # 4. the student sees the unmasked tokens, and the noise of the masked ones
    logits = student(xt, xi, x0)                                # (M, V); x0 is for section 7 only
    # 5. cross-entropy with the masked tokens, weighted by 1/t
    nll = student.net.nll(logits, target)                       # (M,)
    return (nll / t[is_masked]).sum() / x0.numel()


# -----------------------------------------------------------------------------
# 6. Sampling: the noise is drawn once and kept over all steps
def sequence_noise(seed, index, seq_len, model):
    """All draws of the texts number `index` (n,), whatever the batch. xi (n, T, V) is the noise.
    u (n, 2, T) in [0, 1) says when a token is filled, and which one is drawn."""
    like = next(model.parameters())
    xi, u = [], []
    for i in index.tolist():
        g = rng(seed, "sequence", i, device=like.device)
        u.append(torch.rand(2, seq_len, generator=g, dtype=torch.float64, device=like.device))
        xi.append(sample_gumbel((seq_len, model.vocab_size), g, like.dtype))
    return torch.stack(xi), torch.stack(u)


def fill_steps(is_masked, u, steps):
    """The step k = 1..steps that fills each masked token (B, T): the first with 1 - k / steps <= u,
    where u is in [0, 1). So a step from time t to s fills a masked token with probability
    (t - s) / t, as MDLM's ancestral sampler does. Elsewhere 0."""
    return is_masked * (steps * (1 - u)).ceil()


def draw_tokens(logits, u, temperature, top_p):
    """Tokens (M,) from logits (M, V), at temperature 0 by argmax, else by inverse CDF at u (M,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:  # nucleus: the likeliest tokens, up to and with the one that passes top_p
        likeliest, token = p.sort(dim=-1, descending=True)
        total_before = likeliest.cumsum(dim=-1) - likeliest
        likeliest = likeliest.masked_fill(total_before > top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, token, likeliest)
    cdf = p.cumsum(dim=-1)
    point = u[:, None] * cdf[:, -1:]                            # (M, 1)
    return (cdf <= point).sum(dim=-1)                           # so many tokens lie below it


def denoise(predict, xt, xi, u, steps, tau=1.0, temperature=0.0, top_p=1.0, on_step=None):
    """Fill the masked tokens of xt (B, T), in place, in `steps` steps from time 1 to time 0.
    predict: the student, a function of xt and of the noise (M, V) of its masked tokens
    tau scales the noise xi (B, T, V).  on_step(text): called after a step.  See also draw_tokens"""
    mask_id = xi.size(-1)
    fill_step = fill_steps(xt == mask_id, u[:, 0], steps)       # (B, T)
    for k in range(1, steps + 1):                               # time falls to 1 - k / steps
        is_filled = fill_step == k
        if not is_filled.any():
            continue
        is_masked = xt == mask_id
        logits = predict(xt, tau * xi[is_masked])               # (M, V)
        tokens = draw_tokens(logits, u[:, 1][is_masked], temperature, top_p)    # (M,)
        drawn = xt.masked_scatter(is_masked, tokens)
        xt[is_filled] = drawn[is_filled]
        if on_step:
            on_step(xt.clone())


@torch.no_grad()
def sample(student, xi, u, nfe, xt=None, **settings):
    """Write texts (B, T) in at most nfe calls of the student, from sequence_noise's draws.
    Known tokens of xt (B, T) are kept; xt is mask_id elsewhere. settings: those of denoise.
    Official code: diffusion.py _ddpm_caching_sampler_w_gumbel (tau .85, temperature 1, top_p .9)"""
    text = open_text(xi, xt)
    denoise(student, text, xi, u, nfe, **settings)
    return text


Student.write = sample              # as Teacher.write: all models write by a method of this name


def open_text(xi, xt):
    """A copy of xt (B, T) or, where xt is None, texts of [MASK] alone; xi (B, T, V)."""
    if xt is not None:
        return xt.clone()
    B, T, V = xi.shape
    return torch.full((B, T), V, device=xi.device)


def sampling_batches(n, seq_len, vocab_size, batch_size=1000):
    """Numbers 0..n-1 of texts, in batches of one text or of at most 256 MiB of noise (B, T, V)."""
    limit = max(1, 2**26 // (seq_len * vocab_size))
    return torch.arange(n).split(min(batch_size, limit))


@torch.no_grad()
def generate(model, n, seq_len, seed=0, known=None, batch_size=1000, progress=None, **settings):
    """n texts (n, T) of a Student (settings as in `sample`) or of a Teacher (tau only).
    Text i depends on seed and i, not on n. All keep the tokens of `known` (T,), V elsewhere."""
    texts = []
    batches = sampling_batches(n, seq_len, model.vocab_size, batch_size)
    for index in tqdm(batches, desc=progress, disable=None if progress else True):
        xi, u = sequence_noise(seed, index, seq_len, model)
        xt = None if known is None else known.expand(len(index), seq_len)
        texts.append(model.write(xi, u, xt=xt, **settings))
    return torch.cat(texts)


# -----------------------------------------------------------------------------
# 7. Blocks: BD3-LM (Arriola et al. 2025). A first reader can go on to section 8
class KVCache:
    """Keys and values of each Layer. The first `start` tokens are final; the caller raises `start`.
    What lies beyond is overwritten by the next call."""

    def __init__(self):
        self.start, self.kv = 0, {}

    def extend(self, layer, k, v):
        """Keys and values (2, B, nh, start + T, hs): those of the final tokens and of T others."""
        kv = torch.stack([k, v])                                # (2, B, nh, T, hs)
        if self.start > 0:
            final = self.kv[layer][:, :, :, :self.start]
            kv = torch.cat([final, kv], dim=3)
        self.kv[layer] = kv
        return kv


class BlockStudent(Student):
    """Autoregressive over blocks of block_size = L' tokens, masked diffusion in each. Without noise
    its name is bd3lm; with one block, L' = T, it is MDLM.   Test: tests/test_blocks.py"""

    def __init__(self, cfg, name, vocab_size):
        super().__init__(cfg, name, vocab_size)
        self.block_size = cfg.block_size

    def forward(self, xt, xi=None, x0=None, cache=None):
        """Logits (M, V) as Student.forward. A block sees itself and the clean blocks before it:
        in training those of x0 (B, T), in sampling those in the cache, where xt is one block."""
        T = xt.size(1)
        start = cache.start if cache else 0
        pos = torch.arange(start, start + T, device=xt.device)
        if x0 is None:
            return self.logits(xt, xi, pos, cache=cache)
        mask = block_mask(T, self.block_size, xt.device)
        both = torch.cat([xt, x0], dim=1)                       # (B, 2T), no [MASK] in x0
        return self.logits(both, xi, pos.repeat(2), mask)

    def possible_nfe(self, nfe):
        """nfe, rounded so that all blocks have equal steps, each from 1 to block_size."""
        n_blocks = self.seq_len // self.block_size
        steps = min(max(1, nfe // n_blocks), self.block_size)
        return steps * n_blocks

    @torch.no_grad()
    def write(self, xi, u, xt=None, *, nfe, on_step=None, **settings):
        """As sample, block after block, each in an equal share of nfe, at least one step."""
        T, L = self.seq_len, self.block_size
        text = open_text(xi, xt)
        on_block_step = on_step and (lambda _: on_step(text.clone()))      # sees the whole text
        cache = KVCache()
        predict = partial(self, cache=cache)
        steps = max(1, nfe * L // T)
        for start in range(0, T, L):
            block = slice(start, start + L)
            denoise(predict, text[:, block], xi[:, block], u[:, :, block], steps,
                    on_step=on_block_step, **settings)          # fills this view of text
            if start + L < T:  # the block is final: read it once more, into the cache (not in nfe)
                predict(text[:, block])
                cache.start += L
        return text


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


def new_student(cfg, name, vocab_size):
    """A Student, or a BlockStudent where blocks are shorter than a text."""
    kind = BlockStudent if cfg.block_size < cfg.seq_len else Student
    return kind(cfg, name, vocab_size)


# -----------------------------------------------------------------------------
# 8. Training: one loop for teacher and student
def load_model(path, device):
    """The Teacher or Student of a checkpoint, its Tokenizer, and what else the checkpoint holds."""
    saved = load_checkpoint(path)
    tokenizer = Tokenizer(**saved["tokenizer"])
    if saved["name"] not in ["teacher", *STUDENTS]:
        raise UserError(f"{path}: {saved['name']} is none of {STUDENTS}; only ablation.py reads it")
    if saved["name"] == "teacher":
        model = Teacher(saved["config"], tokenizer)
    else:
        model = new_student(saved["config"], saved["name"], tokenizer.vocab_size)
    model.load_state_dict(saved["ema"])
    return model.to(device).eval().requires_grad_(False), tokenizer, saved


def backward(model, loss_fn, data, cfg, step):
    """Gradients of one step's batch, whose pieces the processes share out; returns its loss."""
    loss = torch.zeros((), device=cfg.device)
    for piece in range(RANK, cfg.grad_accum, WORLD):
        # texts and times are drawn on the CPU, the large masks and noise where they are used
        g = rng(cfg.seed, "batch", step, piece)
        index = torch.randint(data.n_train, (cfg.piece_size,), generator=g)
        x0 = data.rows(index).to(cfg.device, non_blocking=True)            # (b, T)
        t = stratified_times(torch.rand(cfg.piece_size, cfg.n_blocks, generator=g), cfg.t_min)
        t = t.to(cfg.device, non_blocking=True)
        g = rng(cfg.seed, "loss", step, piece, device=cfg.device)
        if cfg.dropout > 0:  # its numbers come from the generator of the process
            torch.manual_seed(g.initial_seed())
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            piece_loss = loss_fn(model, x0, t, g, index) / cfg.grad_accum
        piece_loss.backward()                                   # adds to the gradients
        loss += piece_loss.detach()                             # no .item(): a card need not wait
    if WORLD > 1:  # each process has the gradient of its own pieces: add them up
        for tensor in [loss] + [p.grad for p in model.parameters()]:
            dist.all_reduce(tensor)
    return loss


def compile_layers(model):
    """torch.compile each layer, and the loss for any M. A Hugging Face model stays as it is."""
    if isinstance(model.net, Transformer):
        for layer in model.net.layers:
            layer.compile()
        model.net.nll = torch.compile(model.net.nll, dynamic=True)
    return model


def train(model, loss_fn, data, cfg, names, **settings):
    """Train a Teacher or Student, or go on from its checkpoint: bit for bit on a CPU with as many
    threads. All draws are keyed by (seed, step, piece). So the step is all there is to save of the
    random state, and N processes take the steps of one, up to rounding. loss_fn(model, x0, t,
    generator, index) is the loss of sequences number `index` (b,). A checkpoint must have the same
    `settings`, and the same fields `names` of cfg. Returns the averaged weights, a model."""
    settings.update({name: getattr(cfg, name) for name in names}, data=data.fingerprint,
                    tokens=data.tokenizer.fingerprint)
    path = f"{cfg.out_dir}/{model.name}.pt"
    model.to(cfg.device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)     # averaged weights write better
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    step = resume(path, settings, parts)
    if cfg.compile:
        compile_layers(model)
    if cfg.device == "cuda":  # TF32 is precise enough for the logits of a teacher's labels
        torch.set_float32_matmul_precision("high")
    n_params = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{model.name}: {n_params:.2f}M parameters | {cfg.device} | {cfg.dtype} | uniform loss "
          f"{math.log(model.vocab_size):.2f} | from step {step}/{cfg.max_steps}", flush=True)

    start, first_step, losses = time.time(), step, []
    silent = True if RANK > 0 else None                         # None: where there is no terminal
    bar = tqdm(total=cfg.max_steps, initial=step, desc=model.name, disable=silent)
    while step < cfg.max_steps and not STOP.is_set():
        losses.append(backward(model, loss_fn, data, cfg, step))
        # a rare batch with a huge gradient must not undo what was learned
        grad = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(cfg, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (1 + step) / (10 + step))          # short runs forget the first steps
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 1 - decay)
        step += 1
        bar.update()
        if step % cfg.eval_every and step < cfg.max_steps:
            continue
        loss, losses = torch.stack(losses).mean().item(), []
        if RANK > 0:  # process 0 validates, logs and saves for all
            continue
        seconds = time.time() - start
        row = dict(model=model.name, step=step, seconds=seconds, lr=lr, grad=grad.item(), loss=loss)
        row["val"] = validation_loss(ema, loss_fn, data, cfg)
        row["tok_s"] = (step - first_step) * cfg.batch_size * cfg.seq_len / seconds
        row["left"] = (cfg.max_steps - step) * seconds / (step - first_step)
        with bar.external_write_mode():                         # the bar makes room for the line
            report(row, cfg.out_dir)
        if not math.isfinite(row["loss"] + row["val"]):
            raise UserError(f"{model.name}: no finite loss at step {step}; the last checkpoint, if "
                            f"any, stands. Try a lower --lr (now {cfg.lr:g}) or a longer --warmup")
        save_checkpoint(path, parts, name=model.name, step=step, settings=settings,
                        config=vars(cfg), tokenizer=data.tokenizer.state)
    bar.close()
    if WORLD > 1:  # the others wait for the checkpoint
        dist.barrier()
    torch.set_float32_matmul_precision("highest")
    return ema


@torch.no_grad()
def validation_loss(model, loss_fn, data, cfg):
    """Mean loss on fixed rows, masks, noise, times in [T_MIN, 1]: a teacher's NLL, MDLM's NELBO."""
    x0 = data.val_rows(8 * cfg.batch_size).to(cfg.device)
    t = stratified_times(torch.full((len(x0), cfg.n_blocks), 0.5, device=cfg.device))
    total = 0.0
    for i, (rows, times) in enumerate(zip(x0.split(cfg.piece_size), t.split(cfg.piece_size))):
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
                    dict(name="teacher", tokens=tokenizer.fingerprint, seq_len=cfg.seq_len),
                    "name a teacher of this text and length")
        return teacher
    teacher = Teacher(cfg, tokenizer, load_pretrained(path, tokenizer, cfg.seq_len))
    return teacher.to(cfg.device).eval().requires_grad_(False)


def teacher_data(teacher, data, cfg):
    """The teacher's own texts as data, by serial extraction; for mdlm it is sequence-level KD."""
    n = min(len(data.train) // cfg.seq_len, cfg.max_steps * cfg.batch_size)
    x = generate(teacher, n, cfg.seq_len, (cfg.seed, "labels"), progress="serial extraction")
    tokens = x.cpu().numpy().astype("uint16").ravel()
    return Data(tokens, data.val, cfg.seq_len, data.tokenizer, stride=cfg.seq_len)


def start_weights(student, cfg, data):
    """First weights: those of the start that --init-from names; what it lacks stays new."""
    own = student.state_dict()
    if cfg.init_from == "scratch":
        return own
    path = cfg.init_from
    if path == "teacher":
        path = cfg.teacher or f"{cfg.out_dir}/teacher.pt"
    saved = load_checkpoint(path)
    here = {name: getattr(cfg, name) for name in SHAPE}
    check_equal(path, saved["settings"], dict(here, tokens=data.tokenizer.fingerprint),
                "use models and text of one kind, or --init-from scratch")
    shared = {name: weight for name, weight in saved["ema"].items() if name in own}
    if saved["name"] == "teacher":  # its last row is BOS or, where BOS has a row of its own, unused
        shared["net.embed.weight"][-1] = own["net.embed.weight"][-1]
    return {**own, **shared}


def train_student(student, cfg, teacher, data, loss=student_loss):
    """Train a Student. teacher: None where it needs none;  loss: a function as student_loss"""
    labeller = teacher
    if cfg.compile and student.reads_noise:  # a copy: the sampler's cache has many lengths
        labeller = compile_layers(copy.deepcopy(teacher))

    def loss_fn(model, x0, t, generator, index=None):
        is_recorded = cfg.labels == "teacher" and index is not None     # validation: real text
        if is_recorded and model.reads_noise:
            xi, _ = sequence_noise((cfg.seed, "labels"), index, cfg.seq_len, model)
            return loss(model, None, x0, t, generator, xi)
        return loss(model, labeller if model.reads_noise else None, x0, t, generator)

    student.load_state_dict(start_weights(student, cfg, data))
    teacher_id = weights_id(teacher) if student.needs_teacher(cfg) else None
    return train(student, loss_fn, data, cfg, STUDENT_SETTINGS, teacher=teacher_id)


# -----------------------------------------------------------------------------
# 9. Table: quality, spread, and agreement with the teacher for each number of steps
@torch.no_grad()
def compare_with_teacher(x, teacher_text, teacher):
    """teacher_nll: -log p of texts x (N, T) under the teacher, nats per token;  agree_token and
    agree_seq: share of tokens and of whole texts equal to teacher_text, from the same noise."""
    nll = 0.0
    for index in sampling_batches(len(x), x.size(1), teacher.vocab_size):
        rows = x[index]                                         # (B, T)
        nll -= teacher(rows).gather(-1, rows[..., None]).double().sum().item()
    equal = (x == teacher_text).double()
    return {"teacher_nll": nll / x.numel(), "agree_token": equal.mean().item(),
            "agree_seq": equal.prod(dim=1).mean().item()}


def sampler_settings(student, cfg):
    """Keyword arguments of write: all combinations of possible nfe, tau (of noise), temperature."""
    nfes = dict.fromkeys(student.possible_nfe(nfe) for nfe in cfg.nfe)
    taus = cfg.tau if student.reads_noise else [1.0]
    for tau, temperature, nfe in itertools.product(taus, cfg.temperature, nfes):
        yield dict(nfe=nfe, tau=tau, temperature=temperature, top_p=cfg.top_p)


def evaluate(teacher, students, data, cfg):
    """The rows of results.json: one dict for each model and setting of the sampler."""
    teacher_text = generate(teacher, cfg.n_samples, cfg.seq_len, cfg.seed)

    def judged(name, x, **about):
        return {"model": name, **about, **data.judge(x), "entropy": token_entropy(x),
                **compare_with_teacher(x, teacher_text, teacher)}

    def written(student, settings):
        x = generate(student, cfg.n_samples, cfg.seq_len, cfg.seed, **settings)
        return judged(student.name, x, **settings)

    rows = [judged("teacher", teacher_text, nfe=cfg.seq_len),
            judged("teacher, other noise", teacher_text.roll(1, 0))]       # agreement by chance
    jobs = [partial(written, student, settings) for student in students
            for settings in sampler_settings(student, cfg)]
    return rows + side_by_side(jobs, cfg)


# -----------------------------------------------------------------------------
# 10. main: data, teacher, students, table
def prepare(cfg):
    """What every training command starts with: checked settings, the folder of the run, data."""
    cfg = resolve(cfg)
    join_group(cfg)
    os.makedirs(cfg.out_dir, exist_ok=True)
    if RANK > 0:  # process 0 writes the token cache for all
        dist.barrier()
    data = load_data(cfg)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    return cfg, data


def train_all(cfg, data):
    """The teacher, and the students in turn; those that need no teacher do not wait for it."""
    early, late = [], []
    for name in cfg.students:
        torch.manual_seed(cfg.seed)
        student = new_student(cfg, name, data.tokenizer.vocab_size)
        (late if student.needs_teacher(cfg) else early).append(student)
    jobs = [partial(train_student, student, cfg, None, data) for student in early]
    teacher, *early = side_by_side([partial(get_teacher, cfg, data), *jobs], cfg)
    texts = teacher_data(teacher, data, cfg) if cfg.labels == "teacher" else data
    jobs = [partial(train_student, student, cfg, teacher, texts) for student in late]
    students = early + side_by_side(jobs, cfg)
    return teacher, sorted(students, key=lambda student: cfg.students.index(student.name))


def run(cfg):
    """The whole experiment; returns the rows of its table, in process 0."""
    cfg, data = prepare(cfg)
    teacher, students = train_all(cfg, data)
    if RANK > 0:
        return
    rows = evaluate(teacher, students, data, cfg)
    print_table(rows)
    with open(f"{cfg.out_dir}/results.json", "w") as f:
        json.dump(rows, f, indent=1)
    for student in students:
        how = dict(nfe=student.possible_nfe(3), temperature=float(not student.reads_noise))
        x = generate(student, 3, cfg.seq_len, cfg.seed, **how)
        shown = show_all(x, cfg.dataset, data.tokenizer)
        print(f"\n{student.name} writes, in {how['nfe']} steps:\n{shown}")
    print(f"\nAll this is in {cfg.out_dir}; see more texts with: python sample.py")
    return rows


def main():
    parser = Parser(description="Train a teacher and students, and print how well each of them "
                    "writes. In brackets: the defaults.", epilog=EXAMPLES)
    run(Config(**vars(add_flags(parser).parse_args())))


if __name__ == "__main__":
    run_cli(main)
