"""Running text for gumbel_distill.py: files or the Hugging Face hub -> token ids on disk.

A text is tokenised once, on all cores and in bounded memory, into a file of uint16 under data/ that
later runs map into memory. Beside the method, hence beside the file that shows it.
"""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re

import numpy as np
from tqdm import tqdm

from gumbel_distill import Data, Tokenizer, UserError, flag

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
                        "glob like 'texts/*.txt'")
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
