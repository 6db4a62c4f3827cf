"""Gumbel Distillation for Parallel Text Generation, in one file.
Paper: Zhang, Hu, Liu and Liu, ICLR 2026, arXiv 2603.22216. Official code: hxixixh/gumbel-distill

    python gumbel_distill.py                                           # a maze, on a CPU
    python gumbel_distill.py --dataset text --train-files input.txt    # your text; takes data.py
    python gumbel_distill.py --dataset lm1b                            # LM1B, on one GPU

A parallel decoder draws many tokens in one step, each on its own, so "San" can meet "Angeles". An
autoregressive (AR) teacher draws token after token, each as argmax(logp + xi) with Gumbel noise xi,
so the noise determines the text. A parallel student that sees this noise need not learn a joint
distribution. It learns a function from noise to text:

    1. mask each token of a text x0 with probability t                     q_sample
    2. one pass of the teacher: logp of all tokens at masked positions     Teacher
    3. draw noise that makes the teacher write x0                          posterior_gumbel
    4. the student sees the unmasked tokens and the noise of the others    GumbelStudent
    5. cross-entropy with the masked tokens, weighted by 1/t               Student.loss
    6. to write a text: fresh noise, a few steps, no teacher               denoise

Glossary (B = batch, T = seq_len, V = vocab_size, C = n_embd, M = number of masked tokens)
    x0, xt   (B, T) long   clean and masked token ids; [MASK] is the id mask_id = V
    t        (B, 1)        time in (0, 1]: P(masked) = t, P(kept) = alpha_t = 1 - t
    xi       (B, T, V)     Gumbel noise, or (M, V) where masked; xi[:, i] decides token i
    logp     (..., V)      logits normalised over V, in nats
    u        (B, 2, T)     uniform numbers: when a token is filled, and which one is drawn
    nfe                    number of function evaluations: calls of the student, one a step
"""

import argparse
import copy
import dataclasses
import hashlib
import math
import os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm


# --- 1. Transformer: causal for the teacher, bidirectional for the student ------------------------
class Layer(nn.Module):
    """Attention and MLP. The MLP has ReLU^2 (So et al. 2021) where the official code has GELU."""
    def __init__(self, cfg, causal):
        super().__init__()
        C = cfg.n_embd
        self.causal, self.n_head, self.dropout = causal, cfg.n_head, cfg.dropout
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)
        nn.init.zeros_(self.attn_out.weight)                    # a layer begins as the identity
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x, pos, attend):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x))                           # (B, T, 3 C)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)                        # (3, B, nh, T, hs)
        q, k = rotate(qkv[:2], pos)
        if attend is None:
            y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=self.causal)
        else:
            y = attend(self, q, k, qkv[2])                      # (B, nh, T, hs)
        y = self.attn_out(y.transpose(1, 2).reshape(B, T, C))
        x = x + F.dropout(y, self.dropout, self.training)
        y = F.relu(self.mlp_in(self.norm2(x)))                  # (B, T, 4 C)
        y = self.mlp_out(y.square())
        return x + F.dropout(y, self.dropout, self.training)


