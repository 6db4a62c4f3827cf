"""Data for gumbel_distill.py: toy sentences, text files, the hub; GPT-2's tokens and models.

    python gumbel_distill.py --dataset text --train-files 'texts/*.txt'
    python gumbel_distill.py --dataset lm1b --help                     # with its own defaults
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
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

UserError = SystemExit              # what a user can mend: Python prints its message, no traceback

# --- Settings: what differs from the defaults of gumbel_distill.Config ----------------------------
CITIES = dict(seq_len=19, lr=2e-3, nfe=(1, 2, 4, 19), n_samples=1000)
TEXT = dict(seq_len=64, n_head=4, n_embd=128, batch_size=32, lr=2e-3, t_min=0.1,
            init_from="teacher", nfe=(1, 4, 16, 64), n_samples=200, block_size=4)
WEB = dict(TEXT, tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, dropout=0.1, lr=3e-4,
           warmup=2500, ema=0.9999, eval_every=1000, teacher_steps=20_000, max_steps=20_000)
PRESETS = {
    "cities": dict(CITIES, teacher_steps=2000, max_steps=4000),
    "text": dict(TEXT, teacher_steps=1500, max_steps=1500),
    "tinystories": dict(TEXT, tokenizer="gpt2-1024", teacher_steps=2000, max_steps=4000),
    "lm1b": dict(WEB, seq_len=128, batch_size=256, nfe=(1, 4, 16, 32, 128), n_samples=256),
    "owt": dict(WEB, seq_len=1024, batch_size=32, nfe=(16, 128, 512), n_samples=32),
}
# Settings of running text alone. In a checkpoint the fingerprint of the Data stands for them.
TEXT_OPTIONS = [
    ("train_files", str, "", "text, .jsonl, .parquet: a file or a quoted glob; without it the hub"),
    ("val_files", str, "", "to validate on, left out of training; without it the last 10%% are"),
    ("tokenizer", str, "char", "char, gpt2, or gpt2-N: N - 1 tokens of GPT-2 and <|endoftext|>"),
    ("max_tokens", int, 0, "use at most this many training tokens; 0: all"),
    ("teacher", str, "", "a model of transformers, name or folder; without it one is trained"),
]


def config_of(dataset, config):
    """The settings of a data set, a subclass of the dataclass `config`: their load() gives Data."""
    if dataset not in PRESETS:
        raise UserError(f"--dataset {dataset}: choose from maze {' '.join(PRESETS)}")
    is_text = dataset != "cities"
    fields = [(f.name, f.type, f.default, f.metadata) for f in dataclasses.fields(config)]
    for *field, help in TEXT_OPTIONS if is_text else ():
        fields.append((*field, dict(of="run", how=dict(help=help))))
    preset = dict(PRESETS[dataset], dataset=dataset)
    fields = [(name, kind, dataclasses.field(default=preset.get(name, default), metadata=how))
              for name, kind, default, how in fields]
    space = {"load": load_text if is_text else load_cities}
    return dataclasses.make_dataclass("Config", fields, bases=(config,), namespace=space)


# --- Tokens ---------------------------------------------------------------------------------------
class Tokenizer:
    """A list of words joined by `sep` or, with words None, the first `size` tokens of GPT-2's BPE.
    bos_id is what the teacher puts in front: <|endoftext|> of GPT-2, else vocab_size, an input row
    of its own; `end` is written after a document. Tokenizer(**state) makes it anew."""
    def __init__(self, words=None, sep="", size=50257):
        self.words, self.sep = words, sep
        self.state = dict(words=words, sep=sep, size=size)
        if words is None:
            self.bpe = load_gpt2_bpe(size)
            self.vocab_size = size + -size % 64                 # whole rows are fast on a card
            self.bos_id, self.end = self.bpe.eot_token, "<|endoftext|>"
        else:
            self.ids = {word: i for i, word in enumerate(words)}
            self.vocab_size, self.bos_id, self.end = len(words), len(words), "\n"

    def encode(self, text):
        """Token ids of a text, a list. What was printed reads back, <|endoftext|> of GPT-2, too."""
        if self.words is None:
            return self.bpe.encode(text, allowed_special="all")
        words = text.split() if self.sep else text
        for word in set(words) - self.ids.keys():
            raise UserError(f"{word!r} is in no training text: leave it out, or train on such text")
        return [self.ids[word] for word in words]

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if self.words is None:
            return self.bpe.decode([i for i in ids if i < self.bpe.n_vocab])
        return self.sep.join(self.words[i] for i in ids)


def load_gpt2_bpe(size):
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever the download layer raises
        raise UserError(f"GPT-2's tokens cannot be fetched ({e!r:.200}); set TIKTOKEN_CACHE_DIR to "
                        "a folder that has them, or use --tokenizer char") from e
    ranks = {token: rank for token, rank in bpe._mergeable_ranks.items() if rank < size - 1}
    return tiktoken.Encoding(f"gpt2-{size}", pat_str=bpe._pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": size - 1})


class Data:
    """Texts to train and to validate on. train and val are token ids (n,) uint16. A training text
    of seq_len tokens starts at every `stride` tokens; validation texts do not overlap."""
    def __init__(self, train, val, seq_len, tokenizer, stride=1, pretrained=None):
        for name, tokens in ("training", train), ("validation", val):
            if not 0 < seq_len <= len(tokens):
                raise UserError(f"--seq-len {seq_len}: the {name} text has {len(tokens)} tokens; a "
                                "sequence has 1 to all of these")
        self.train, self.seq_len, self.stride = train, seq_len, stride
        self.pretrained = pretrained                            # None, or a net for the teacher
        self.n_train = (len(train) - seq_len) // stride + 1
        n = min(len(val), MAX_VAL_TOKENS) // seq_len
        self.val = torch.from_numpy(val[:n * seq_len].astype(np.int64)).view(n, seq_len)
        self.vocab_size, self.bos_id = tokenizer.vocab_size, tokenizer.bos_id
        self.decode, self.tokenizer = tokenizer.decode, tokenizer.state
        about = repr((self.tokenizer, stride, len(train))).encode()
        self.fingerprint = hash_of([about, train, val])         # tells other data from this

    def rows(self, index):
        """Training texts number `index` (n,) -> (n, T) long."""
        places = np.asarray(index)[:, None] * self.stride + np.arange(self.seq_len)
        return torch.from_numpy(self.train[places].astype(np.int64))

    def judge(self, x):
        """entropy: of the counts of tokens in a text, in nats; the mean over texts x (N, T)"""
        shares = [text.unique(return_counts=True)[1] / len(text) for text in x]
        return dict(entropy=sum(torch.special.entr(p).sum().item() for p in shares) / len(x))

    def show(self, x):
        return "\n\n".join(self.decode(text) for text in x)


def hash_of(parts):
    """A hash of bytes, arrays or the lines of a file, one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# --- Toy sentences: a grammar whose every choice is uniform ---------------------------------------
