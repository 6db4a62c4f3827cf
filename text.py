"""Text for gumbel_distill.py: toy sentences, files, the hub, and GPT-2's tokens and models.

A running text is tokenised once, on all cores and in bounded memory, into a file of uint16 under
data/ that later runs map into memory. Beside the method, hence beside the file that shows it.
"""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import random
import re

import numpy as np
import torch.nn as nn
from tqdm import tqdm

from gumbel_distill import END, Data, Teacher, Tokenizer, UserError, flag, total_variation
from gumbel_distill import tv_exact_sampler


# -----------------------------------------------------------------------------
# Toy sentences

# The grammar of `cities`. A slot is one phrase of its list; a slot that returns is the same phrase.
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
        rows.append(tokenizer.encode(" ".join(words + [END] * (cfg.seq_len - len(words)))))
    tokens = np.concatenate(rows)
    return Data(tokens[:-2000 * cfg.seq_len], tokens[-2000 * cfg.seq_len:], cfg.seq_len, tokenizer,
                stride=cfg.seq_len, judge=judge)


# -----------------------------------------------------------------------------
# Running text: files or the hub -> token ids on disk

# Where running text comes from when no --train-files are given: (name, split) on the Hugging Face
# hub. These copies are parquet; those under the bare names are scripts, which `datasets` refuses.
HUB = {"lm1b": {"train": ("dvruette/lm1b", "train"), "val": ("dvruette/lm1b", "test")},
       "owt": {"train": ("Skylion007/openwebtext", "train")}}
CACHE = "data"                  # folder of the tokenised texts
PIECE = 2**16                   # longest piece of text, in characters, that is tokenised at once
MAX_VAL_DOCUMENTS = 100_000     # OpenWebText's customary validation part


def detokenize(text):
    """LM1B's " ," " 's" " n't" "( " and the like as people write them."""
    text = re.sub(r"\s+(n't|'(?:s|re|ve|ll|d|m))\b", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+([.,!?;:%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£€#])\s+", r"\1", text)
    return re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text)  # quotes open and close in turn


def document(text):
    """A document as a list of pieces, with None for its end; blank ones are left out."""
    if not isinstance(text, str) or "\0" in text:
        raise ValueError("no text" if text is None else "not text but binary data or numbers")
    pieces = [text[i:i + PIECE] for i in range(0, len(text), PIECE)]
    return pieces + [None] if text.strip() else []


def read_file(path, by_line):
    """The pieces of all documents of a file.

    A document is a row of a .parquet or a line of a .jsonl file (column or field "text"), and of
    any other file a line (by_line) or the whole.
    """
    place = "its beginning"
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=["text"])
            for number, batch in enumerate(batches):
                place = f"rows from {1000 * number + 1}"
                for text in batch.column("text").to_pylist():
                    yield from document(text)
            return
        with open(path, encoding="utf-8") as f:
            is_json = path.endswith(".jsonl")
            if is_json or by_line:
                for number, line in enumerate(f, 1):
                    place = f"line {number}"
                    yield from document(json.loads(line)["text"] if is_json else line.strip())
            else:
                for lines in iter(lambda: f.readlines(PIECE), []):
                    yield from document("".join(lines))[:-1]
                yield None
    except (ValueError, KeyError, TypeError, OSError) as e:  # pyarrow's errors are among these
        raise UserError(f"{path}, {place}: cannot be read ({type(e).__name__}: {e}); mend or "
                        "remove it, or leave the file out") from e


def read_hub(name, split):
    """The pieces of all documents of a dataset on the Hugging Face hub; streamed, not stored."""
    import datasets
    try:
        for row in datasets.load_dataset(name, split=split, streaming=True):
            yield from document(row["text"])
    except Exception as e:  # offline, renamed, rate limit: many types
        raise UserError(f"{name} cannot be fetched from the Hugging Face hub ({type(e).__name__}); "
                        "name a copy on disk with --train-files and --val-files (text, .jsonl or "
                        ".parquet)") from e


def write_tokens(file, pieces, tokenizer, limit, where):
    """Append the token ids of pieces to an open file, as uint16, in bounded memory.

    Returns: their number, at most `limit`; and where the validation part begins if it has to be cut
    off here: the last 10 % from the start of a document, or the last MAX_VAL_DOCUMENTS if fewer
    """
    total, starts = 0, collections.deque(maxlen=MAX_VAL_DOCUMENTS + 1)
    bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=None)
    while total < limit and (batch := list(itertools.islice(pieces, 1024))):
        texts = iter(tokenizer.encode_batch([p for p in batch if p is not None], where))
        for piece in batch:
            ids = tokenizer.eos_ids if piece is None else next(texts)
            file.write(np.array(ids[:limit - total], dtype=np.uint16).tobytes())
            total += min(len(ids), limit - total)
            if piece is None:
                starts.append(total)
        bar.update(total - bar.n)
    bar.close()
    return total, min((s for s in starts if 0.9 * total <= s < total), default=int(0.9 * total))


