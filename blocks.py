"""BD3-LM, block diffusion (Arriola et al. 2025): autoregressive over blocks of tokens, masked
diffusion inside a block; without the noise, and with both ways to read it.

    python blocks.py                           # the maze in two blocks of 5
    python blocks.py --block-size 2 --out-dir out/blocks-of-2

With one block it is MDLM. Two things differ from Student:

    loss     the network reads xt and x0 side by side, 2T tokens under a mask: a block of xt sees
             itself and the clean blocks before it, as it will in sampling
    write    one block after the other; a cache keeps what the layers know of finished blocks
"""

import dataclasses

import torch
import torch.nn.functional as F

from drafts import DraftStudent
from gumbel_distill import Config, GumbelStudent, KVCache, Student, UserError, denoise, main, option


@dataclasses.dataclass
class BlockConfig(Config):
    block_size: int = option(5, "tokens of a block; seq_len must be a multiple", "student")
    nfe: int = option((2, 6, 10), "steps to write a text in, one or more numbers", nargs="+")

    def __post_init__(self):
        super().__post_init__()
        if self.seq_len % self.block_size:
            raise UserError(f"--block-size {self.block_size}: must divide --seq-len {self.seq_len}")
        n_blocks = self.seq_len // self.block_size              # all blocks have equal steps
        self.nfe = sorted({n_blocks * max(1, nfe // n_blocks) for nfe in self.nfe})


# -----------------------------------------------------------------------------
# Ways to attend, see Transformer
class BlockMask:
    """Attention over xt and then x0, 2T tokens. A block of xt sees itself and the earlier blocks of
    x0. A block of x0 sees x0 up to itself. `mask` (2T, 2T) is True where a row sees a column."""

    def __init__(self, seq_len, block_size, device):
        i = torch.arange(2 * seq_len, device=device)
        block = i % seq_len // block_size
        is_xt = i < seq_len
        same_block = block[:, None] == block
        same_copy = is_xt[:, None] == is_xt
        x0_before = (block[:, None] > block) & ~is_xt
        self.mask = (same_block & same_copy) | x0_before

    def __call__(self, layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class BlockCache(KVCache):
    """A KVCache that keeps what it reads only when is_final is True."""
    is_final = False

    def __call__(self, layer, q, k, v):
        cache = self if self.is_final else KVCache(self)        # a copy, which nobody keeps
        return KVCache.__call__(cache, layer, q, k, v)


# -----------------------------------------------------------------------------
# Students
class BlockStudent(Student):
    """BD3-LM. Its loss is a bound on the negative log-likelihood, as MDLM's is. Its attributes say
    what forward reads beside xt: the clean text `x0` in training; in sampling `start`, the position
    of the block, `done`, the tokens before it, and `cache`, what the layers know of them."""
    x0, start, done, cache = None, 0, None, None

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net)
        self.block_size = cfg.block_size

    def forward(self, xt, xi=None):
        """Logits (M, V), as Student.forward, of texts (training) or of one block (sampling)."""
        T = xt.size(1)
        pos = torch.arange(self.start, self.start + T, device=xt.device)
        attend = self.cache
        if self.x0 is not None:  # it has no [MASK], so the logits are those of xt
            xt, pos = torch.cat([xt, self.x0], dim=1), pos.repeat(2)       # (B, 2T), (2T,)
            attend = BlockMask(T, self.block_size, xt.device)
        x = self.embed(xt, xi) + self.embed_pos(pos)
        h = self.net(x, pos, attend)
        return self.net.head(h[xt == self.mask_id])

    def loss(self, x0, t, generator, teacher):
        """Student.loss, where each block has a time of its own: that of another text, so that the
        times of each block are stratified over the batch, too."""
        B, n_blocks = len(x0), x0.size(1) // self.block_size
        times = [t.roll(-(block * B // n_blocks), dims=0) for block in range(n_blocks)]
        t = torch.cat(times, dim=1).repeat_interleave(self.block_size, dim=1)          # (B, T)
        self.x0 = x0
        try:
            return super().loss(x0, t, generator, teacher)
        finally:
            self.x0 = None

    @torch.no_grad()
    def write(self, xt, xi, u, nfe):
        """Texts (B, T), block after block, each in an equal share of nfe, at least one step."""
        T, L = xt.size(1), self.block_size
        xt, self.cache = xt.clone(), BlockCache()
        for start in range(0, T, L):
            self.start, self.done, block = start, xt[:, :start], slice(start, start + L)
            xt[:, block] = denoise(self, xt[:, block], xi[:, block], u[:, :, block],
                                   steps=max(1, nfe * L // T))
            if start + L < T:  # the block is final: read it into the cache (not counted in nfe)
                self.cache.is_final = True
                self(xt[:, block], xi[:0, 0])                   # nothing is masked: no noise
                self.cache.is_final = False
        self.start, self.done, self.cache = 0, None, None
        return xt


class BlockGumbelStudent(BlockStudent, GumbelStudent):
    """BD3-LM with the paper's noise injection: embed and draw are those of GumbelStudent."""


class BlockDraftStudent(BlockStudent, DraftStudent):
    """BD3-LM with drafts: embed, net and draw are those of DraftStudent."""


BLOCK_STUDENTS = {"bd3lm": BlockStudent, "bd3lm-gumbel": BlockGumbelStudent,
                  "bd3lm-draft": BlockDraftStudent}

if __name__ == "__main__":
    main(BLOCK_STUDENTS, BlockConfig)