END = "<end>"                   # fills a short sentence up
# A slot takes one phrase of its list, a repeated slot the same phrase.
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
NAMES = SLOTS["city"] + SLOTS["town"]
# The regular expressions of these sentences, and of no others
PATTERNS = [f"{sentence}( {END})+" for sentence in SENTENCES]
for slot, phrases in SLOTS.items():
    mark, first, again = f"{{{slot}}}", f"(?P<{slot}>{'|'.join(phrases)})", f"(?P={slot})"
    PATTERNS = [p.replace(mark, first, 1).replace(mark, again) for p in PATTERNS]


class Cities(Data):
    """Sentences of the grammar, filled up with END to seq_len, and judged by the grammar."""
    def judge(self, x):
        """valid: share of the texts x (N, T) that the grammar allows;  wrong_names: share of names
        like Los York;  tv: total variation between the names and the true ones, 0 to 1"""
        texts = [self.decode(text) for text in x.tolist()]
        valid = sum(any(re.fullmatch(p, text) for p in PATTERNS) for text in texts)
        first_words = "|".join({name.split()[0] for name in NAMES})
        found = re.findall(rf"\b(?=((?:{first_words}) \S+))", "\n".join(texts))
        counts, n = [found.count(name) for name in NAMES], max(1, len(found))
        wrong = (len(found) - sum(counts)) / n
        distance = sum(abs(count / n - 1 / len(NAMES)) for count in counts) + wrong
        return dict(valid=valid / len(x), wrong_names=wrong, tv=distance / 2)

    def show(self, x):
        return "\n".join(self.decode(text).split(" " + END)[0] for text in x.tolist())