def rotate(x, pos):
    """Rotary position embedding: turn pairs of x (..., T, hs) by angles that grow with pos (T,)."""
    freq = 10000.0 ** (-torch.arange(0, x.size(-1), 2, device=x.device) / x.size(-1))
    angle = pos[:, None] * freq                                 # (T, hs / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class Transformer(nn.Module):
    """Token embedding, layers, final norm, output head. There are V outputs, but V + 1 input rows.
    The last row is [MASK] for a student, BOS for a teacher whose tokenizer has none."""
    def __init__(self, cfg, vocab_size, causal):
        super().__init__()
        self.embed = nn.Embedding(vocab_size + 1, cfg.n_embd)
        self.layers = nn.ModuleList(Layer(cfg, causal) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        self.head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x, pos=None, attend=None):
        """Embeddings x (B, T, C) -> hidden states (B, T, C). pos (T,): their positions, by default
        0 to T - 1.  attend(layer, q, k, v): another way to attend, like a KVCache."""
        pos = torch.arange(x.size(1), device=x.device) if pos is None else pos
        for layer in self.layers:
            x = layer(x, pos, attend)
        return self.norm(x)

    def nll(self, logits, x0):
        """-log p (M,) of tokens x0 (M,) by logits (M, V), in float32 also under autocast."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, x0, reduction="none")


# --- 2. Teacher: an AR language model -------------------------------------------------------------
class Teacher(nn.Module):
    """p(x0) = prod_i p(x0[i] | BOS, x0[:i]). The teacher itself puts BOS in front."""
    reads_noise = False

    def __init__(self, cfg, vocab_size, bos_id, net=None):
        super().__init__()
        self.vocab_size, self.bos_id = vocab_size, bos_id
        self.net = net or Transformer(cfg, vocab_size, causal=True)

    def hidden(self, x0):
        """Hidden states (B, T, C): state i has read BOS and the tokens of x0 (B, T) before i."""
        bos = torch.full_like(x0[:, :1], self.bos_id)
        x = torch.cat([bos, x0[:, :-1]], dim=1)
        return self.net(self.net.embed(x))

    def logp(self, h):
        """log p (..., V) of every token, of hidden states h (..., C). bfloat16 is too coarse."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.net.head.weight.dtype)
            return self.net.head(h).log_softmax(dim=-1)

    def loss(self, x0, *_):
        """Cross-entropy of x0 (B, T), nats per token. It reads none of a student's arguments."""
        logits = self.net.head(self.hidden(x0).flatten(0, 1))   # (B T, V)
        return self.net.nll(logits, x0.flatten()).mean()


# --- 3. Gumbel-Max labelling: token = argmax(logp + xi) (Theorem 4.1) -----------------------------
def rng(*key, device="cpu"):
    """A torch.Generator seeded by `key`, which says what it is for, like (seed, "batch", step)."""
    key = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def sample_exponential(shape, generator, dtype=torch.float32):
    """E = -log(1 - u) ~ Exp(1), never 0 or infinite; u = (n + 1/2) / 2^31 has 31 random bits. Small
    E matter: they make xi = -log E large. Here xi reaches 22, with torch.rand in float32 16.6."""
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
    This is the paper's formula with zeta = -log E; it cannot overflow. logp and xi are (..., V), x0
    is (...). argmax(logp + xi) == x0, up to rounding; xi is iid Gumbel(0,1) when x0 ~ p.
    Official code: utils.py get_posterior_gumbel.   Test: tests/test_gumbel.py"""
    E = sample_exponential(logp.shape, generator, logp.dtype)
    E0 = sample_exponential(x0.shape, generator, logp.dtype)[..., None]    # (..., 1)
    E += logp.exp() * E0
    xi = -E.log_()                                              # of the losers
    winner = x0[..., None]
    xi_winner = -E0.log() - logp.gather(-1, winner)
    return xi.scatter_(-1, winner, xi_winner)


class KVCache(dict):
    """Keys and values of tokens that were read, by Layer. As `attend` it shows them to new ones."""
    def __call__(self, layer, q, k, v):
        kv = torch.stack([k, v])                                # (2, B, nh, T, hs)
        if layer in self:
            kv = torch.cat([self[layer], kv], dim=3)
        self[layer] = kv
        return F.scaled_dot_product_attention(q, kv[0], kv[1])


@torch.no_grad()
def serial_extraction(teacher, xt, xi, *_):
    """Serial extraction: the teacher fills the places where xt (B, T) is V, one after the other, by
    argmax(logp_i + xi_i). With fresh xi (B, T, V) the texts are exact samples. Takes T passes."""
    net, cache = teacher.net, KVCache()
    token = torch.full_like(xt[:, 0], teacher.bos_id)           # (B,)
    texts = []
    for i in range(xt.size(1)):
        pos = torch.tensor([i], device=xt.device)
        h = net(net.embed(token[:, None]), pos, cache)          # (B, 1, C)
        logp = teacher.logp(h[:, 0])                            # (B, V)
        best = (logp + xi[:, i]).argmax(dim=-1)
        token = torch.where(xt[:, i] == xi.size(-1), best, xt[:, i])
        texts.append(token)
    return torch.stack(texts, dim=1)


# --- 4. Student: masked diffusion with alpha_t = 1 - t, without and with the noise ----------------
def stratified_times(u, t_min=1e-3):
    """Times t (B, 1), one in each of B equal parts of [t_min, 1]; u (B, 1) in [0, 1) says where."""
    return t_min + (1 - t_min) * (torch.arange(len(u), device=u.device)[:, None] + u) / len(u)


def q_sample(x0, t, mask_id, generator):
    """Forward process: each token of x0 (B, T) becomes mask_id with probability t (B, T)."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    return torch.where(u < t, mask_id, x0)


