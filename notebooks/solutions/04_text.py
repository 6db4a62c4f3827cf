"""Worked solutions of 04_text.ipynb. The tests run them there."""

# Exercise 4.1. 1,024 letters are 64 blocks of 16. Each block takes 4 calls.
answer = 64 * 4

# Exercise 4.2. In a block of one token, at time 1, the token is always masked, and the model sees
# all tokens before it. So each term of the bound is -log p(token | tokens before).
answer = "the AR likelihood"

# Exercise 4.3. Text of low entropy is easy to predict, so it has a low perplexity. At the same
# perplexity the model whose entropy is nearer to that of real text writes better.
answer = "second"
