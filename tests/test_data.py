"""Data sets, tokenizers, models of transformers.   python -m pytest tests/test_data.py"""

import gzip
import json
import math
import multiprocessing
import os
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

import data
import gumbel_distill as gd

pytestmark = pytest.mark.quick
LM1B = ["She 's sure , quite .", "Prices rose 5 % ."]
CLEAN = ["She's sure, quite.", "Prices rose 5%."]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(dataset="text", **given):
    small = {"seq_len": 8} if dataset == "cities" else {"seq_len": 8, "tokenizer": "char"}
    return data.config_of(dataset, gd.Config)(**{**small, **given}).load()


def text_of(loaded):
    return loaded.decode(loaded.train), loaded.decode(loaded.val.flatten())


def write(path, texts):
    """The same documents as text, one a line, as .jsonl or as .parquet, packed for .gz."""
    path = str(path)
    if ".parquet" in path:
        import pyarrow.parquet
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    if ".jsonl" in path:  # a field that changes its type is none of our business
        texts = [json.dumps({"id": len(text) or "none", "text": text}) for text in texts]
    with (gzip.open if ".gz" in path else open)(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(texts))
    return path


def test_a_data_set_has_its_own_defaults_and_a_text_more_settings():
    cfg = data.config_of("lm1b", gd.Config)()
    assert (cfg.dataset, cfg.seq_len, cfg.tokenizer, cfg.seed) == ("lm1b", 128, "gpt2", 0)
    assert cfg.nfe == [1, 4, 16, 32, 128] and cfg.out_dir == "out/lm1b"
    for dataset in data.PRESETS:  # as flags, too
        cfg = gd.parse(["mdlm"], words=["--dataset", dataset])
        assert cfg.dataset == dataset and hasattr(cfg, "train_files") == (dataset != "cities")


@pytest.mark.parametrize("torn, mended", [
    *zip(LM1B, CLEAN),
    ("I don 't , DON 'T , we 're .", "I don't, DON'T, we're."),
    ("Mr O 'Neill left at six o 'clock .", "Mr O'Neill left at six o'clock."),
    ('He said : " It \'s a \' pro \' . "', 'He said: "It\'s a \'pro\'."'),
    ('It hurt , " he said , " a bit .', 'It hurt," he said, "a bit.'),
    ("It 's ' over ' for its ' old ' players ' union", "It's 'over' for its 'old' players' union"),
    ("the ' 70s ( or so ) [ sic ] of ' 96", "the '70s (or so) [sic] of '96"),
    ("Plan B 'works' and 's' at 100 @ 3.50", "Plan B 'works' and 's' at 100 @ 3.50"),
    ("http : / / a.org / b costs $ 5 , £ 6 and € 7", "http://a.org/b costs $5, £6 and €7"),
    ("me @ a.org by 9 : 30 and / or call", "me@a.org by 9:30 and/or call"),
    ("L.A. ' s team , hitting .279 .", "L.A.'s team, hitting .279."),
])
def test_torn_text_is_mended_and_whole_text_left_alone(torn, mended):
    assert data.detokenize(torn) == data.detokenize(mended) == mended


@pytest.mark.parametrize("unit", ['\t" a', "\t' a", '\xa0" a', '"', "s ' ", '" a'])
def test_a_long_line_is_mended_in_linear_time(unit):
    start = time.process_time()
    data.detokenize(unit * 30_000)
    assert time.process_time() - start < 2                      # a square takes 20 s and more


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz"])
def test_documents_are_the_same_whatever_the_format(ending, tmp_path):
    """A line of LM1B is a document, detokenised; other text files are one, as they stand. There are
    more documents than are tokenised at once. Blank ones are left out. A file whose name looks like
    a pattern is itself read."""
    path = write(tmp_path / f"lm[1]{ending}", LM1B * 300)
    write(tmp_path / f"lm1{ending}", ["another file"])
    lm1b = load("lm1b", seq_len=1, train_files=path)
    assert "".join(text_of(lm1b)) == ("\n".join(CLEAN) + "\n") * 300
    texts = ["  two spaces , and a line\nend ", "naïve\tüber , 's", "", " \n "] * 50
    text = load(seq_len=1, train_files=write(tmp_path / f"a{ending}", texts))
    if "txt" not in ending:
        texts = [document for document in texts if document.strip()]
    assert "".join(text_of(text)) == "\n".join(texts) + "\n"