class Student(nn.Module):
    """Masked diffusion language model (MDLM, Sahoo et al. 2024). It reads no noise.
    As in MDLM (SUBS) [MASK] is never drawn and known tokens stay: only masked positions get logits.
    Official code: models/dit_gumbel.py GumbelDIT, diffusion.py.   Test: tests/test_models.py"""
    reads_noise = False
    label = staticmethod(posterior_gumbel)                      # finds the noise of a text

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__()
        self.vocab_size = self.mask_id = vocab_size
        self.net = net or Transformer(cfg, vocab_size, causal=False)
        # rotary positions are relative: where all is masked, every position would look alike
        self.embed_pos = nn.Embedding(cfg.seq_len, cfg.n_embd)
        nn.init.normal_(self.embed_pos.weight, std=0.02)

    def embed(self, xt, xi):
        """What the first layer reads (B, T, C). A subclass adds the noise xi (M, V) here."""
        return self.net.embed(xt)

    def forward(self, xt, xi=None):
        """Logits (M, V) at the masked positions of xt (B, T), row by row; xi (M, V) likewise."""
        x = self.embed(xt, xi) + self.embed_pos.weight          # (B, T, C)
        return self.net.head(self.net(x)[xt == self.mask_id])

    def loss(self, x0, t, generator, teacher):
        """- E [ 1/t sum over masked i of log p_theta(x0_i | xt, xi) ] / T, in nats per token.
        Without noise it is MDLM's bound on the negative log-likelihood (NELBO). With posterior
        noise it is no likelihood: the noise knows x0. The generator draws mask and noise."""
        # 1. mask each token of x0 with probability t. Logits and noise are computed for these only
        t = t.expand_as(x0)                                     # (B, T)
        xt = q_sample(x0, t, self.mask_id, generator)
        is_masked = xt == self.mask_id                          # M of them True
        target = x0[is_masked]                                  # (M,)
        xi = None
        if self.reads_noise:
            with torch.no_grad():
                # 2. one pass of the teacher: log-probabilities of all tokens at masked positions
                logp = teacher.logp(teacher.hidden(x0)[is_masked])         # (M, V)
                # 3. noise that makes the teacher write x0
                xi = self.label(logp, target, generator)        # (M, V)
        # 4. the student sees the unmasked tokens, and the noise of the masked ones
        logits = self(xt, xi)                                   # (M, V)
        # 5. cross-entropy with the masked tokens, weighted by 1/t
        return (self.net.nll(logits, target) / t[is_masked]).sum() / x0.numel()

    def draw(self, logits, u):
        """Tokens (M,) ~ softmax(logits), by inverse CDF at u (M,)."""
        cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)    # (M, V)
        point = u[:, None] * cdf[:, -1:]                        # (M, 1)
        return (cdf <= point).sum(dim=-1)                       # so many tokens lie below it


class GumbelStudent(Student):
    """The paper's noise injection: softmax(xi) W replaces the embedding of [MASK]."""
    reads_noise = True

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net)
        self.embed_noise = nn.Linear(vocab_size, cfg.n_embd, bias=False)       # W

    def read(self, xi):
        """The noise xi (M, V) as embeddings (M, C)."""
        return self.embed_noise(xi.softmax(dim=-1))             # keeps the ranks, tames the tail

    def embed(self, xt, xi):
        x = self.net.embed(xt)                                  # (B, T, C)
        return x.masked_scatter((xt == self.mask_id)[..., None], self.read(xi).to(x.dtype))

    def draw(self, logits, u):
        """The best tokens (M,): the noise that was read decides, as it does for the teacher."""
        return logits.argmax(dim=-1)


# --- 5. Sampling: the noise is drawn once and kept over all steps ---------------------------------
def sequence_noise(seed, index, seq_len, model):
    """All draws of the texts number `index` (n,), whatever the batch: xi (n, T, V), u (n, 2, T)."""
    like = next(model.parameters())
    xi, u = [], []
    for i in index.tolist():
        g = rng(seed, "sequence", i, device=like.device)
        u.append(torch.rand(2, seq_len, generator=g, dtype=torch.float64, device=like.device))
        xi.append(sample_gumbel((seq_len, model.vocab_size), g, like.dtype))
    return torch.stack(xi), torch.stack(u)


