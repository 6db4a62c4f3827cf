"""Data for gumbel_distill.py: the maze, toy sentences, text files, the Hugging Face hub.

Each load_... returns a Data: token ids to train and to validate on, their tokenizer, and a judge
where texts can be right or wrong. What comes from GPT-2 (its tokens, its models) is here as well.
"""

import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from config import PRESETS, UserError


class Tokenizer:
    """A list of words joined by `sep` or, with words None, the first `size` tokens of GPT-2's BPE.

    bos_id is what the teacher puts in front: <|endoftext|> of GPT-2, else vocab_size, an input row
    of its own. eos_ids end a document. `state` rebuilds the tokenizer: Tokenizer(**state).
    """

    def __init__(self, words=None, sep="", size=50257):
        self.words, self.sep = words, sep
        self.state = {"words": words, "sep": sep, "size": size}
        self.fingerprint = hashlib.sha1(repr(self.state).encode()).hexdigest()[:12]
        if words is None:
            self.bpe = load_gpt2_bpe(size)
            self.vocab_size, self.bos_id = size, self.bpe.eot_token
            self.eos_ids = [self.bos_id]
        else:
            self.ids = {word: i for i, word in enumerate(words)}
            self.vocab_size = self.bos_id = len(words)
            self.eos_ids = [self.ids["\n"]] if "\n" in self.ids else []

    def encode(self, text, where="the text"):
        """Token ids of a text, uint16; UserError for what the vocabulary lacks."""
        return np.array(self.encode_batch([text], where)[0], dtype=np.uint16)

    def encode_batch(self, texts, where="the text"):
        """One list of token ids for each text; GPT-2's BPE works on all cores. There the letters
        <|endoftext|> are the one token that is written so: what was printed reads back."""
        if self.words is None:
            return self.bpe.encode_batch(texts, num_threads=os.cpu_count(), allowed_special="all")
        if self.sep:
            texts = [text.split() for text in texts]
        unknown = sorted(set().union(*texts) - self.ids.keys())
        if unknown:
            raise UserError(f"{where}: {unknown[0]!r} is not among the {self.vocab_size} tokens of "
                            f"the training text ({self.words[0]!r} to {self.words[-1]!r}); leave "
                            "it out, or train on text that has it")
        return [[self.ids[word] for word in text] for text in texts]

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if self.words is None:
            return self.bpe.decode(ids)
        return self.sep.join(self.words[i] for i in ids)


