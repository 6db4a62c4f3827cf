"""The project's own student: at each quarter of its layers it drafts a text, and sees its draft.

    python drafts.py                          # as gumbel_distill.py, with one more student

Not in the paper. Noise and probabilities decide a token together: argmax(logp + xi). The paper's
student sees the noise alone. This one guesses logp with its own output layer and adds the noise.
The layers above read the tokens that win, so they can make the tokens of a text agree. Only the
network differs. To make a student of your own, copy this file.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from gumbel_distill import STUDENTS, GumbelStudent, Student, Transformer, main

DRAFT_TOKENS = 8                    # a draft mixes the embeddings of that many tokens


class DraftTransformer(Transformer):
    """A Transformer that adds a draft at the masked positions, before three of its layers.
    Its attributes is_masked (B, T) and xi (M, V) say what is masked, and the noise there."""

    def __init__(self, cfg, vocab_size):
        super().__init__(cfg, vocab_size, causal=False)
        self.scale = nn.Parameter(torch.ones(()))               # s

    def forward(self, x, pos=None, attend=None):
        pos = torch.arange(x.size(1), device=x.device) if pos is None else pos
        n_layer, is_masked = len(self.layers), self.is_masked[..., None]   # (B, T, 1)
        for i, layer in enumerate(self.layers):
            if i in (n_layer // 4, n_layer // 2, n_layer * 3 // 4):
                draft = self.draft(x[self.is_masked])           # (M, C)
                drafts = torch.zeros_like(x).masked_scatter(is_masked, draft.to(x.dtype))
                x = x + self.place(drafts)
            x = layer(x, pos, attend)
        self.xi = None                                          # V wide: free its memory
        return self.norm(x)

    def place(self, drafts):
        return drafts                                           # (B, T, C), each where it was made

    def draft(self, h):
        """softmax(s (logits + xi)) of the k best tokens times their embeddings: a soft form of the
        token argmax(logits + xi). h (M, C) -> (M, C). The logits are those of a logit lens: the
        final norm and the output layer read an inner layer."""
        h = self.norm(h)
        # choose the k best by all logits, without a gradient; compute these k again, with one
        score = F.linear(h.detach(), self.head.weight.detach()) + self.xi  # (M, V)
        best = score.topk(min(DRAFT_TOKENS, score.size(1)), dim=-1).indices            # (M, k)
        logits = torch.einsum("mkc,mc->mk", F.embedding(best, self.head.weight), h)
        weight = (self.scale * (logits + self.xi.gather(-1, best))).softmax(dim=-1)
        return torch.einsum("mk,mkc->mc", weight, F.embedding(best, self.embed.weight))


class DraftStudent(Student):
    """A masked diffusion model that reads the noise by drafting, see above."""
    reads_noise = True
    draw = GumbelStudent.draw                                   # the argmax: the noise decides

    def __init__(self, cfg, vocab_size, net=None):
        super().__init__(cfg, vocab_size, net or DraftTransformer(cfg, vocab_size))

    def embed(self, xt, xi):
        self.net.is_masked, self.net.xi = xt == self.mask_id, xi
        return self.net.embed(xt)


if __name__ == "__main__":
    main({**STUDENTS, "gumbel-draft": DraftStudent})