def test_end_of_text_ends_a_document_wherever_the_pieces_are_cut(tmp_path):
    """The mark stands across the end of what is read at once, at each of its letters."""
    for shift in range(-20, 5):
        first = "x" * (data.PIECE // 2 + shift)
        path = write(tmp_path / f"{shift}.txt", [first, "<|endoftext|>", "second"])
        assert "".join(data.read_pieces([path], False, "#")) == f"{first}#second#"
    path = write(tmp_path / "a.jsonl", ["one<|endoftext|>two"])
    assert list(data.read_pieces([path, path], False, "#")) == ["one", "#", "two", "#"] * 2


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_long_document_is_read_in_pieces_and_none_is_lost(ending, tmp_path):
    letters = "".join(np.random.default_rng(0).choice(list("abc "), 5 * data.PIECE - 20)) + " " * 40
    path = write(tmp_path / f"a{ending}", [letters])
    *pieces, end = data.read_pieces([path], False, "#")
    assert "".join(pieces) == letters and end == "#" and max(map(len, pieces)) <= data.PIECE


def test_the_hub_is_read_as_a_stream(tmp_path, monkeypatch):
    """A local parquet file in place of the hub's: same call, same rows."""
    import datasets
    path, real, calls = write(tmp_path / "a.parquet", LM1B * 50), datasets.load_dataset, []

    def local(name, split, streaming, **how):
        calls.append((name, split, streaming))
        return real("parquet", split="train", streaming=streaming, **dict(how, data_files=path))
    monkeypatch.setattr(datasets, "load_dataset", local)
    lm1b = load("lm1b", max_tokens=100)
    assert set(calls) == {("dvruette/lm1b", "train", True), ("dvruette/lm1b", "test", True)}
    assert len(lm1b.train) == 100 and lm1b.decode(lm1b.train).startswith(CLEAN[0])


@pytest.mark.parametrize("dataset, tokens, path, n, made", [
    ("lm1b", "gpt2", "lm1b/*-00004-of-*", 163_611, "2ca70729eb47cf55"),
    ("text", "char", "tinyshakespeare.txt", 1_003_856, "e2e05026ba194a9f"),
    ("tinystories", "gpt2-1024", "tinystories-1mb.txt", 342_013, "bf959f0567deba1f"),
    ("owt", "gpt2", "openwebtext-800.jsonl", 773_899, "5787da5aad7a2a4d"),
])
def test_real_text_has_the_tokens_that_it_always_had(dataset, tokens, path, n, made, real_data):
    """Models were trained on these."""
    text = load(dataset, tokenizer=tokens, train_files=f"{real_data}/{path}")
    assert (len(text.train), data.hash_of([text.train])) == (n, made)


def test_the_validation_part_is_the_last_tenth_but_bounded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f"document {i:02d}" for i in range(100)])
    assert text_of(load(seq_len=120, train_files=path))[1].split("\n")[0] == "document 90"
    monkeypatch.setattr(data, "MAX_VAL_TOKENS", 24)
    assert text_of(load(seq_len=12, train_files=path))[1] == "document 98\ndocument 99\n"
    small = load(train_files=path, max_tokens=100)
    assert (len(small.train), len(small.val)) == (100, 1)


def test_files_to_validate_on_are_left_out_of_training_and_each_is_read_once(tmp_path):
    """By whatever name: a link, another path."""
    (tmp_path / "folder").mkdir()
    for name in ("abc", "bca", "cab"):
        write(tmp_path / f"{name[0]}.txt", [name])
    os.symlink(tmp_path / "a.txt", tmp_path / "d.txt")
    os.link(tmp_path / "b.txt", tmp_path / "e.txt")
    text = load(seq_len=1, train_files=f"{tmp_path}/*.txt", val_files=f"{tmp_path}/folder/../e.txt")
    assert text_of(text) == ("abc\ncab\n", "bca\n")


def test_training_texts_are_read_at_their_stride_and_validation_texts_do_not_overlap():
    letters = data.Tokenizer(list("abcdefg"))
    tokens = np.arange(20, dtype=np.uint16) % 7
    running, apart = [data.Data(tokens, tokens[:11], 4, letters, stride) for stride in (1, 4)]
    assert (running.n_train, apart.n_train) == (17, 5)
    assert running.rows(torch.tensor([0, 16])).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert apart.rows([1, 4]).tolist() == [[4, 5, 6, 0], [2, 3, 4, 5]]
    assert running.val.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0]] and running.val.dtype == torch.long


def test_the_fingerprint_tells_any_other_data_from_this():
    """Behind the first 2^20 tokens, too; and what was trained on may not validate."""
    letters, n = data.Tokenizer(list("abcdefg")), 2**20 + 100
    train, val = (np.random.default_rng(seed).integers(7, size=n).astype("u2") for seed in (0, 1))
    both, last = np.concatenate([train, val]), (np.arange(n) == n - 1).astype("u2")
    kinds = [(train, val, 4, letters), (train ^ last, val, 4, letters), (val, train, 4, letters),
             (train, val ^ last, 4, letters), (both[:n - 1], both[n - 1:], 4, letters),
             (train, val, 4, data.Tokenizer(list("abcdefh"))), (train, val, 4, letters, 4)]
    found = [data.Data(*kind).fingerprint for kind in [*kinds, kinds[0]]]
    assert len(set(found)) == len(kinds) and found[0] == found[-1]