def load_cities(cfg):
    if cfg.seq_len < 19:
        raise UserError(f"--seq-len {cfg.seq_len}: must be 19 or more, as sentences have 18 words")
    choose, rows = random.Random(0).choice, []
    for _ in range(52_000):
        words = choose(SENTENCES).format(**{k: choose(v) for k, v in SLOTS.items()}).split()
        rows.append(words + [END] * (cfg.seq_len - len(words)))
    tokenizer = Tokenizer(sorted(set().union(*rows) - {END}) + [END], " ")
    tokens = np.array([[tokenizer.ids[word] for word in row] for row in rows], dtype=np.uint16)
    train, val = tokens[:-2000].ravel(), tokens[-2000:].ravel()
    return Cities(train, val, cfg.seq_len, tokenizer, stride=cfg.seq_len)


# --- Running text: files or the hub -> token ids on disk, made once and mapped into memory --------
# Where running text comes from when no --train-files are given: a name on the Hugging Face hub, and
# its splits. These copies are parquet; the bare names are scripts, which `datasets` refuses.
HUB = {"tinystories": ("roneneldan/TinyStories", "train", "validation"),
       "lm1b": ("dvruette/lm1b", "train", "test"), "owt": ("Skylion007/openwebtext", "train")}
CACHE = ".cache"                # folder of the tokenised texts, which no glob like '**/*' matches
PIECE = 2**14                   # longest piece of text, in characters, that is tokenised at once
MAX_VAL_TOKENS = 10_000_000     # of a large text so many are enough
# Endings of files; .gz may follow. Those without an ending are text, others are refused.
ENDINGS = ".txt .text .md .jsonl .json .ndjson .parquet".split()
# What ends a document, with the line ends around it; where the text so far ends, one may follow.
JOINT = "\n<|endoftext|>\n"
ENDS = re.compile(r"\n?<\|endoftext\|>(?!\Z)\n?")
# LM1B's text is torn apart: " he didn 't pay £ 5 , " she said . These rules join it, one after the
# other. As MDLM's detokenizer they undo contractions, quotes, brackets, web addresses and " / ".
# A quote opens after a space and not after a tab, so that the next one closes it: no long search.
OPENS = r"(?:(?<!s ')|(?<=\b[iau]s ')|(?<='s ')|(?<=\b(?:was|has|his|its) ')|(?<=\bsays '))"
TORN = [(re.compile(pattern), whole) for pattern, whole in [
    (r" : / / ", "://"), (r" / ", "/"), (r" @ (?=\w+\.[a-z])", "@"),
    (r" : (?<=\d : )(?=\d\d\b)", ":"),                          # 9 : 30
    (r'^([^"]*[,.!?]) "(?= [a-z])', r'\1"'),                    # begun before: it ends , " he said
    (r'"(?<![^ \n]") (.+?) "(?!\S)', r'"\1"'),                  # then quotes open and close in turn
    (r' "$', '"'), (r'"(?<!\S") (?=\S)', '"'),
    (r" '(?=(?:t|s|re|ve|m|ll|d|T|S)\b(?!'))", "'"),            # don 't, Anna 's
    (r" ' (?<=\. ' )(?=s\b)", "'"),                             # L.A. ' s
    (r" '(?<=\b[b-hj-zB-HJ-Z] ')(?=\w)(?!\w+')", "'"),          # O 'Brien, six o 'clock
    (r"(?<!\S)' (?=\d\d(?:s\b|(?!\S)))", "'"),                  # the ' 70s, in ' 96
    (r"'(?<![^ \n]')" + OPENS + r" (.+?) '(?!\S)", r"'\1'"),    # a ' quoted ' word
    (r" '(?<=\w ')(?!\S)", "'"),                                # the players ' union
    (r" ([.,!?;:%)\]}]+)(?=[\"']?(?!\S))", r"\1"), (r"([(\[{]) ", r"\1"),
    (r"([$£€#]) (?=[\d.(])", r"\1"),
]]


def detokenize(text):
    """A sentence of LM1B as people write it. Text that is not torn apart stays as it is."""
    for pattern, whole in TORN:
        text = pattern.sub(whole, text)
    return text


