"""Causal drafts: the teacher's own network writes a block of tokens in one step.

    python causal.py                           # blocks.py's students and this one; the maze
    python causal.py --block-size 10 --nfe 1   # the whole path in one step

Not in the paper. Given the noise, the teacher's token i depends on the noise of the positions up to
i alone. So this student looks back only, and can keep what its teacher's weights do:

    input    position i reads the token before it, as in the teacher
    drafts   where that token is masked, position i reads its draft, made as in drafts.py
    output   logits + xi: where the token before is known, this is the teacher's own draw

It gives up what a bidirectional student can do: tokens that are known later do not help it.
"""

import torch

from blocks import BLOCK_STUDENTS, BlockCache, BlockConfig, BlockDraftStudent, BlockMask
from drafts import DraftTransformer
from gumbel_distill import main


class CausalMask(BlockMask):
    """BlockMask, where no token sees a later one."""

    def __init__(self, seq_len, block_size, device):
        super().__init__(seq_len, block_size, device)
        i = torch.arange(seq_len, device=device).repeat(2)
        self.mask &= i[:, None] >= i


class CausalCache(BlockCache):
    """BlockCache, where no new token sees a later one."""

    def __call__(self, layer, q, k, v):
        n_new, n_seen = q.size(2), self[layer].size(3) if layer in self else 0
        mask = torch.ones(n_new, n_seen + n_new, dtype=torch.bool, device=q.device).tril(n_seen)
        return super().__call__(layer, q, k, v, mask)


class CausalTransformer(DraftTransformer):
    """A DraftTransformer that looks back only, and reads each draft one position later. Its
    attribute is_shown (B, T, 1) says where a draft is read."""
    causal = True

    def place(self, drafts):
        return drafts.roll(1, dims=1) * self.is_shown


class CausalBlockStudent(BlockDraftStudent):
    """BD3-LM as its teacher would be it: see above."""
    way_to_train, way_to_write = CausalMask, CausalCache

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net or CausalTransformer(cfg, vocab_size))

    def embed(self, xt, xi):
        """The embeddings of the tokens before those of xt, a block, or xt and x0 side by side. The
        first token has [MASK] before it, whose embedding is the teacher's BOS where it has none."""
        is_masked = xt == self.mask_id
        before, is_shown = xt.roll(1, dims=1), is_masked.roll(1, dims=1)
        first = torch.arange(0, xt.size(1), self.block_size)    # of each block
        is_shown[:, first] = False                              # what comes before it is known
        if self.start > 0:
            before[:, 0] = self.done[:, -1]
        else:
            before[:, 0] = self.mask_id
        if self.x0 is not None:
            of_xt, of_x0 = first.chunk(2)
            before[:, of_x0[0]] = self.mask_id
            before[:, of_xt] = before[:, of_x0]
        self.net.is_masked, self.net.xi, self.net.is_shown = is_masked, xi, is_shown[..., None]
        return self.net.embed(before)

    def forward(self, xt, xi=None):
        return self.net.scale * (super().forward(xt, xi) + xi)


CAUSAL_STUDENTS = {**BLOCK_STUDENTS, "bd3lm-causal": CausalBlockStudent}

if __name__ == "__main__":
    main(CAUSAL_STUDENTS, BlockConfig)
