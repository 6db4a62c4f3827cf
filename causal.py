"""Causal drafts: the teacher's own network writes a block of tokens in one step.

    python causal.py                                # blocks.py, with one more student
    python causal.py --block-size 10 --nfe 1 3      # one block: the whole path

Not in the paper. Given the noise, the teacher's token i depends on the noise of the positions up to
i alone. So this student looks back only, as its teacher does, and can begin with its weights:

    input    position i reads the token before it; where that is masked, its draft (drafts.py)
    output   softmax(s (logits + xi)): where the token before is known, the teacher's own choice

Tokens that are known later do not help it.
"""

import torch

from blocks import BLOCK_STUDENTS, BlockCache, BlockConfig, BlockDraftStudent, BlockMask
from drafts import DraftTransformer
from gumbel_distill import main


class CausalMask(BlockMask):
    def __init__(self, seq_len, block_size, device):
        super().__init__(seq_len, block_size, device)
        i = torch.arange(seq_len, device=device).repeat(2)
        self.mask &= i[:, None] >= i                            # no token sees a later one


class CausalCache(BlockCache):
    def __call__(self, layer, q, k, v):
        n_new, n_seen = q.size(2), self[layer].size(3) if layer in self else 0
        mask = torch.ones(n_new, n_seen + n_new, dtype=torch.bool, device=q.device).tril(n_seen)
        return super().__call__(layer, q, k, v, mask)


class CausalTransformer(DraftTransformer):
    """It looks back only. The position after a draft reads it, where is_shown (B, T) is True."""
    causal = True

    def place(self, drafts):
        return drafts.roll(1, dims=1) * self.is_shown[..., None]


class CausalStudent(BlockDraftStudent):
    way_to_train, way_to_write = CausalMask, CausalCache

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net or CausalTransformer(cfg, vocab_size))

    def embed(self, xt, xi):
        """The tokens before those of xt, embedded; [MASK] before the first. xt (B, T) is a block,
        or (B, 2T) xt and x0 side by side."""
        is_masked, before = xt == self.mask_id, xt.roll(1, dims=1)
        before[:, 0] = self.done[:, -1] if self.start > 0 else self.mask_id
        starts = torch.arange(0, xt.size(1), self.block_size)   # of the blocks
        if self.x0 is not None:
            of_xt, of_x0 = starts.chunk(2)
            before[:, of_x0[0]] = self.mask_id
            before[:, of_xt] = before[:, of_x0]                 # the text before a block is clean
        self.net.is_masked, self.net.xi = is_masked, xi
        self.net.is_shown = is_masked.roll(1, dims=1).index_fill(1, starts.to(xt.device), False)
        return self.net.embed(before)

    def forward(self, xt, xi=None):
        return self.net.scale * (super().forward(xt, xi) + xi)


CAUSAL_STUDENTS = {**BLOCK_STUDENTS, "bd3lm-causal": CausalStudent}

if __name__ == "__main__":
    main(CAUSAL_STUDENTS, BlockConfig)
