"""Shifted drafts: a student that reads its drafts where its teacher reads tokens.

    python shifted.py                                   # blocks.py, with one more student
    python shifted.py --block-size 10 --nfe 1 3 10      # one block: MDLM's order of filling

Not in the paper. The students of MDLM read token i, or [MASK], at position i. This one keeps the
places of its teacher, from whose weights it can begin:

    input    position i reads the token before it; where that is masked, [MASK] and its draft
    output   softmax(s (logits + xi)): the noise of token i decides it, as in the teacher

So a draft does for the next token what a written token does in the teacher. The last token of a
block is read by later blocks alone.
"""

import torch

from blocks import BLOCK_STUDENTS, BlockConfig, BlockDraftStudent
from drafts import DraftTransformer
from gumbel_distill import main


class ShiftedTransformer(DraftTransformer):
    """The position after a draft reads it, where the attribute is_shown (B, T) is True."""

    def place(self, drafts):
        return drafts.roll(1, dims=1) * self.is_shown[..., None]


class ShiftedStudent(BlockDraftStudent):
    """BD3-LM with shifted drafts."""

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net or ShiftedTransformer(cfg, vocab_size))

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


SHIFTED_STUDENTS = {**BLOCK_STUDENTS, "bd3lm-shifted": ShiftedStudent}

if __name__ == "__main__":
    main(SHIFTED_STUDENTS, BlockConfig)