def fill_steps(u, steps):
    """The step k = 1..steps that fills each token, of u (B, T). Step k goes to s = 1 - k / steps.
    It fills what is masked and has u >= s: a share (t - s) / t, as MDLM's ancestral sampler."""
    return (steps * (1 - u)).ceil()


@torch.no_grad()
def denoise(student, xt, xi, u, steps):
    """6. Fill the masked tokens of xt (B, T), in `steps` steps from time 1 to time 0: a copy.
    Official code: diffusion.py _ddpm_caching_sampler_w_gumbel (tau 0.85, random, nucleus 0.9)"""
    fill_step = fill_steps(u[:, 0], steps)                      # (B, T)
    for k in range(1, steps + 1):
        is_masked = xt == student.mask_id                       # M of them True
        is_filled = is_masked & (fill_step == k)
        if not is_filled.any():
            continue
        logits = student(xt, xi[is_masked])                     # (M, V)
        tokens = student.draw(logits, u[:, 1][is_masked])       # (M,)
        xt = torch.where(is_filled, xt.masked_scatter(is_masked, tokens), xt)
    return xt


Teacher.write, Student.write = serial_extraction, denoise       # model.write(xt, xi, u, nfe)
STUDENTS = {"mdlm": Student, "gumbel": GumbelStudent}


def generate(model, n, seq_len, seed=0, nfe=1, known=None, tau=1.0):
    """n texts (n, T) of a Student or a Teacher. Text i depends on seed and i only, and all models
    write it from the same noise, scaled by tau. Tokens of `known` (T,) stay, where not V."""
    limit = 1 + 2**26 // (seq_len * model.vocab_size)           # 256 MiB of noise
    known = torch.full((seq_len,), model.vocab_size) if known is None else known
    texts = []
    for index in torch.arange(n).split(min(1000, limit)):
        xi, u = sequence_noise(seed, index, seq_len, model)
        xt = known.to(xi.device).repeat(len(index), 1)          # (B, T)
        texts.append(model.write(xt, tau * xi, u, nfe))
    return torch.cat(texts)


# --- 6. The maze: data whose true distribution is known -------------------------------------------
# Each of 6 x 6 cells, tokens 0 to 35, is open to the right (>), below (v), to both (+) or neither.
MAZE = "++++v. +++>+v vv+++v +v>>+v v>++vv >>>>>.".split()
MOVES = {">": [1], "v": [6], "+": [1, 6], ".": []}


def shortest_paths():
    """All paths of ten moves, right or down, lists of the cells entered. All end in cell 35."""
    cells, paths = "".join(MAZE), [[0]]
    for _ in range(10):
        paths = [path + [path[-1] + move] for path in paths for move in MOVES[cells[path[-1]]]]
    return [path[1:] for path in paths]


