"""Data for gumbel_distill.py: toy sentences, text files, the Hugging Face hub.

    python gumbel_distill.py --dataset cities
    python gumbel_distill.py --dataset text --train-files 'texts/*.txt'
    python gumbel_distill.py --dataset lm1b --help                     # with its own defaults

config_of gives the settings of a data set, and their load() its Data. What comes from GPT-2, its
tokens and its models, is here as well.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import os
import random
import re
import sys
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

UserError = SystemExit              # what a user can mend: Python prints its message, no traceback

# -----------------------------------------------------------------------------
# Settings: what differs from the defaults of gumbel_distill.Config
TEXT = dict(seq_len=64, n_head=4, n_embd=128, batch_size=32, lr=2e-3, t_min=0.1,
            init_from="teacher", nfe=(1, 4, 16, 64), n_samples=200)
WEB = dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, dropout=0.1, lr=3e-4, warmup=2500,
           ema=0.9999, eval_every=1000, teacher_steps=20_000, max_steps=20_000, t_min=0.1,
           init_from="teacher")
PRESETS = {
    "cities": dict(seq_len=19, lr=2e-3, teacher_steps=2000, max_steps=4000, nfe=(1, 2, 4, 19),
                   n_samples=1000),
    "text": dict(TEXT, tokenizer="char", teacher_steps=1500, max_steps=1500),
    "tinystories": dict(TEXT, tokenizer="gpt2-1024", teacher_steps=2000, max_steps=4000),
    "lm1b": dict(WEB, seq_len=128, batch_size=256, nfe=(1, 4, 16, 32, 128), n_samples=256),
    "owt": dict(WEB, seq_len=1024, batch_size=32, nfe=(16, 128, 512), n_samples=32),
}


def option(default, help):
    """A field, as those of gumbel_distill.Config. None of these decides the weights by itself: the
    fingerprint of the Data does, and that of the teacher."""
    return dataclasses.field(default=default, metadata=dict(help=help, of="run"))


class CitiesSettings:
    def load(self):
        return Cities(self.seq_len)


@dataclasses.dataclass
class TextSettings:
    train_files: str = option("", "text, .jsonl or .parquet: a file or a quoted glob; without it "
                              "the Hugging Face hub")
    val_files: str = option("", "files to validate on, which are left out of training; without "
                            "them the last 10%% of the training text")
    tokenizer: str = option("char", "char, gpt2, or gpt2-N: the first N - 1 tokens of GPT-2 and "
                            "<|endoftext|>")
    max_tokens: int = option(0, "use at most this many training tokens; 0: all")
    teacher: str = option("", "a model of transformers, by name or folder; without it one is "
                          "trained")

    def load(self):
        return load_text(self)


def config_of(dataset, config):
    """The settings of a data set: a subclass of the dataclass `config` with its own defaults."""
    if dataset not in PRESETS:
        raise UserError(f"--dataset {dataset}: choose from maze {' '.join(PRESETS)}")
    bases = (CitiesSettings if dataset == "cities" else TextSettings), config
    preset = dict(PRESETS[dataset], dataset=dataset)
    changed = []
    for base in bases:
        for field in dataclasses.fields(base) if dataclasses.is_dataclass(base) else ():
            if field.name in preset:
                default = dataclasses.field(default=preset[field.name], metadata=field.metadata)
                changed.append((field.name, field.type, default))
    return dataclasses.make_dataclass("Config", changed, bases=bases)


# -----------------------------------------------------------------------------
# Tokens
class Tokenizer:
    """A list of words joined by `sep` or, with words None, the first `size` tokens of GPT-2's BPE.

    bos_id is what the teacher puts in front: <|endoftext|> of GPT-2, else vocab_size, an input row
    of its own. Tokenizer(**state) makes it anew.
    """

    def __init__(self, words=None, sep="", size=50257):
        self.words, self.sep = words, sep
        self.state = dict(words=words, sep=sep, size=size)
        if words is None:
            self.bpe = load_gpt2_bpe(size)
            self.vocab_size, self.bos_id = size, self.bpe.eot_token
        else:
            self.ids = {word: i for i, word in enumerate(words)}
            self.vocab_size = self.bos_id = len(words)
        if self.vocab_size > 2**16:
            raise UserError(f"the text has {self.vocab_size} different letters, and token ids go "
                            f"up to {2**16}; use --tokenizer gpt2")

    def encode(self, text):
        """Token ids of a text, a list; UserError for what the vocabulary lacks."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Token ids of each text; GPT-2's BPE works on all cores. There the letters <|endoftext|>
        are the one token that is written so: what was printed reads back."""
        if self.words is None:
            return self.bpe.encode_batch(texts, num_threads=os.cpu_count(), allowed_special="all")
        if self.sep:
            texts = [text.split() for text in texts]
        unknown = sorted(set().union(*texts) - self.ids.keys())
        if unknown:
            raise UserError(f"{unknown[0]!r} is not among the {self.vocab_size} tokens of the "
                            f"training text ({self.words[0]!r} to {self.words[-1]!r}); leave it "
                            "out, or train on text that has it")
        return [[self.ids[word] for word in text] for text in texts]

    def decode(self, ids):
        """The text of token ids (T,)."""
        ids = [int(i) for i in ids]
        if self.words is None:
            return self.bpe.decode(ids)
        return self.sep.join(self.words[i] for i in ids)


class Data:
    """Texts to train and to validate on. `train` and `val` are token ids (n,) uint16. A training
    text of seq_len tokens starts at every `stride` tokens; validation texts do not overlap."""
    pretrained = None                                           # a network for the teacher

    def __init__(self, train, val, seq_len, tokenizer, stride=1):
        for name, tokens in ("training", train), ("validation", val):
            if not 0 < seq_len <= len(tokens):
                raise UserError(f"--seq-len {seq_len}: the {name} text has {len(tokens)} tokens; "
                                "a sequence takes 1 to so many, so give more text or another length")
        self.train, self.seq_len, self.stride = train, seq_len, stride
        self.n_train = (len(train) - seq_len) // stride + 1
        n = min(len(val), MAX_VAL_TOKENS) // seq_len
        self.val = torch.from_numpy(val[:n * seq_len].astype(np.int64)).view(n, seq_len)
        self.vocab_size, self.bos_id = tokenizer.vocab_size, tokenizer.bos_id
        self.decode, self.tokenizer = tokenizer.decode, tokenizer.state
        # tells other data from this, so that a run does not go on with them
        digest = hashlib.blake2b(repr((self.tokenizer, stride, len(train))).encode(), digest_size=8)
        digest.update(train)
        digest.update(val)
        self.fingerprint = digest.hexdigest()

    def rows(self, index):
        """Training texts number `index` (n,) -> (n, T) long."""
        starts = np.asarray(index)[:, None] * self.stride
        tokens = self.train[starts + np.arange(self.seq_len)]
        return torch.from_numpy(tokens.astype(np.int64))

    def judge(self, x):
        """entropy: of the counts of tokens in a text, in nats; the mean over texts x (N, T)"""
        total = 0.0
        for text in x.cpu():
            share = text.unique(return_counts=True)[1] / len(text)
            total += torch.special.entr(share).sum().item()
        return dict(entropy=total / len(x))

    def show(self, x):
        """Texts (n, T) as they are printed."""
        return "\n\n".join(self.decode(text) for text in x)


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
NAMES = SLOTS["city"] + SLOTS["town"]           # equally likely


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


class Cities(Data):
    """Sentences of the grammar above, every choice uniform, filled up with END to seq_len."""

    def __init__(self, seq_len):
        if seq_len < 19:
            raise UserError(f"--seq-len {seq_len}: must be 19 or more, as the toy sentences have "
                            "up to 18 words")
        choose, rows = random.Random(0).choice, []
        for _ in range(52_000):
            words = choose(SENTENCES).format(**{k: choose(v) for k, v in SLOTS.items()}).split()
            rows.append(words + [END] * (seq_len - len(words)))
        words = sorted(set().union(*rows) - {END}) + [END]
        tokenizer = Tokenizer(words, " ")
        tokens = np.array([[tokenizer.ids[word] for word in row] for row in rows], dtype=np.uint16)
        super().__init__(tokens[:-2000].ravel(), tokens[-2000:].ravel(), seq_len, tokenizer, seq_len)

    def judge(self, x):
        """valid: share of the texts x (N, T) that the grammar allows;  wrong_names: share of names
        of two words, like Los Angeles, that are none;  tv: total variation between the names and
        their true distribution, 0 to 1"""
        sentences = [self.decode(text) for text in x]
        patterns = [sentence_pattern(template) for template in SENTENCES]
        valid = sum(any(p.fullmatch(sentence) for p in patterns) for sentence in sentences)
        counts, n_wrong = dict.fromkeys(NAMES, 0), 0
        for first, second in itertools.chain(*map(itertools.pairwise, map(str.split, sentences))):
            name = f"{first} {second}"
            if name in counts:
                counts[name] += 1
            elif any(known.startswith(first + " ") for known in NAMES):
                n_wrong += 1
        n = max(1, sum(counts.values()) + n_wrong)
        distance = sum(abs(count / n - 1 / len(NAMES)) for count in counts.values()) + n_wrong / n
        return dict(valid=valid / len(x), wrong_names=n_wrong / n, tv=distance / 2)

    def show(self, x):
        return "\n".join(self.decode(text).split(" " + END)[0] for text in x)


# -----------------------------------------------------------------------------
# Running text: files or the hub -> token ids on disk, made once and mapped into memory
# Where running text comes from when no --train-files are given: arguments of load_dataset. These
# copies are parquet; those under the bare names are scripts, which `datasets` refuses.
HUB = {"tinystories": {"train": dict(path="roneneldan/TinyStories", split="train"),
                       "val": dict(path="roneneldan/TinyStories", split="validation")},
       "lm1b": {"train": dict(path="dvruette/lm1b", split="train"),
                "val": dict(path="dvruette/lm1b", split="test")},
       "owt": {"train": dict(path="Skylion007/openwebtext", split="train")}}
CACHE = ".cache"                # folder of the tokenised texts, which no glob like '**/*' matches
PIECE = 2**14                   # longest piece of text, in characters, that is tokenised at once
MAX_VAL_TOKENS = 10_000_000     # so many are enough, of a large text

# LM1B's text is torn apart: " he didn 't pay £ 5 , " she said . These rules join it, one after the
# other. As MDLM's detokenizer they undo contractions, quotes, brackets, web addresses and " / ".
# What opens a quote follows a space, not a tab: so an unclosed one is searched for but once.
OPENS = r"(?:(?<!s ')|(?<=\b[iau]s ')|(?<='s ')|(?<=\b(?:was|has|his|its) ')|(?<=\bsays '))"
TORN = [(re.compile(pattern), whole) for pattern, whole in [
    (r" : / / ", "://"),
    (r" / ", "/"),
    (r" @ (?=\w+\.[a-z])", "@"),
    (r" : (?<=\d : )(?=\d\d\b)", ":"),                          # 9 : 30
    (r'^([^"]*[,.!?]) "(?= [a-z])', r'\1"'),                    # begun before: it ends , " he said
    (r'"(?<![^ \n]") (.+?) "(?!\S)', r'"\1"'),                  # then quotes open and close in turn
    (r' "$', '"'),
    (r'"(?<!\S") (?=\S)', '"'),
    (r" '(?=(?:t|s|re|ve|m|ll|d|T|S)\b(?!'))", "'"),            # don 't, Anna 's
    (r" ' (?<=\. ' )(?=s\b)", "'"),                             # L.A. ' s
    (r" '(?<=\b[b-hj-zB-HJ-Z] ')(?=\w)(?!\w+')", "'"),          # O 'Brien, six o 'clock
    (r"(?<!\S)' (?=\d\d(?:s\b|(?!\S)))", "'"),                  # the ' 70s, in ' 96
    (r"'(?<![^ \n]')" + OPENS + r" (.+?) '(?!\S)", r"'\1'"),    # a ' quoted ' word
    (r" '(?<=\w ')(?!\S)", "'"),                                # the players ' union
    (r" ([.,!?;:%)\]}]+)(?=[\"']?(?!\S))", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r"([$£€#]) (?=[\d.(])", r"\1"),
]]


def detokenize(text):
    """A sentence of LM1B as people write it. Text that is not torn apart stays as it is."""
    for pattern, whole in TORN:
        text = pattern.sub(whole, text)
    return text


# The formats of files by their endings; .gz may follow, but not on parquet. Others are refused.
FORMATS = {"": "text", ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json",
           ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
NO_TEXT = re.compile("[\0\ud800-\udfff]")       # binary data, half a letter
# What ends a document within a text, with the line ends around it. At the end of what is read so
# far it waits: a line end may follow.
JOINT = "\n<|endoftext|>\n"
ENDS = re.compile(r"\n?<\|endoftext\|>(?!\Z)\n?")


def cause(error):
    """What a library says, in brackets and on one line."""
    return " ".join(f"({type(error).__name__}: {str(error):.200})".split())


def file_format(path):
    """Format of a file: "json", "parquet", "text" or None."""
    name = path.lower().removesuffix(".gz")
    ending = re.search(r"\.[a-z]\w*$", name)                    # news.en-00001-of-00100 has none
    kind = FORMATS.get(ending[0] if ending else "")
    return None if path.lower().endswith(".parquet.gz") else kind


def find_files(flag, pattern):
    """The files of a glob, or of that name: {identity: path}, so a file with two names is one.
    UserError for none, or for a format not known."""
    pattern = os.path.expanduser(pattern)                       # in quotes the shell leaves the ~
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = {}
    for path in sorted(filter(os.path.isfile, matches)):
        if not file_format(path):
            raise UserError(f"{flag} {path}: no known ending; text ends in .txt, .md or nothing, "
                            "rows in .jsonl, .json or .parquet, packed text or .jsonl in .gz")
        stat = os.stat(path)
        files.setdefault((stat.st_dev, stat.st_ino), path)
    if not files:
        raise UserError(f"{flag} {pattern}: no file matches; check the path, and quote a glob like "
                        "'texts/*.txt' (of a folder take 'folder/*')")
    return files


def read_rows(source, by_line):
    """The texts of a source, see read_pieces: the field or column "text" of its rows and nothing
    else of them, or the lines of a text file (by_line), or the whole in strings of PIECE // 2."""
    if isinstance(source, str) and file_format(source) == "parquet":
        source = dict(path="parquet", data_files=glob.escape(source), split="train")
    if isinstance(source, dict):
        from datasets import load_dataset, logging
        logging.set_verbosity(logging.CRITICAL)                 # our own message says it all
        for row in load_dataset(**source, columns=["text"], streaming=True):
            yield row["text"]
        return
    opened = gzip.open if source.lower().endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8-sig") as lines:
        if file_format(source) == "json":  # datasets would insist on the types of other fields
            yield from (json.loads(line)["text"] for line in lines if line.strip())
        elif by_line:
            yield from lines
        else:
            yield from iter(lambda: lines.read(PIECE // 2), "")


def read_pieces(source, by_line):
    """The text of a file, a path, or of the hub, a dict as in HUB; streamed, not stored.

    Yields pieces of documents, and None at the end of each. A document is a row of a .parquet or
    .jsonl file, of any other file a line (by_line) or the whole; <|endoftext|> ends one, too.
    """
    is_hub = isinstance(source, dict)
    is_whole = not by_line and not is_hub and file_format(source) == "text"
    number, rest, is_open = 1, "", False                        # is_open: a piece of it is out
    try:
        for text in itertools.chain(read_rows(source, by_line), [JOINT]):
            if not isinstance(text, str) or NO_TEXT.search(text):
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
            raise UserError(f"{source['path']} cannot be fetched from the Hugging Face hub "
                            f"{cause(e)}: name a copy on disk with --train-files and --val-files "
                            "(text, .jsonl or .parquet)") from e
        raise UserError(f"{source}: cannot be read at or after row {number} {cause(e)}: text is "
                        "UTF-8, a row of JSON an object with a field \"text\"; mend or remove that "
                        "row, or leave the file out") from e


def write_tokens(file, pieces, tokenizer, limit):
    """Write the token ids of pieces to an open file, as uint16: `limit` at most, few in memory."""
    end = [tokenizer.bos_id] if tokenizer.words is None else tokenizer.encode("\n")
    bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=None)
    while limit > 0 and (batch := list(itertools.islice(pieces, 512))):
        texts = iter(tokenizer.encode_batch([p for p in batch if p is not None]))
        ids = []
        for piece in batch:
            ids += end if piece is None else next(texts)
        ids = ids[:limit]
        file.write(np.array(ids, dtype=np.uint16).tobytes())
        limit -= len(ids)
        bar.update(len(ids))
    bar.close()


def identity(source):
    """What tells one source from another: of a file its format and a hash of all its bytes, since
    one that was rewritten may have the old name, size and time."""
    if isinstance(source, dict):
        return source
    digest = hashlib.blake2b(digest_size=16)
    with open(source, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return file_format(source), source.lower().endswith(".gz"), digest.hexdigest()


def load_tokens(sources, tokenizer, limit, by_line):
    """Token ids (n,) uint16 of texts, at most `limit`, and their tokenizer; None makes one of the
    letters. They stand in a file of CACHE after a line with the tokenizer. Where it is missing, one
    process writes it, and others that need it wait."""
    key = [identity(source) for source in sources], tokenizer and tokenizer.state
    key = repr((key, limit, by_line, TORN, ENDS))
    path = os.path.join(CACHE, hashlib.blake2b(key.encode(), digest_size=8).hexdigest())

    def pieces():
        return itertools.chain.from_iterable(read_pieces(source, by_line) for source in sources)

    def write(temporary, tokenizer):
        if tokenizer is None:
            letters, n_left = {"\n"}, max(limit, 2**24)         # a short trial has all letters
            for piece in itertools.takewhile(lambda _: n_left > 0, pieces()):
                letters.update(piece or "")
                n_left -= len(piece or "")
            tokenizer = Tokenizer(sorted(letters))
        head = json.dumps(tokenizer.state)
        with open(temporary, "wb") as f:
            f.write((head + " " * (len(head) % 2 == 0) + "\n").encode())        # ids at even places
            write_tokens(f, pieces(), tokenizer, limit)
        os.replace(temporary, path)

    if not os.path.exists(path):
        os.makedirs(CACHE, exist_ok=True)
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")      # even where locks do not work
        with FileLock(path + ".lock"):
            try:
                if not os.path.exists(path):
                    write(temporary, tokenizer)
            finally:
                temporary.unlink(missing_ok=True)
    with open(path, "rb") as f:
        tokenizer = Tokenizer(**json.loads(f.readline()))
        return np.memmap(path, np.uint16, "r")[f.tell() // 2:], tokenizer


def load_text(cfg):
    """Running text from files or, for the datasets of HUB, from there; through the token cache."""
    size = re.fullmatch(r"gpt2(?:-(\d{3,5}))?|char", cfg.tokenizer)
    if not size or not 257 <= int(size[1] or 257) <= 50257:
        raise UserError(f"--tokenizer {cfg.tokenizer}: must be char, gpt2, or gpt2-N with N from "
                        "257 to 50257")
    tokenizer = None if cfg.tokenizer == "char" else Tokenizer(size=int(size[1] or 50257))
    pretrained = None
    if cfg.teacher:
        pretrained = load_pretrained(cfg.teacher, tokenizer, cfg.seq_len)
        if cfg.init_from == "teacher":
            print(f"note: {cfg.teacher} has another shape than the students, so they begin from "
                  "scratch", file=sys.stderr)
            cfg.init_from = "scratch"
        cfg.teacher_steps = 0
    hub = HUB.get(cfg.dataset, {})
    train, val = ([hub[part]] if part in hub else [] for part in ("train", "val"))
    if cfg.train_files:
        held_out = find_files("--val-files", cfg.val_files) if cfg.val_files else {}
        files = find_files("--train-files", cfg.train_files)
        train = [path for key, path in files.items() if key not in held_out]
        val = list(held_out.values())
    if not train or (cfg.val_files and not cfg.train_files):
        raise UserError(f"--dataset {cfg.dataset} needs --train-files, a file or a quoted glob "
                        "like 'texts/*.txt', of which --val-files may name some but not all")
    limit, by_line = cfg.max_tokens or 2**62, cfg.dataset == "lm1b"
    if val:
        train, tokenizer = load_tokens(train, tokenizer, limit, by_line)
        val, _ = load_tokens(val, tokenizer, min(limit, MAX_VAL_TOKENS), by_line)
    else:
        tokens, tokenizer = load_tokens(train, tokenizer, limit * 10 // 9 + 1, by_line)
        start = len(tokens) - min(len(tokens) // 10, MAX_VAL_TOKENS)
        train, val = tokens[:start], tokens[start:]
    data = Data(train[:limit], val, cfg.seq_len, tokenizer)
    data.pretrained = pretrained
    return data


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
    layers = ()                                                 # none that torch.compile knows

    def __init__(self, model):
        super().__init__()
        self.body, self.head = model.base_model, model.get_output_embeddings()
        names = inspect.signature(self.body.forward).parameters
        self.cache = "cache" if "cache" in names else "past_key_values"    # its name before 5.24

    def embed(self, ids):
        return ids

    def forward(self, ids, pos=None, attend=None):
        """Hidden states (B, T, C) of ids (B, T). With a dict as `attend`, a KVCache, the library's
        own cache stands in it; its length gives the positions."""
        if attend is None:
            return self.body(ids, use_cache=False).last_hidden_state
        out = self.body(ids, use_cache=True, **{self.cache: attend.get(self)})
        attend[self] = out[self.cache]
        return out.last_hidden_state

    def nll(self, logits, x0):
        return F.cross_entropy(logits.float(), x0, reduction="none")


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
    model, words = load_transformers(name, "--teacher", "none: then one is trained")
    probe = "The teacher's tokens, 12.5 of them;\n\n  naïve?"
    size = tokenizer.vocab_size if tokenizer else "its letters"
    if size != model.config.vocab_size or words.encode(probe) != tokenizer.encode(probe):
        raise UserError(f"--teacher {name}: its tokenizer ({model.config.vocab_size} tokens) is "
                        f"not the one here ({size}); gpt2 models go with --tokenizer gpt2")
    longest = getattr(model.config, "max_position_embeddings", seq_len)
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: --teacher {name} reads at most {longest} tokens")
    return Pretrained(model)