class Data:
    """Token ids: train and val, 1-D uint16 arrays, read as sequences of seq_len.

    stride    distance between the starts of training sequences; 1 in running text
    judge(x)  metrics of generated ids (N, T), a dict
    """

    def __init__(self, train, val, seq_len, tokenizer, stride=1, judge=None):
        for name, tokens in (("training", train), ("validation", val)):
            if len(tokens) < seq_len:
                raise UserError(f"the {name} text has {len(tokens)} tokens, too few: one sequence "
                                f"has {seq_len}; give more text, or a smaller --seq-len")
        self.train, self.val, self.seq_len, self.tokenizer = train, val, seq_len, tokenizer
        self.stride = stride
        self.judge = judge or (lambda x: {})
        self.n_train = (len(train) - seq_len) // stride + 1
        digest = hashlib.sha1(repr((tokenizer.state, len(train))).encode())
        digest.update(train[:2**20].tobytes())
        self.fingerprint = digest.hexdigest()[:12]              # tells other data from this

    def rows(self, index):
        """Training sequences number `index` (n,) -> (n, T) long."""
        starts = np.asarray(index)[:, None] * self.stride
        tokens = self.train[starts + np.arange(self.seq_len)]
        return torch.from_numpy(tokens.astype(np.int64))

    def val_rows(self, n):
        """The first validation sequences, n at most, without overlap -> (<= n, T) long."""
        n = min(n, len(self.val) // self.seq_len)
        tokens = self.val[:n * self.seq_len].astype(np.int64)
        return torch.from_numpy(tokens).view(n, self.seq_len)


def load_data(cfg):
    """The Data of cfg.dataset; UserError for flags that do not go with it."""
    if cfg.dataset not in GENERATED:
        return load_text(cfg)
    for name in ("train_files", "val_files", "tokenizer", "max_tokens"):
        if getattr(cfg, name) is not None:
            texts = ", ".join(other for other in PRESETS if other not in GENERATED)
            raise UserError(f"--{name.replace('_', '-')} goes with --dataset {texts}; "
                            f"{cfg.dataset} is generated")
    return GENERATED[cfg.dataset](cfg)


def show(ids, dataset, tokenizer):
    """One sequence of token ids (T,) as text to print; a path through the maze as a drawing."""
    if dataset == "maze" and len(ids) == 2 * MAZE_SIZE - 2:
        return draw_maze(ids)
    return tokenizer.decode(ids).split(" " + END)[0]


def show_all(texts, dataset, tokenizer):
    """Sequences (n, T) to print: drawings of the maze side by side, texts below one another."""
    shown = [show(ids, dataset, tokenizer) for ids in texts]
    if dataset != "maze":
        return "\n\n".join(shown)
    rows = zip(*[drawing.split("\n") for drawing in shown])
    return "\n".join("".join(line.ljust(MAZE_WIDTH + 3) for line in row).rstrip() for row in rows)


def total_variation(counts, n_outside=0):
    """Distance of counts (allowed outcomes) from uniform; n_outside other draws count, too."""
    n = max(1, counts.sum() + n_outside)
    distance = np.abs(counts / n - 1 / len(counts)).sum() + n_outside / n
    return 0.5 * float(distance)


def tv_exact_sampler(n_outcomes, n):
    """The total variation that n exact draws from n_outcomes still show (mean of simulations)."""
    uniform = np.full(n_outcomes, 1 / n_outcomes)
    draws = np.random.default_rng(0).multinomial(n, uniform, size=50)
    return float(np.mean([total_variation(counts) for counts in draws]))


def tv_independent(paths):
    """Total variation between equally likely paths (n, T) and independent draws of each position
    from its own distribution. It is where MDLM's loss leads a student that takes one step: with
    one [MASK] all that it reads is the same for every path. (Sharper draws can have less.)"""
    product = np.ones(len(paths))
    for column in paths.T:
        _, token, counts = np.unique(column, return_inverse=True, return_counts=True)
        product *= counts[token] / len(paths)
    outside = 1 - product.sum()                                 # its mass on what is no path
    return 0.5 * float(np.abs(product - 1 / len(paths)).sum() + outside)


def token_entropy(x):
    """Mean over texts (N, T) of the entropy of their token counts, in nats."""
    total = 0.0
    for row in x.cpu():
        share = row.unique(return_counts=True)[1] / len(row)
        total += torch.special.entr(share).sum().item()
    return total / len(x)


# -----------------------------------------------------------------------------
# The maze
MAZE_SIZE = 6
MAZE = """
+---+---+---+---+---+---+
|                   |   |
+   +   +   +   +   +---+
|                       |
+   +   +   +---+   +   +
|   |   |               |
+   +   +   +   +   +   +
|       |               |
+   +   +---+---+   +   +
|   |               |   |
+   +---+   +   +   +   +
|                       |
+---+---+---+---+---+---+
""".strip().split("\n")
MAZE_WIDTH = len(MAZE[0]) + 2       # of a drawing, with the numbers of its rows


def maze_paths(row=0, col=0):
    """All shortest paths from a cell of MAZE to the bottom right one, lists of the cells entered.

    Cell (row, col) is token 6 row + col. The start is implied; a shortest path goes right or down.
    """
    if row == col == MAZE_SIZE - 1:
        return [[]]
    paths = []
    if MAZE[2 * row + 1][4 * col + 4] == " ":                   # no wall to the right
        paths += [[MAZE_SIZE * row + col + 1] + rest for rest in maze_paths(row, col + 1)]
    if MAZE[2 * row + 2][4 * col + 2] == " ":                   # no wall below
        paths += [[MAZE_SIZE * (row + 1) + col] + rest for rest in maze_paths(row + 1, col)]
    return paths


@functools.cache
def maze_moves():
    """All moves (from, to) of the shortest paths, pairs of cells; the start is cell 0."""
    return {move for path in maze_paths() for move in zip([0, *path], path)}


def broken_move(path):
    """The number 1.. of the first move that no shortest path makes, or None. path: cells, masked
    ones too; a move from or to a masked cell is not judged."""
    cells = [0, *map(int, path)]
    for number, move in enumerate(zip(cells, cells[1:]), 1):
        if max(move) < MAZE_SIZE**2 and move not in maze_moves():
            return number


def draw_maze(path):
    """MAZE as text with the start a1 and the cells of `path` (token ids) marked o. The cell that
    breaks it is x. Below it stands whether the path is valid."""
    canvas = [list(line) for line in MAZE]
    broken = broken_move(path)
    for number, cell in enumerate([0, *map(int, path)]):
        row, col = divmod(cell, MAZE_SIZE)
        if row < MAZE_SIZE:                                     # not masked
            canvas[2 * row + 1][4 * col + 2] = "x" if number == broken else "o"
    lines = ["    " + "   ".join("abcdef")]
    for i, line in enumerate(canvas):
        lines.append((str(i // 2 + 1) if i % 2 else " ") + " " + "".join(line))
    is_open = len(path) < 2 * MAZE_SIZE - 2 or max(map(int, path)) == MAZE_SIZE**2
    verdict = "open" if is_open else "valid"
    lines.append("  " + (f"broken at move {broken}" if broken else verdict))
    return "\n".join(lines)


def load_maze(cfg):
    """Paths drawn uniformly from all the shortest ones, so that the true distribution is known."""
    if cfg.seq_len != 2 * MAZE_SIZE - 2:
        raise UserError(f"--seq-len {cfg.seq_len}: a path through the maze has {2 * MAZE_SIZE - 2}")
    paths = np.array(maze_paths(), dtype=np.uint16)             # (51, 10)
    number = {tuple(path): i for i, path in enumerate(paths.tolist())}

    def judge(x):
        hits = [number[tuple(path)] for path in x.tolist() if tuple(path) in number]
        counts = np.bincount(hits, minlength=len(paths))
        return {"valid": len(hits) / len(x), "distinct": int((counts > 0).sum()),
                "distinct_of": len(paths), "tv": total_variation(counts, len(x) - len(hits)),
                "tv_independent": tv_independent(paths),
                "tv_exact_sampler": tv_exact_sampler(len(paths), len(x))}

    rows = paths[np.random.default_rng(0).integers(len(paths), size=22_000)]
    words = ["abcdef"[i % MAZE_SIZE] + str(i // MAZE_SIZE + 1) for i in range(MAZE_SIZE**2)]
    return Data(rows[:20_000].ravel(), rows[20_000:].ravel(), cfg.seq_len, Tokenizer(words, " "),
                stride=cfg.seq_len, judge=judge)


# -----------------------------------------------------------------------------
# Toy sentences
END = "<end>"                   # fills a short sentence up

# The grammar of `cities`. A slot takes one phrase of its list, a repeated slot the same phrase.
SENTENCES = [
    "{name} flies from {city} to {town} on {date} and {friend} follows {name}",
    "the {person} flies from {city} to {town} on {date} with {name} and {things}",
    "the {person}s fly from {city} to {town} on {date} with {name} and {things}",
]
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
THINGS = "ticket suitcase camera guitar umbrella book lamp carpet".split()
SLOTS = {
    "name": "Anna Ben Carla David Emma Felix Grace Henry".split(),
    "friend": "Ida Jack Karen Leo Mary Noah Olga Paul".split(),
    "city": ("San Francisco,San Diego,San Jose,Los Angeles,Los Gatos,Las Vegas,Las Cruces,Santa Fe,"
             "Santa Cruz,El Paso").split(","),
    "town": ("New York,New Orleans,New Haven,Fort Worth,Fort Wayne,Long Beach,Long Branch,"
             "Grand Rapids,Cedar Rapids,Saint Paul").split(","),
    "date": [f"{WEEKDAYS[day % 7]} the {day}th" for day in range(7, 21)],
    "person": "doctor teacher lawyer farmer pilot singer baker painter".split(),
    "things": [f"one {t}" for t in THINGS] + [f"{n} {t}s" for t in THINGS
                                              for n in ("two", "three")],
}


def sentence_pattern(template):
    """The regular expression that parses the sentences of one template, and nothing else."""
    seen = set()

    def slot_pattern(match):
        slot = match[1]
        if slot in seen:
            return f"(?P={slot})"
        seen.add(slot)
        return f"(?P<{slot}>{'|'.join(SLOTS[slot])})"
    return re.compile(re.sub(r"{(\w+)}", slot_pattern, template) + f"( {END})+")


def load_cities(cfg):
    """Sentences of the grammar above, every choice uniform, filled up with END to seq_len."""
    if cfg.seq_len < 19:
        raise UserError(f"--seq-len {cfg.seq_len}: the toy sentences have up to 18 words")
    text = [s.replace("{person}", person) for s in SENTENCES for person in SLOTS["person"]]
    text = " ".join(text + [phrase for phrases in SLOTS.values() for phrase in phrases])
    tokenizer = Tokenizer(sorted(w for w in set(text.split()) if "{" not in w) + [END], " ")
    patterns = [sentence_pattern(s) for s in SENTENCES]
    names = {phrase: i for i, phrase in enumerate(SLOTS["city"] + SLOTS["town"])}
    first_words = {phrase.split()[0] for phrase in names}

    def judge(x):
        sentences = [tokenizer.decode(row) for row in x]
        valid = sum(any(p.fullmatch(s) for p in patterns) for s in sentences)
        words = [s.split() for s in sentences]
        pairs = [f"{a} {b}" for w in words for a, b in zip(w, w[1:]) if a in first_words]
        counts = np.bincount([names[p] for p in pairs if p in names], minlength=len(names))
        n_wrong = len(pairs) - int(counts.sum())
        return {"valid": valid / len(x), "distinct": len(set(sentences)), "distinct_of": len(x),
                "wrong_names": n_wrong / max(1, len(pairs)), "tv": total_variation(counts, n_wrong),
                "tv_exact_sampler": tv_exact_sampler(len(names), 2 * len(x))}

    choose, rows = random.Random(0).choice, []
    for _ in range(52_000):
        words = choose(SENTENCES).format(**{k: choose(v) for k, v in SLOTS.items()}).split()
        rows.append(" ".join(words + [END] * (cfg.seq_len - len(words))))
    tokens = np.array(tokenizer.encode_batch(rows), dtype=np.uint16)       # (52000, T)
    return Data(tokens[:-2000].ravel(), tokens[-2000:].ravel(), cfg.seq_len, tokenizer,
                stride=cfg.seq_len, judge=judge)


GENERATED = {"maze": load_maze, "cities": load_cities}


# -----------------------------------------------------------------------------
# Running text: files or the hub -> token ids on disk, made once and mapped into memory
# Where running text comes from when no --train-files are given: (name, split) on the Hugging Face
# hub. These copies are parquet; those under the bare names are scripts, which `datasets` refuses.
HUB = {"tinystories": {"train": ("roneneldan/TinyStories", "train"),
                       "val": ("roneneldan/TinyStories", "validation")},
       "lm1b": {"train": ("dvruette/lm1b", "train"), "val": ("dvruette/lm1b", "test")},
       "owt": {"train": ("Skylion007/openwebtext", "train")}}
CACHE = ".cache"                # folder of the tokenised texts, which no glob like '**/*' matches
PIECE = 2**14                   # longest piece of text, in characters, that is tokenised at once
MAX_VAL_TOKENS = 10_000_000     # of the 10 % that are held back where there are no --val-files


# LM1B's text is torn apart: " he didn 't pay £ 5 , " she said . These rules join it, one after the
# other. As MDLM's detokenizer they undo contractions, quotes, brackets, web addresses and " / ".
OPENS = r"(?:(?<!s ')|(?<=\b[iau]s ')|(?<='s ')|(?<=\b(?:was|has|his|its) ')|(?<=\bsays '))"
TORN = [(re.compile(pattern), whole) for pattern, whole in [
    (r" : / / ", "://"),
    (r" / ", "/"),
    (r" @ (?=\w+\.[a-z])", "@"),
    (r" : (?<=\d : )(?=\d\d\b)", ":"),                          # 9 : 30
    (r'^([^"]*[,.!?]) "(?= [a-z])', r'\1"'),                    # begun before: it ends , " he said
    (r'"(?<!\S") (.+?) "(?!\S)', r'"\1"'),                     # then quotes open and close in turn
    (r' "$', '"'),
    (r'"(?<!\S") (?=\S)', '"'),
    (r" '(?=(?:t|s|re|ve|m|ll|d|T|S)\b(?!'))", "'"),                 # don 't, Anna 's
    (r" ' (?<=\. ' )(?=s\b)", "'"),                            # L.A. ' s
    (r" '(?<=\b[b-hj-zB-HJ-Z] ')(?=\w)(?!\w+')", "'"),                 # O 'Brien, six o 'clock
    (r"(?<!\S)' (?=\d\d(?:s\b|(?!\S)))", "'"),                  # the ' 70s, in ' 96
    (r"'(?<!\S')" + OPENS + r" (.+?) '(?!\S)", r"'\1'"),       # a ' quoted ' word
    (r" '(?<=\w ')(?!\S)", "'"),                               # the players ' union
    (r" ([.,!?;:%)\]}]+)(?=[\"']?(?!\S))", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r"([$£€#]) (?=[\d.(])", r"\1"),
]]


def detokenize(text):
    """A sentence of LM1B as people write it. Text that is not torn apart stays as it is."""
    for pattern, whole in TORN:
        text = pattern.sub(whole, text)
    return text


# The formats of files by their endings, also with .gz behind. Others are refused.
FORMATS = {None: "text", ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json",
           ".json": "json", ".ndjson": "json", ".parquet": "parquet"}

# What ends a document within a text, with the line ends around it. At the end of what is read so
# far it waits: a line end may follow.
JOINT = "\n<|endoftext|>\n"
ENDS = re.compile(r"\n?<\|endoftext\|>(?!\Z)\n?")


def cause(error):
    """What a library says, in brackets and on one line."""
    return " ".join(f"({type(error).__name__}: {str(error):.200})".split())


def file_format(path):
    """Format of a file, "json", "parquet", "text" or None, and the function that opens it."""
    name = path.lower().removesuffix(".gz")
    is_packed = len(name) < len(path)
    ending = re.search(r"\.[a-z]\w*$", name)                    # news.en-00001-of-00100 has none
    return FORMATS.get(ending and ending[0]), gzip.open if is_packed else open


def read_rows(source, by_line):
    """The texts of a source: the field or column "text" of its rows and nothing else of them, or
    the lines of a text file (by_line), or the whole in strings of PIECE // 2."""
    if isinstance(source, tuple):
        from datasets import load_dataset, logging
        logging.set_verbosity(logging.CRITICAL)                 # our own message says it all
        name, split = source
        yield from (row["text"] for row in load_dataset(name, split=split, streaming=True))
        return
    kind, unpack = file_format(source)
    with unpack(source, "rb") as file:
        lines = io.TextIOWrapper(file, "utf-8-sig")
        if kind == "parquet":
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(file).iter_batches(1024, columns=["text"]):
                yield from batch["text"].to_pylist()
        elif kind == "json":
            yield from (json.loads(line)["text"] for line in lines if line.strip())
        elif by_line:
            yield from lines
        else:
            yield from iter(lambda: lines.read(PIECE // 2), "")


def read_pieces(source, by_line):
    """The text of a file or, for (name, split), of the Hugging Face hub; streamed, not stored.

    Yields pieces of documents, and None at the end of each. A document is a row of a .parquet or
    .jsonl file, of any other file a line (by_line) or the whole; <|endoftext|> ends one, too.
    """
    is_hub = isinstance(source, tuple)
    is_whole = not by_line and not is_hub and file_format(source)[0] == "text"
    number, rest, is_open = 1, "", False                        # is_open: a piece of it is out
    try:
        for text in itertools.chain(read_rows(source, by_line), [JOINT]):
            if not isinstance(text, str) or "\0" in text:
                raise ValueError("no text but binary data, a number or nothing")
            number += text.count("\n") if is_whole else 1
            text = detokenize(text.strip()) if by_line else text
            *ended, rest = ENDS.split(rest + text + ("" if is_whole else JOINT))
            for document in ended:
                if is_open or document.strip():
                    yield from (document[i:i + PIECE] for i in range(0, len(document), PIECE))
                    yield None
                is_open = False
            if len(rest) > PIECE // 2:  # keep what may be half a mark
                yield rest[:-len(JOINT)]
                rest, is_open = rest[-len(JOINT):], True
    except Exception as e:  # broken files, no network, renamed, rate limit: many types
        if is_hub:
            raise UserError(f"{source[0]} cannot be fetched from the Hugging Face hub {cause(e)}: "
                            "name a copy on disk with --train-files and --val-files (text, "
                            ".jsonl or .parquet)") from e
        raise UserError(f"{source}: cannot be read at or after row {number} {cause(e)}: text is "
                        "UTF-8, a row of JSON an object with a field \"text\"; mend or remove that "
                        "row, or leave the file out") from e


def write_tokens(file, pieces, tokenizer, limit, where):
    """Write the token ids of pieces to an open file, as uint16: `limit` at most, few in memory."""
    bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=None)
    while limit > 0 and (batch := list(itertools.islice(pieces, 512))):
        texts = iter(tokenizer.encode_batch([p for p in batch if p is not None], where))
        ids = []
        for piece in batch:
            ids += tokenizer.eos_ids if piece is None else next(texts)
        ids = ids[:limit]
        file.write(np.array(ids, dtype=np.uint16).tobytes())
        limit -= len(ids)
        bar.update(len(ids))
    bar.close()


def load_tokens(cfg, name, source, tokenizer, limit):
    """Token ids of a text, 1-D uint16 on disk, from the cache or written there.

    The file there begins with a line that describes the tokenizer; its name is given last.

    source: paths of files, or (name, split) on the hub;  tokenizer: None makes one of characters
    Returns: tokens, the tokenizer
    """
    is_hub = isinstance(source, tuple)
    state = source if is_hub else [(p, os.path.getsize(p), os.stat(p).st_mtime_ns) for p in source]
    key = repr((cfg.dataset, state, tokenizer and tokenizer.state, limit, TORN, ENDS))
    digest = hashlib.sha1(key.encode()).hexdigest()[:12]
    path = os.path.join(CACHE, f"{cfg.dataset}-{name}-{digest}")

    def pieces():
        for one in [source] if is_hub else source:
            yield from read_pieces(one, by_line=cfg.dataset == "lm1b")

    if not os.path.exists(path):
        if tokenizer is None:
            letters, n_left = {"\n"}, max(limit, 2**24)         # a short trial has all letters
            for piece in itertools.takewhile(lambda _: n_left > 0, pieces()):
                letters.update(piece or "")
                n_left -= len(piece or "")
            tokenizer = Tokenizer(sorted(letters))
        head = json.dumps(tokenizer.state)
        temporary = f"{path}.{os.getpid()}.tmp"
        os.makedirs(CACHE, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write((head + " " * (len(head) % 2 == 0) + "\n").encode())    # ids at even places
                write_tokens(f, pieces(), tokenizer, limit, f"--{name}-files")
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    with open(path, "rb") as f:
        tokenizer = Tokenizer(**json.loads(f.readline()))
        return np.memmap(path, np.uint16, "r")[f.tell() // 2:], tokenizer


def find_files(flag, pattern):
    """The files of a glob, or of that name; UserError for none, or for a format not known."""
    pattern = os.path.expanduser(pattern)                       # in quotes the shell leaves the ~
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(p for p in matches if os.path.isfile(p))
    if not paths:
        raise UserError(f"{flag} {pattern}: no file matches; check the path, and quote a glob like "
                        "'texts/*.txt' (of a folder take 'folder/*')")
    unknown = [path for path in paths if file_format(path)[0] is None]
    if unknown:
        raise UserError(f"{flag} {unknown[0]}: no known ending; text ends in .txt, .md or nothing, "
                        "other files in .jsonl, .json or .parquet, packed ones in .gz after it")
    return paths


def load_text(cfg):
    """Running text from files or, for the datasets of HUB, from there; through the token cache."""
    hub = HUB.get(cfg.dataset, {})
    train, val = hub.get("train"), hub.get("val")
    if cfg.train_files:
        train = find_files("--train-files", cfg.train_files)
        val = find_files("--val-files", cfg.val_files) if cfg.val_files else []
        train = [p for p in train if not any(os.path.samefile(p, v) for v in val)]
    if not train or (cfg.val_files and not cfg.train_files):
        raise UserError(f"--dataset {cfg.dataset} needs --train-files, a file or a quoted glob "
                        "like 'texts/*.txt', of which --val-files may name some but not all")
    tokenizer = None
    if cfg.tokenizer != "char":  # "gpt2", or "gpt2-4096" and the like
        tokenizer = Tokenizer(size=int(cfg.tokenizer[5:] or 50257))
    limit = cfg.max_tokens or 2**62
    if val:
        train, tokenizer = load_tokens(cfg, "train", train, tokenizer, limit)
        val, _ = load_tokens(cfg, "val", val, tokenizer, limit)
    else:
        tokens, tokenizer = load_tokens(cfg, "train", train, tokenizer, limit * 10 // 9 + 1)
        start = len(tokens) - min(len(tokens) // 10, MAX_VAL_TOKENS)
        train, val = tokens[:start], tokens[start:]
    return Data(train[:limit], val, cfg.seq_len, tokenizer)


# -----------------------------------------------------------------------------
# GPT-2: its tokens, and models of transformers as teachers and judges
def load_gpt2_bpe(size):
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever the download layer raises
        raise UserError(f"GPT-2's tokenizer files cannot be fetched {cause(e)}; without a "
                        "network set TIKTOKEN_CACHE_DIR to a folder that holds them, or use "
                        "--tokenizer char") from e
    if size == bpe.n_vocab:
        return bpe
    ranks = {token: rank for token, rank in bpe._mergeable_ranks.items() if rank < size - 1}
    return tiktoken.Encoding(f"gpt2-{size}", pat_str=bpe._pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": size - 1})


class Pretrained(nn.Module):
    """A causal language model of Hugging Face's transformers with the face of Transformer."""

    def __init__(self, model):
        super().__init__()
        self.body, self.head = model.base_model, model.get_output_embeddings()
        names = inspect.signature(self.body.forward).parameters
        self.cache = "cache" if "cache" in names else "past_key_values"    # its name before 5.24

    def embed(self, ids):
        return ids

    def forward(self, ids, cache=None):
        past = {self.cache: cache.kv.get(self)} if cache else {}
        out = self.body(ids, use_cache=cache is not None, **past)
        if cache:
            cache.kv[self] = out[self.cache]
        return out.last_hidden_state

    def logits(self, h):
        return self.head(h).float()


@functools.cache
def load_transformers(name, what, cure):
    """A causal language model of transformers and its tokenizer, by hub name or from a folder.

    `what` is the flag that named it, for the error message, which ends in the `cure`.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(name).float()
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except Exception as e:  # not installed, offline, no such name, foreign folder: many types
        raise UserError(f"{what} {name}: cannot be loaded {cause(e)}; it takes transformers (pip "
                        "install -e \".[hf]\") and, with no network, a local folder with a model "
                        f"and its tokenizer; or give {cure}") from e


def load_pretrained(name, tokenizer, seq_len):
    """The net of a teacher from transformers; it must have the tokenizer here."""
    model, words = load_transformers(name, "--teacher", "a .pt checkpoint of this program")
    sizes = model.config.vocab_size, tokenizer.vocab_size
    probe = "The teacher's tokens, 12.5 of them;\n\n  naïve?"
    if sizes[0] != sizes[1] or words.encode(probe) != tokenizer.encode(probe).tolist():
        raise UserError(f"--teacher {name}: its tokenizer ({sizes[0]} tokens) is not the one here "
                        f"({sizes[1]} tokens); gpt2 models go with --tokenizer gpt2")
    longest = getattr(model.config, "max_position_embeddings", seq_len)
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: --teacher {name} reads at most {longest} tokens")
    return Pretrained(model)