class Maze:
    """The 51 shortest paths through the maze, equally likely; they validate, too. The loss of a
    perfect teacher is ln 51 / 10 = 0.393. data.py has a class with the same attributes for text."""
    vocab_size = bos_id = 36                                    # the teacher gets a BOS of its own
    tokenizer = dict(words=[col + row for row in "123456" for col in "abcdef"], sep=" ")
    fingerprint, pretrained = "maze", None                      # pretrained: a net for the teacher

    def __init__(self):
        self.paths = torch.tensor(shortest_paths())             # (51, 10)
        self.n_train, self.val = len(self.paths), self.paths.repeat(10, 1)
        self.rows = self.paths.__getitem__                      # texts number `index` (n,): (n, T)

    def judge(self, x):
        """valid: share of the texts x (N, T) that are paths;  distinct: number of paths among them;
        tv: total variation between x and the true distribution, 0 to 1"""
        is_path = (x.cpu()[:, None] == self.paths).all(dim=2)   # (N, 51)
        share = is_path.double().mean(dim=0)                    # (51,)
        valid = share.sum().item()
        distance = (share - 1 / len(share)).abs().sum().item() + 1 - valid
        return dict(valid=valid, distinct=(share > 0).sum().item(), tv=distance / 2)

    def show(self, x):
        """Texts (n, T) as drawings: o is a cell of the path, | and _ are walls."""
        lines = [""] * 7
        for path in x.tolist():
            for cell, sign in enumerate("".join(MAZE)):
                mark = "o" if cell in [0] + path else " _"[sign in ">."]
                lines[cell // 6] += mark + " |"[sign in "v."]
            verdict = "open" if 36 in path else "broken"
            lines[6] += f"{'valid' if path in self.paths.tolist() else verdict:12}"
        return "\n".join(lines)


# --- 7. Training: one loop for teacher and student ------------------------------------------------
def backward(model, data, cfg, step, teacher):
    """Gradients of one step's batch, whose pieces the processes share out; returns its loss. All
    draws are keyed by (seed, step, piece): N processes take the steps of one, up to rounding."""
    loss = torch.zeros((), device=cfg.device)
    n = cfg.batch_size // cfg.grad_accum                        # texts of a piece
    for piece in range(RANK, cfg.grad_accum, WORLD):
        # texts and times are drawn on the CPU, the large masks and noise where they are used
        g = rng(cfg.seed, "batch", step, piece)
        index = torch.randint(data.n_train, (n,), generator=g)
        x0 = data.rows(index).to(cfg.device)                    # (n, T)
        t = stratified_times(torch.rand(n, 1, generator=g), cfg.t_min).to(cfg.device)
        g = rng(cfg.seed, "loss", step, piece, device=cfg.device)
        torch.manual_seed(g.initial_seed())                     # dropout draws from the global one
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.device == "cuda" and HAS_BF16):
            piece_loss = model.loss(x0, t, g, teacher) / cfg.grad_accum
        piece_loss.backward()                                   # adds to the gradients
        loss += piece_loss.detach()                             # no .item(): a card need not wait
    if WORLD > 1:  # each process has the gradient of its own pieces: add them up
        for tensor in [loss] + [p.grad for p in model.parameters()]:
            dist.all_reduce(tensor)
    return loss


@torch.no_grad()
def mean_loss(model, x, cfg, teacher=None):
    """Mean loss on texts x (N, T), with fixed times in [0.001, 1], masks and noise."""
    total = 0.0
    for i, x0 in enumerate(x.split(cfg.batch_size // cfg.grad_accum)):
        g = rng("validation", i, device=cfg.device)
        t = stratified_times(torch.full((len(x0), 1), 0.5, device=cfg.device))
        total += len(x0) * model.loss(x0.to(cfg.device), t, g, teacher).item()
    return total / len(x)


def fingerprint(model):
    """A hash of the weights: equal models have equal hashes."""
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().cpu().numpy()
    return hashlib.blake2b(weights.tobytes(), digest_size=8).hexdigest()


def resume(path, about, parts):
    """Read a checkpoint, made from what the dict `about` says, into the parts; its step and log."""
    saved = [dict(step=0, log=[], about=about)]
    if RANK == 0 and os.path.exists(path):
        saved = [torch.load(path, map_location="cpu", weights_only=True)]      # code is refused
    if WORLD > 1:  # what process 0 has counts for all: its checkpoint, or its settings and data
        dist.broadcast_object_list(saved)
    saved = saved[0]
    for name in about:
        there = saved.get("about", {}).get(name)
        if there != about[name]:
            raise UserError(f"{path} has {name} {there}, not {about[name]}; use another --out-dir")
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved[name])
    return saved["step"], saved["log"]


def train(name, model, data, cfg, n_steps, teacher=None):
    """Train a Teacher or Student, or go on from its checkpoint: bit for bit on a CPU with as many
    threads, as all draws are keyed by the step. Returns the averaged weights, a model."""
    path = f"{cfg.out_dir}/{name}.pt"
    makers = ["all", "student"] if teacher else ["all"]
    about = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
             if field.metadata["of"] in makers}                 # what the model is made from
    about.update(n_steps=n_steps, data=data.fingerprint, start=fingerprint(model))
    about["teacher"] = fingerprint(teacher) if teacher else None
    model.to(cfg.device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)     # averaged weights write better
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    step, log = resume(path, about, parts)
    if cfg.compile and step < n_steps:
        model.net.nll = torch.compile(model.net.nll, dynamic=True)
        for layer in model.net.layers:
            layer.compile()
    unit = "(given the noise: no bound)" if model.reads_noise else "nats/token"
    bar = tqdm(total=n_steps, initial=step, desc=name, disable=RANK > 0 or None)
    while step < n_steps:
        loss = backward(model, data, cfg, step, teacher)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)       # a rare huge gradient does no harm
        # linear warm-up, times a cosine that falls from 1 at step 0 to 0 at the end
        warm = min(1, (step + 1) / (cfg.warmup + 1))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / n_steps)
        optimizer.param_groups[0]["lr"] = cfg.lr * warm * cosine
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (1 + step) / (10 + step))          # short runs forget the first steps
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 1 - decay)
        step += 1
        bar.update()
        if RANK == 0 and (step % cfg.eval_every == 0 or step == n_steps):
            val = mean_loss(ema, data.val[:8 * cfg.batch_size], cfg, teacher)
            bar.write(f"{name:12} step {step:6} | loss {loss:.4f} | val {val:.4f} {unit}")
            if not math.isfinite(val):
                raise UserError(f"{name}: the loss is {val} at step {step}; try a lower --lr")
            log.append((step, loss.item(), val))
            saved = {part: parts[part].state_dict() for part in parts}
            torch.save(dict(saved, name=name, about=about, config=vars(cfg), step=step, log=log,
                            tokenizer=data.tokenizer), path + ".tmp")
            os.replace(path + ".tmp", path)                     # whole, or not at all
    return ema