def test_what_was_printed_reads_back(real_data):
    text = "Grüße, naïve world! <|endoftext|> 12.5 <end> x"
    small, full, letters = data.Tokenizer(size=1024), data.Tokenizer(), data.Tokenizer(sorted(text))
    for tokenizer in (small, full, letters):
        same = data.Tokenizer(**tokenizer.state)
        assert same.decode(torch.tensor(tokenizer.encode(text))) == text
        assert max(tokenizer.encode(text)) < tokenizer.vocab_size
    assert (small.bos_id, full.bos_id, letters.bos_id) == (1023, 50256, len(text))
    assert full.encode("Hello world") == [15496, 995]
    assert small.encode(text).count(1023) == 1                  # the mark is one token
    assert all(small.decode([i]) == full.decode([i]) for i in range(1023))


def n_files(cache):
    return sum(path.suffix != ".lock" for path in cache.glob("*"))


def test_text_is_tokenised_once_and_again_when_a_byte_of_it_changed(tmp_path, cache, monkeypatch):
    """Also where size and time are as before, and the byte is in the midst of a large file. What
    was interrupted leaves nothing."""
    path = write(tmp_path / "a.txt", ["a document"] * 400_000)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(os, "replace", lambda *paths: 1 / 0)
        load(train_files=path)
    assert n_files(cache) == 0
    first, stat = load(train_files=path), os.stat(path)
    assert load(train_files=path).fingerprint == first.fingerprint and n_files(cache) == 1
    with open(path, "r+b") as file:
        file.seek(2_200_000)
        file.write(b"u")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = load(train_files=path)
    assert n_files(cache) == 2 and other.fingerprint != first.fingerprint


def count_tokenising(path, folder):
    data.CACHE, real, n = str(folder), os.replace, []
    os.replace = lambda *paths: n.append(1) or real(*paths)
    return load(train_files=path).fingerprint, len(n)


def test_processes_that_start_together_tokenise_once(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", ["a document"] * 20_000)
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(count_tokenising, [path] * 3, [cache] * 3))
    assert sum(n for _, n in found) == 1 and len({fingerprint for fingerprint, _ in found}) == 1


NAME = "the pilots fly from San Diego to New York on Monday the 7th with Ben and two lamps"
FRIEND = "Anna flies from San Diego to New York on Monday the 7th and Ida follows Anna"


def test_the_grammar_tells_its_sentences_from_broken_ones():
    """By hand: of twenty names two are half of all, or one is and the other half is none."""
    cities = load("cities", seq_len=19)
    scores = cities.judge(cities.val)
    assert scores["valid"] == 1 and scores["wrong_names"] == 0 and scores["tv"] < 0.05
    broken = [NAME.replace(*words.split("/")) for words in
              ("Diego/Angeles", "lamps/lamp", "fly/flies", "7th/8th", " from/", "Ben/Ben Ben")]
    for text in [NAME, FRIEND, FRIEND.replace("follows Anna", "follows Ben"), *broken]:
        ids = data.Tokenizer(**cities.tokenizer).encode(text + " <end>" * (19 - len(text.split())))
        scores, is_wrong = cities.judge(torch.tensor([ids, ids])), "Angeles" in text
        assert scores["valid"] == (text in (NAME, FRIEND)), text
        assert scores["wrong_names"] == (0.5 if is_wrong else 0)
        assert scores["tv"] == pytest.approx(0.95 if is_wrong else 0.9)


def test_a_text_is_shown_whole_but_for_what_fills_it_up_and_its_entropy_is_that_of_its_counts(
        tmp_path):
    cities = load("cities", seq_len=24)
    shown = cities.show(cities.val[:2]).split("\n")
    assert all(cities.decode(x).startswith(s + " <end>") for x, s in zip(cities.val, shown))
    assert data.END not in "".join(shown)
    text = load(train_files=write(tmp_path / "a.txt", ["an <end> is"] * 20), seq_len=11)
    assert text.show(text.rows([0, 12])) == "an <end> is\n\nan <end> is"
    x = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
    assert text.judge(x)["entropy"] == pytest.approx((0 + math.log(4) + math.log(2)) / 3)


