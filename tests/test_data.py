"""Data sets and tokenizers.   python -m pytest tests/test_data.py"""

import collections

import numpy as np
import pytest
import torch

import gumbel_distill as gd


def data_of(**given):
    return gd.load_data(gd.resolve(gd.Config(**given)))


def test_maze_paths_are_all_the_shortest_paths():
    """Against a breadth-first search over the drawing."""
    size, best = gd.MAZE_SIZE, collections.deque([(0, ())])
    found = []
    while best:
        cell, path = best.popleft()
        if cell == size**2 - 1:
            if not found or len(path) == len(found[0]):
                found.append(path)
            continue
        if len(path) >= 10:
            continue
        row, col = divmod(cell, size)
        for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            if gd.MAZE[2 * row + 1 + dr][4 * col + 2 + 2 * dc] == " ":
                best.append((cell + size * dr + dc, path + (cell + size * dr + dc,)))
    assert 50 <= len(found) <= 60
    assert sorted(found) == sorted(map(tuple, gd.maze_paths()))


def test_maze_judge_tells_valid_from_invalid_and_measures_spread():
    data = data_of()
    assert data.judge(torch.tensor(gd.maze_paths()))["tv"] == pytest.approx(0)
    uniform = data.judge(data.rows(np.arange(4000)))
    assert uniform["valid"] == 1 and uniform["distinct"] == 51
    assert uniform["tv"] == pytest.approx(uniform["tv_exact_sampler"], abs=0.015)
    assert uniform["tv_exact_sampler"] == pytest.approx(0.05, abs=0.01)
    one = data.rows([0] * 100)
    scores = data.judge(one)
    assert (scores["valid"], scores["distinct"]) == (1, 1)
    assert scores["tv"] == pytest.approx(1 - 1 / 51)
    one[:, 4] = 0
    assert data.judge(one)["valid"] == 0 and data.judge(one)["tv"] == 1


def test_maze_drawing_marks_the_path():
    drawn = gd.draw_maze(gd.maze_paths()[0])
    assert drawn.count("o") == 11 and drawn.replace("o", " ") == "\n".join(gd.MAZE)


def test_every_sentence_of_the_grammar_parses_and_broken_ones_do_not():
    data = data_of(dataset="cities")
    x = data.rows(np.arange(1000))
    scores = data.judge(x)
    assert scores["valid"] == 1 and scores["wrong_names"] == 0 and scores["distinct"] > 990
    assert scores["tv"] == pytest.approx(scores["tv_exact_sampler"], abs=0.02)
    assert 100 <= data.tokenizer.vocab_size <= 200
    whole = "the pilots fly from San Diego to New York on Monday the 7th with Ben and two lamps"
    other = "Anna flies from San Diego to New York on Monday the 7th and Ida follows Anna"
    for text in (whole, other, whole.replace("San Diego", "San Angeles"),
                 whole.replace("lamps", "lamp"), whole.replace("fly", "flies"),
                 whole.replace("7th", "8th"), whole.replace(" from", ""),
                 other.replace("follows Anna", "follows Ben")):
        ids = data.tokenizer.encode(text + f" {gd.END}" * (19 - len(text.split())))
        scores = data.judge(torch.tensor(ids.astype(int))[None])
        assert scores["valid"] == (text in (whole, other)), text
        assert scores["wrong_names"] == (0.5 if "San Angeles" in text else 0)


def test_text_is_split_encoded_and_decoded(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, grüße!\n" * 50, encoding="utf-8")
    data = data_of(dataset="text", train_files=str(tmp_path / "*.txt"), seq_len=8)
    assert len(data.train) == 900 and len(data.val) == 101  # a line end closes the file
    assert data.tokenizer.decode(data.rows([4])[0]) == "o world,"
    assert data.val_rows(1000).shape == (12, 8)
    limited = data_of(dataset="text", train_files=str(tmp_path / "*.txt"), seq_len=8,
                      max_tokens=100)
    assert len(limited.train) == 100 and limited.fingerprint != data.fingerprint


def test_tiny_shakespeare_by_character_and_by_bpe(real_data):
    path = str(real_data / "tinyshakespeare.txt")
    data = data_of(dataset="text", train_files=path)
    assert data.tokenizer.vocab_size == 65
    assert len(data.train) + len(data.val) == 1_115_394 + 1     # a line end closes the file
    bpe = data_of(dataset="text", train_files=path, tokenizer="gpt2")
    assert (bpe.tokenizer.vocab_size, bpe.tokenizer.bos_id) == (50257, 50256)
    assert bpe.tokenizer.encode("Hello world").tolist() == [15496, 995]
    text = bpe.tokenizer.decode(bpe.rows([0])[0])
    assert text.startswith("First Citizen:\nBefore we proceed")