def read_cache(path):
    """What a token cache says of itself at its end; {} if it is cut off or something else."""
    try:
        with open(path, "rb") as f:
            f.seek(-8, os.SEEK_END)
            size = int.from_bytes(f.read(), "little")
            f.seek(-8 - size, os.SEEK_END)
            info = json.loads(f.read(size))
        return info if 2 * info["n_tokens"] + size + 8 == os.path.getsize(path) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def load_tokens(cfg, name, source, tokenizer, limit):
    """Token ids of a text, 1-D uint16 on disk, from the cache or written there.

    source: paths of files, or (name, split) on the hub;  tokenizer: None makes one of characters
    Returns: tokens, the tokenizer, and where a validation part would begin
    """
    is_hub = isinstance(source, tuple)
    state = source if is_hub else [(p, os.path.getsize(p), os.stat(p).st_mtime_ns) for p in source]
    key = repr((cfg.dataset, state, tokenizer and tokenizer.state, limit))
    digest = hashlib.sha1(key.encode()).hexdigest()[:12]
    path = os.path.join(CACHE, f"{cfg.dataset}-{name}-{digest}.bin")
    info = read_cache(path)

    def pieces():
        by_line = cfg.dataset == "lm1b"
        texts = read_hub(*source) if is_hub else itertools.chain.from_iterable(
            read_file(p, by_line) for p in source)
        return (detokenize(t) if t and by_line else t for t in texts)

    if info.get("key") != key:
        if tokenizer is None:
            letters = {"\n"}.union(*(piece for piece in pieces() if piece))
            tokenizer = Tokenizer(sorted(letters))
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            os.makedirs(CACHE, exist_ok=True)
            with open(temporary, "wb") as f:
                n_tokens, val_start = write_tokens(f, pieces(), tokenizer, limit,
                                                   f"--{name}-files")
                info = dict(key=key, n_tokens=n_tokens, val_start=val_start,
                            tokenizer=tokenizer.state)
                footer = json.dumps(info).encode()
                f.write(footer + len(footer).to_bytes(8, "little"))
            os.replace(temporary, path)
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}); make room, or start in "
                            "another folder") from e
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)
    tokens = np.memmap(path, np.uint16, "r", shape=(info["n_tokens"] or 1,))[:info["n_tokens"]]
    return tokens, Tokenizer(**info["tokenizer"]), info["val_start"]


def find_files(name, pattern):
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not paths:
        raise UserError(f"{flag(name)} {pattern}: no file matches; check the path, and quote a "
                        "glob like 'texts/*.txt' (of a folder take 'folder/*')")
    return paths


def load_text(cfg):
    """Running text from files, or for lm1b and owt from the hub, through the token cache."""
    hub = HUB.get(cfg.dataset, {})
    if cfg.train_files:
        val = find_files("val_files", cfg.val_files) if cfg.val_files else []
        train = [p for p in find_files("train_files", cfg.train_files) if p not in val]
    else:
        train, val = hub.get("train"), hub.get("val")
    if not train or (cfg.val_files and not cfg.train_files):
        raise UserError(f"--dataset {cfg.dataset} needs --train-files, a file or a quoted glob "
                        "like 'texts/*.txt', of which --val-files may name some")
    tokenizer = None
    if cfg.tokenizer != "char":  # "gpt2", or "gpt2-4096" and the like
        tokenizer = Tokenizer(size=int(cfg.tokenizer[5:] or 50257))
    limit = cfg.max_tokens or 2**62
    if not val:
        tokens, tokenizer, start = load_tokens(cfg, "train", train, tokenizer, limit * 10 // 9 + 1)
        return Data(tokens[:start][:cfg.max_tokens], tokens[start:], cfg.seq_len, tokenizer)
    train, tokenizer, _ = load_tokens(cfg, "train", train, tokenizer, limit)
    val, _, _ = load_tokens(cfg, "val", val, tokenizer, limit)
    return Data(train, val, cfg.seq_len, tokenizer)


# -----------------------------------------------------------------------------
# GPT-2: its tokens, and models of transformers as teachers and judges

def load_gpt2_bpe(size):
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever the download layer raises
        raise UserError(f"GPT-2's tokenizer files cannot be fetched ({type(e).__name__}); without "
                        "a network set TIKTOKEN_CACHE_DIR to a folder that holds them, or use "
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

    def embed(self, ids):
        return ids

    def forward(self, ids, cache=None):
        past = cache.kv.get("pretrained") if cache else None
        out = self.body(ids, past_key_values=past, use_cache=cache is not None)
        if cache:
            cache.kv["pretrained"] = out.past_key_values
        return out.last_hidden_state


def load_transformers(name, what, cure):
    """A causal language model of transformers and its tokenizer, by hub name or from a folder.

    Raises: UserError that names the flag `what` and the `cure`
    """
    try:
        import transformers
        return (transformers.AutoModelForCausalLM.from_pretrained(name).eval(),
                transformers.AutoTokenizer.from_pretrained(name))
    except ImportError as e:
        raise UserError(f"{what} {name} needs transformers: pip install -e \".[hf]\"; or give "
                        f"{cure}") from e
    except Exception as e:  # offline, no such name, foreign folder: many types
        raise UserError(f"{what} {name}: cannot be loaded ({type(e).__name__}); with no network "
                        f"give a local folder with a model and its tokenizer, or {cure}") from e


def load_pretrained(name, tokenizer, seq_len):
    """A causal language model of transformers as Teacher; it must have the tokenizer here."""
    model, words = load_transformers(name, "--teacher", "a .pt checkpoint of this program")
    sizes = model.config.vocab_size, tokenizer.vocab_size
    probe = "The teacher's tokens, 12.5 of them;\n\n  naïve?"
    if sizes[0] != sizes[1] or words.encode(probe) != tokenizer.encode(probe).tolist():
        raise UserError(f"--teacher {name}: its tokenizer ({sizes[0]} tokens) is not the one here "
                        f"({sizes[1]} tokens); gpt2 models go with --tokenizer gpt2")
    longest = getattr(model.config, "max_position_embeddings", seq_len)
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: --teacher {name} reads at most {longest} tokens")
    return Teacher(None, tokenizer, Pretrained(model)).requires_grad_(False)