# --- 8. Settings: every field is a flag of the command line ---------------------------------------
RANK = int(os.environ.get("RANK", 0))               # the number of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))        # how many processes there are
UserError = SystemExit      # something the user can mend: Python prints the message, no traceback
HAS_BF16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def option(default, help, of="run", **how):
    """A field of Config; it decides the weights `of` "all" models, of a "student", or of none."""
    return dataclasses.field(default=default, metadata=dict(of=of, how=dict(how, help=help)))


@dataclasses.dataclass
class Config:
    dataset: str = option("maze", "maze; with data.py: cities, text, tinystories, lm1b, owt")
    seq_len: int = option(10, "tokens of a text", "all")
    n_layer: int = option(4, "layers of the Transformer", "all")
    n_head: int = option(2, "attention heads", "all")
    n_embd: int = option(64, "width", "all")
    dropout: float = option(0.0, "dropout probability", "all")
    batch_size: int = option(64, "texts of an optimiser step", "all")
    grad_accum: int = option(1, "pieces to split a batch into, to save memory", "all")
    lr: float = option(3e-3, "highest learning rate of AdamW", "all")
    warmup: int = option(100, "steps of linear warm-up", "all")
    ema: float = option(0.999, "decay per step of the averaged weights", "all")
    seed: int = option(0, "seed of every random draw", "all")
    teacher_steps: int = option(1000, "optimiser steps of the teacher")
    max_steps: int = option(1500, "optimiser steps of each student")
    t_min: float = option(1e-3, "smallest time t in training", "student")
    init_from: str = option("scratch", "first weights: scratch, teacher, or a file", "student")
    students: str = option((), "which students to train (all)", nargs="+")
    nfe: int = option((1, 3, 10), "steps to write a text in, one or more numbers", nargs="+")
    n_samples: int = option(3000, "texts for a row of the table")
    eval_every: int = option(500, "steps between validations; each writes the checkpoint")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    compile: bool = option(HAS_BF16, "torch.compile")
    out_dir: str = option("out/<dataset>", "folder of this run")
    load = Maze                                                 # data.py has a method load

    def __post_init__(self):
        for field in dataclasses.fields(self):  # numpy's numbers become plain; 2.5 is no int
            kind, value = field.type, getattr(self, field.name)
            if "nargs" in field.metadata["how"]:
                setattr(self, field.name, [kind(str(one)) for one in value])
            else:
                setattr(self, field.name, kind(value if kind is bool else str(value)))
        self.out_dir = self.out_dir.replace("<dataset>", self.dataset) or "."