def find_files(flag, pattern):
    """The files of a glob, or of that name: {identity: path}, so a file with two names is one."""
    pattern = os.path.expanduser(pattern)                       # in quotes the shell leaves the ~
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = {}
    for path in sorted(filter(os.path.isfile, matches)):
        files.setdefault(os.stat(path)[1:3], path)              # inode and device
        ending = re.search(r"\.[a-z]\w*$", path.lower().removesuffix(".gz"))
        if ending and ending[0] not in ENDINGS:                 # news.en-00001-of-00100 has none
            raise UserError(f"{flag} {path}: the ending {ending[0]} is none of {' '.join(ENDINGS)}")
    if not files:
        raise UserError(f"{flag} {pattern}: no file matches; quote a glob like 'texts/*.txt'")
    return files


def read_text(source, by_line):
    """The text of a file or, for (name, split), of the Hugging Face hub: strings, with JOINT after
    a document. A document is a row of .jsonl and .parquet, the field or column "text" and nothing
    else of it; of other files it is a line (by_line, and then detokenised) or the whole."""
    path = source.lower().removesuffix(".gz") if isinstance(source, str) else ""
    if path.endswith(".parquet"):
        source = "parquet", "train", glob.escape(source)
    if isinstance(source, tuple):
        import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)          # our message says it all
        name, split, *files = source
        rows = (row["text"] for row in datasets.load_dataset(
            name, split=split, data_files=files or None, columns=["text"], streaming=True))
    else:
        unpack = gzip.open if source.lower().endswith(".gz") else open
        rows = lines = unpack(source, "rt", encoding="utf-8-sig")
        if path.endswith((".json", ".jsonl", ".ndjson")):  # other fields may have any type
            rows = (json.loads(line)["text"] for line in lines if line.strip())
        elif not by_line:
            yield from iter(lambda: lines.read(PIECE // 2), "")
            rows = [""]
    for row in rows:
        yield (detokenize(row.strip()) if by_line else row) + JOINT


def read_pieces(sources, by_line, end):
    """The pieces of the documents of all sources, and `end` after each document; streamed."""
    for source in sources:
        n_read, rest, is_open = 0, "", False                    # is_open: a piece of it is out
        try:
            for n_read, text in enumerate(read_text(source, by_line), 1):
                if re.search("[\0\ud800-\udfff]", text):
                    raise ValueError("binary data, or half a letter")
                *documents, rest = ENDS.split(rest + text)
                for document in documents:
                    if is_open or document.strip():
                        yield from (document[i:i + PIECE] for i in range(0, len(document), PIECE))
                        yield end
                    is_open = False
                if len(rest) > PIECE // 2:  # keep what may be half a mark
                    yield rest[:-len(JOINT)]
                    rest, is_open = rest[-len(JOINT):], True
        except Exception as e:  # broken files, no network, renamed, rate limit: many types
            raise UserError(f"{source}: cannot be read beyond row or piece {n_read} ({e!r:.200}); "
                            "mend it, or give --train-files others: text in UTF-8, or rows with a "
                            "field \"text\" in .jsonl or .parquet") from e


def load_tokens(sources, tokenizer, limit, by_line):
    """Token ids (n,) uint16, `limit` at most, in a file of CACHE; one process writes it for all."""
    key = [tokenizer.state, limit, by_line, TORN, ENDS]
    for source in sources:
        if isinstance(source, str):  # rewritten, it may have the old size and time: all bytes count
            with open(source, "rb") as file:
                source = os.path.basename(source), hash_of(file)
        key.append(source)
    path = os.path.join(CACHE, hash_of([repr(key).encode()]))
    with FileLock(path + ".lock"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if not os.path.exists(path):
            pieces = read_pieces(sources, by_line, tokenizer.end)
            pieces = iter(tqdm(pieces, "tokenising", unit=" pieces", disable=None))
            with open(f"{folder}/tokens", "wb") as file, ThreadPoolExecutor() as pool:
                while limit > 0 and (batch := list(itertools.islice(pieces, 512))):
                    ids = [i for text in pool.map(tokenizer.encode, batch) for i in text][:limit]
                    file.write(np.array(ids, dtype=np.uint16).tobytes())
                    limit -= len(ids)
            os.replace(f"{folder}/tokens", path)
    return np.memmap(path, np.uint16, "r") if os.path.getsize(path) else np.empty(0, np.uint16)


def load_text(cfg):
    """Running text from files or, for the data sets of HUB, from there; through the token cache."""
    name, *splits = HUB.get(cfg.dataset, [""])
    train, val = ([[(name, split)] for split in splits] + [[], []])[:2]
    if cfg.train_files:
        held_out = find_files("--val-files", cfg.val_files) if cfg.val_files else {}
        files = find_files("--train-files", cfg.train_files)
        train = [path for identity, path in files.items() if identity not in held_out]
        val = list(held_out.values())
    if not train or (cfg.val_files and not cfg.train_files):
        raise UserError(f"--dataset {cfg.dataset} needs --train-files, like 'texts/*.txt'; "
                        "--val-files may name some of them, but not all")
    by_line, pretrained, limit = cfg.dataset == "lm1b", None, min(cfg.max_tokens or 2**60, 2**60)
    size = re.fullmatch(r"gpt2(?:-(\d{3,5}))?", cfg.tokenizer)
    if size and 257 <= int(size[1] or 50257) <= 50257:
        tokenizer = Tokenizer(size=int(size[1] or 50257))
    elif cfg.tokenizer == "char":  # of more pieces than are used, each of which has a token or more
        pieces = itertools.islice(read_pieces(train, by_line, "\n"), 2 * abs(limit) + 2**16)
        tokenizer = Tokenizer(sorted(set(itertools.chain.from_iterable(pieces))))
    else:
        raise UserError(f"--tokenizer {cfg.tokenizer}: must be char, gpt2, or gpt2-257 to -50257")
    if cfg.teacher:
        pretrained = load_pretrained(cfg.teacher, tokenizer, cfg.seq_len)
        if cfg.init_from == "teacher":
            print(f"{cfg.teacher} has another shape than the students: they start from scratch")
            cfg.init_from = "scratch"
        cfg.teacher_steps = 0
    tokens = load_tokens(train, tokenizer, limit * 10 // 9 + 1, by_line)
    if val:
        train, val = tokens, load_tokens(val, tokenizer, min(limit, MAX_VAL_TOKENS), by_line)
    else:
        start = len(tokens) - min(len(tokens) // 10, MAX_VAL_TOKENS)
        train, val = tokens[:start], tokens[start:]
    return Data(train[:limit], val, cfg.seq_len, tokenizer, pretrained=pretrained)


# --- Models of transformers, as teachers and judges -----------------------------------------------
class Pretrained(torch.nn.Module):
    """A causal language model of Hugging Face's transformers with the face of Transformer."""
    nll = staticmethod(functools.partial(torch.nn.functional.cross_entropy, reduction="none"))

    def __init__(self, model, vocab_size):
        super().__init__()
        self.embed, self.body = torch.nn.Identity(), model.base_model
        head = model.get_output_embeddings()
        self.head = torch.nn.Linear(head.in_features, vocab_size).requires_grad_(False)
        self.head.weight.zero_()[:head.out_features] = head.weight.detach()
        self.head.bias.fill_(-1e9)[:head.out_features] = 0      # ids of no text are never drawn
        names = inspect.signature(self.body.forward).parameters
        self.past = "cache" if "cache" in names else "past_key_values"     # its name before 5.24

    def forward(self, ids, pos=None, attend=None):
        """Hidden states (B, T, C) of ids (B, T). `attend`, a KVCache, keeps the library's cache."""
        past = {} if attend is None else {self.past: attend.get(self)}
        out = self.body(ids, use_cache=attend is not None, **past)
        if attend is not None:
            attend[self] = out[self.past]
        return out.last_hidden_state


@functools.cache
def load_transformers(name, flag, cure):
    """A causal language model of transformers and its tokenizer. `flag` gave its name or folder."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(name).float()
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except Exception as e:  # not installed, offline, no such name, foreign folder: many types
        raise UserError(f"{flag} {name}: cannot be loaded ({e!r:.200}); it takes pip install "
                        "transformers and, with no network, a folder with model and tokenizer; "
                        f"or give {cure}") from e


def load_pretrained(name, tokenizer, seq_len):
    """The net of a teacher from transformers; it must have the tokenizer here."""
    model, words = load_transformers(name, "--teacher", "none: then one is trained")
    probe, n_tokens = "The teacher's tokens, 12.5 of them;\n\n  naïve?", model.config.vocab_size
    if n_tokens != tokenizer.state["size"] or words.encode(probe) != tokenizer.encode(probe):
        raise UserError(f"--teacher {name}: its {n_tokens} tokens are not those of --tokenizer; "
                        "gpt2 models go with --tokenizer gpt2")
    longest = getattr(model.config, "max_position_embeddings", seq_len)
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: --teacher {name} reads at most {longest} tokens")
    return Pretrained(model, tokenizer.vocab_size)
