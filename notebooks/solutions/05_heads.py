"""Worked solutions of 05_heads.ipynb. The tests run them there."""

# Exercise 5.1. Token i + 2 is argmax(logp + xi), and logp depends on the tokens i and i + 1. The
# noise of i decides token i. With it the noise of i + 1 decides token i + 1. All three take part.
answer = {0, 1, 2}

# Exercise 5.2. The draft of head k stays if the heads 1 to k are all right. That has the
# probability a1 * ... * ak. The teacher's own token is always kept: the empty product, 1.
answer = lambda a: sum(torch.tensor(a[:k]).double().prod().item() for k in range(len(a) + 1))

# Exercise 5.3. Without noise the best guess is always the likeliest token, which is right with
# probability 0.5. With the noise the head takes the same argmax as the teacher: it is never wrong.
answer = (0.5, 1.0)

# Exercise 5.4. At heads 2 and 3. There the letters between are unknown to the head, so its logits mix
# what could follow after each of them. Own noise picks one letter from this mixture, which fits the
# letters that come between by chance only. The likeliest letter of the mixture is the safer guess. At
# head 1 one unknown letter less stands between, and the noise helps a little.
answer = {2, 3}