def parse(students, config=Config, words=None):
    """The settings of a command line, checked. data.py has those of a text, and their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", default="maze")
    dataset = parser.parse_known_args(words)[0].dataset
    if dataset != "maze":
        try:
            from data import config_of
        except ImportError as e:
            raise UserError(f"--dataset {dataset} needs data.py and its packages ({e})") from e
        config = config_of(dataset, config)
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(config):
        how = dict(type=field.type, metavar=field.type.__name__)
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, **how, **field.metadata["how"])
    cfg = config(**vars(parser.parse_args(words)))
    cfg.students = cfg.students or list(students)
    if not set(cfg.students) <= set(students):
        parser.error(f"--students: choose from {' '.join(students)}")
    sizes = cfg.seq_len, cfg.n_head, cfg.batch_size, cfg.grad_accum, cfg.eval_every, *cfg.nfe
    if min(*sizes, cfg.n_samples) < 1 or cfg.dataset == "maze" and cfg.seq_len != 10:
        parser.error(f"sizes and steps must be 1 or more, --seq-len of the maze 10: {sizes}")
    if cfg.n_embd % (2 * cfg.n_head):                           # rotary positions turn pairs
        parser.error("--n-embd: must be a multiple of twice --n-head")
    if cfg.batch_size % cfg.grad_accum or cfg.grad_accum < WORLD:
        parser.error(f"--grad-accum: must divide --batch-size, and be {WORLD} or more")
    return cfg


# --- 9. The run: data, teacher, students, table ---------------------------------------------------
@torch.no_grad()
def evaluate(teacher, models, data, cfg):
    """The rows of the table: real text, the teacher, each student in few and in many steps."""
    n, T, seed = cfg.n_samples, cfg.seq_len, cfg.seed
    index = torch.randint(len(data.val), (n,), generator=rng(seed, "table"))
    texts = [("data", 0, data.val[index]), ("teacher", T, generate(teacher, n, T, seed))]
    for name in tqdm(models, desc="table", disable=None):
        for nfe in cfg.nfe:
            texts.append((name, nfe, generate(models[name], n, T, seed, nfe)))
    return [dict(model=name, nfe=nfe, **data.judge(x), teacher_nll=mean_loss(teacher, x, cfg))
            for name, nfe, x in texts]


def print_table(rows):
    """Rows, dicts with the same keys, as aligned text."""
    table = [rows[0].keys()] + [row.values() for row in rows]
    table = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in table]
    widths = [2 + max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("".join(map(str.rjust, cells, widths)))


def main(students=STUDENTS, config=Config, words=None):
    """Train the teacher and the students {name: class}, print a table and texts. words: as argv."""
    cfg = parse(students, config, words)
    lock = FileLock(f"{cfg.out_dir}/.lock{RANK}", is_singleton=True)     # ends with the process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{cfg.out_dir}: another run writes there; use another --out-dir") from None
    if WORLD > 1:
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    torch.backends.cuda.matmul.allow_tf32 = True                # TF32 is enough for labels
    data = cfg.load()
    torch.manual_seed(cfg.seed)
    teacher = Teacher(cfg, data.vocab_size, data.bos_id, data.pretrained)
    teacher = train("teacher", teacher, data, cfg, cfg.teacher_steps)
    models = {}
    for name in cfg.students:
        torch.manual_seed(cfg.seed)
        student = students[name](cfg, data.vocab_size)
        if cfg.init_from != "scratch":  # what the start lacks stays new; [MASK]'s row is its BOS
            start = teacher.state_dict()
            if cfg.init_from != "teacher":
                start = torch.load(cfg.init_from, map_location="cpu", weights_only=True)["ema"]
            if student.load_state_dict(start, strict=False).unexpected_keys == list(start):
                raise UserError(f"--init-from {cfg.init_from}: it has no weights of {name}")
        models[name] = train(name, student, data, cfg, cfg.max_steps, teacher)
    if WORLD > 1:
        dist.destroy_process_group()
        if RANK > 0:
            return
    print_table(evaluate(teacher, models, data, cfg))
    nfe = cfg.nfe[len(cfg.nfe) // 2]
    for name, model in models.items():
        how = "by argmax" if model.reads_noise else "at temperature 1"
        print(f"\n{name}, {nfe} steps, {how}: python sample.py --ckpt {cfg.out_dir}/{name}.pt")
        print(data.show(generate(model, 3, cfg.seq_len, cfg.seed, nfe)))


if __name__ == "__main__":
    main()