@pytest.fixture
def gpt2_folder(tmp_path, real_data):
    """A tiny random GPT-2 and its tokenizer, in the files that transformers expects."""
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    config = transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                     initializer_range=0.5, tie_word_embeddings=False)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny-gpt2")
    for name, sha in (("merges.txt", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                      ("vocab.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")):
        shutil.copy(real_data / "tiktoken_cache" / sha, tmp_path / "tiny-gpt2" / name)
    return tmp_path / "tiny-gpt2"


def test_a_gpt2_teacher_has_the_probabilities_of_transformers_and_writes_by_them(
        gpt2_folder, tmp_path):
    """As many tokens as it can read; with the library's cache, without a warning, as without it."""
    import transformers
    cfg = data.config_of("lm1b", gd.Config)(
        train_files=write(tmp_path / "a.txt", LM1B * 50), teacher=str(gpt2_folder), seq_len=16)
    text = cfg.load()
    assert (cfg.teacher_steps, cfg.init_from) == (0, "scratch")            # it learns no more
    teacher = gd.Teacher(cfg, text.vocab_size, text.bos_id, text.pretrained).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = gd.generate(teacher, 2, 16)
    logp = teacher.logp(teacher.hidden(x))                      # (2, 16, V)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    with torch.no_grad():
        logits = model(torch.cat([torch.full((2, 1), 50256), x[:, :-1]], dim=1)).logits
    assert torch.allclose(logp[..., :50257], logits.log_softmax(-1), atol=1e-4)
    assert teacher.loss(x).item() == pytest.approx(-logp.gather(-1, x[..., None]).mean().item())
    best = (logp + gd.sequence_noise(0, torch.arange(2), 16, teacher)[0]).argmax(dim=-1)
    assert (best == x).float().mean() > 0.9                     # float32 may turn a close race


BAD_FILES = {"cut.jsonl": b'{"text": "fine"}\n{"text": "cut of', "field.jsonl": b'{"body": "x"}\n',
             "number.jsonl": b'{"text": 12}\n', "null.jsonl": b'{"text": null}\n',
             "binary.txt": b"ab\0cd", "half.jsonl": b'{"text": "\\ud800"}\n', "row.jsonl": b"7\n",
             "latin.txt": b"gr\xfc\xdfe", "bad.parquet": b"PAR1 and then nothing",
             "bad.txt.gz": b"no gzip", "a.pdf": b"x", "empty.txt": b"", "few.txt": b"a few words",
             "a.txt": b"some words of text\n" * 20, "other.txt": "ü".encode() * 20}
REFUSED = [
    *[(dict(train_files=name), name, "beyond row or piece") for name in list(BAD_FILES)[:10]],
    *[(dict(dataset=name), data.HUB[name][0], "--train-files") for name in data.HUB],
    *[(dict(tokenizer=name), f"--tokenizer {name}:", "gpt2-257")
      for name in ("gpt3", "gpt2-100", "gpt2-50258", "gpt2-", "")],
    (dict(train_files="a.pdf"), "a.pdf", ".jsonl"), (dict(train_files="*.x"), "*.x", "no file"),
    (dict(train_files="."), "no file"), (dict(train_files=""), "--train-files"),
    (dict(train_files="", val_files="a.txt"), "--train-files"), (dict(seq_len=0), "--seq-len 0"),
    (dict(val_files="a.txt"), "--val-files", "not all"), (dict(max_tokens=-5), "training"),
    (dict(val_files="nothing"), "--val-files nothing"), (dict(val_files="other.txt"), "'ü'"),
    (dict(train_files="empty.txt"), "--seq-len 8", "0 tokens"),
    (dict(train_files="few.txt"), "--seq-len 8", "validation", "1 tokens"),
    (dict(dataset="cities", seq_len=18), "--seq-len 18", "19"),
    (dict(dataset="mase"), "--dataset mase", "maze cities text tinystories lm1b owt"),
]


@pytest.mark.parametrize("given, said", [(given, said) for given, *said in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_sentence(given, said, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    if "dataset" not in given:
        given = {"train_files": "a.txt", **given}
    with pytest.raises(SystemExit) as error:
        load(**given)
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)


def test_a_teacher_that_does_not_fit_is_refused(gpt2_folder):
    for size, seq_len, said in (50257, 17, "--seq-len 17.*at most 16"), (1024, 8, "--tokenizer"):
        with pytest.raises(SystemExit, match=said):
            data.load_pretrained(str(gpt2_folder), data.Tokenizer(size=size), seq_len)
    with pytest.raises(SystemExit, match="--teacher nothing.*transformers"):
        data.load_pretrained("nothing", data.Tokenizer(), 8)
    merges = (gpt2_folder / "merges.txt").read_text().splitlines()
    (gpt2_folder / "merges.txt").write_text("\n".join(merges[:1000]))
    data.load_transformers.cache_clear()
    with pytest.raises(SystemExit, match="--teacher.*tokens"):  # as many tokens, but others
        data.load_pretrained(str(gpt2_folder), data.Tokenizer(), 8)
