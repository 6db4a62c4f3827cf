"""Worked solutions of 03_gumbel_distillation.ipynb. The tests run them there."""

# Exercise 3.1. No. The noise was drawn given the text, so it tells the student about the text. A
# bound on -log p(text) must not use anything that was made from this text.
answer = False

# Exercise 3.2. Cell i of the teacher is argmax(logp_i + xi_i), and logp_i depends on the cells
# before it. By induction the noise of the cells 1 to i decides the cells 1 to i.
answer = 4

# Exercise 3.3. At tau = 0 all noise is 0. Then all texts are the same text.
answer = lambda tau: len(gd.generate(ours, 1000, 10, nfe=1, tau=tau).unique(dim=0))
