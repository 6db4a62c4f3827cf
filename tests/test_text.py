"""Real text: files, hub, token cache, GPT-2 teachers.   python -m pytest tests/test_text.py"""

import errno
import json
import re
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import data
import gumbel_distill as gd
import sample

LM1B = ["She 's sure , quite .", "Prices rose 5 % ."]
CLEAN = ["She's sure, quite.", "Prices rose 5%."]


def half_written(cache):
    """What is in the cache."""
    return [path.name for path in cache.glob("*")]


def load(**given):
    return gd.load_data(gd.resolve(gd.Config(**{**dict(seq_len=8), **given})))


def write(path, texts):
    """The same documents as text, one a line, as .jsonl or as .parquet."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else:
        path.write_text("\n".join(texts))
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("torn, whole", [
    *zip(LM1B, CLEAN),
    ("I don 't , we 're , DON 'T .", "I don't, we're, DON'T."),
    ("Mr O 'Neill left at six o 'clock .", "Mr O'Neill left at six o'clock."),
    ('He said : " It \'s a \' pro \' . "', 'He said: "It\'s a \'pro\'."'),
    ('It hurt , " he said , " a bit .', 'It hurt," he said, "a bit.'),
    ("It is ' over ' for the players ' union .", "It is 'over' for the players' union."),
    ("the ' 70s ( or so ) [ sic ] of ' 96", "the '70s (or so) [sic] of '96"),
    ("It 's ' fine ' , its ' best ' year", "It's 'fine', its 'best' year"),
    ("Plan B 'works' and 's' at 100 @ 3.50", "Plan B 'works' and 's' at 100 @ 3.50"),
    ("http : / / a.org / b costs $ 5 , £ 6 and € 7", "http://a.org/b costs $5, £6 and €7"),
    ("write to me @ a.org by 9 : 30 and / or call", "write to me@a.org by 9:30 and/or call"),
    ("L.A. ' s team , hitting .279 .", "L.A.'s team, hitting .279."),
])
def test_torn_text_is_mended_and_whole_text_left_alone(torn, whole):
    assert data.detokenize(torn) == data.detokenize(whole) == whole


def test_no_torn_form_is_left_in_real_lm1b(real_data):
    """No letter may get lost, and no quote may stand alone. TinyStories is not torn apart."""
    shards = sorted(real_data.glob("lm1b/*"))[:4]
    torn = "\n".join(shard.read_text() for shard in shards)
    whole = "\n".join(data.detokenize(line) for line in torn.split("\n"))
    for form in [r" '(t|s|re|ve|m|ll)\b", r' [.,!?;:%)\]](?!\S)', r"[(\[] ", r"[$£€] \d", " / ",
                 ": / /", r'(?<!\S)"(?!\S)']:
        n_torn, n_left = len(re.findall(form, torn)), len(re.findall(form, whole))
        assert n_torn >= 20 and n_left <= 1, (form, n_torn, n_left)
    lone = r"(?<!\S)'(?!\S)"                                    # some stay: who owns them?
    assert len(re.findall(lone, whole)) < 0.05 * len(re.findall(lone, torn))
    assert torn.replace(" ", "") == whole.replace(" ", "")
    again = [data.detokenize(line) for line in whole.split("\n")]
    assert sum(a != b for a, b in zip(again, whole.split("\n"))) <= 2
    stories = (real_data / "tinystories-1mb.txt").read_text().split("\n")
    assert sum(data.detokenize(line) != line for line in stories) <= 2     # its own misprints


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_lm1b_is_detokenised_and_joined_whatever_the_format(ending, tmp_path, cache, real_data):
    path = write(tmp_path / f"lm{ending}", LM1B * 50)
    lm1b = load(dataset="lm1b", train_files=path)
    bpe, eos = lm1b.tokenizer, [50256]
    pair = [*bpe.encode(CLEAN[0]), *eos, *bpe.encode(CLEAN[1]), *eos]
    assert [*lm1b.train, *lm1b.val] == pair * 50
    assert len(lm1b.val) == 5 * len(pair)                       # the last 10 %
    assert lm1b.rows([0, 1]).tolist() == [(pair * 2)[0:8], (pair * 2)[1:9]]


@pytest.mark.parametrize("dataset", ["text", "owt"])
def test_running_text_is_read_as_it_stands(dataset, tmp_path, cache, real_data):
    """A .txt file is one document, a row of the other formats another; nothing is mended."""
    texts = ["  two spaces , and a line\nend ", "naïve\tüber , 's"] * 50
    end = "\n" if dataset == "text" else "<|endoftext|>"
    for ending in (".jsonl", ".parquet", ".txt"):
        path = write(tmp_path / f"a{ending}", texts)
        running = load(dataset=dataset, train_files=path)
        whole = running.tokenizer.decode([*running.train, *running.val])
        assert whole == ("\n" if ending == ".txt" else end).join(texts) + end


def test_blank_documents_are_left_out(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", ["one", "", " \n ", "two"] * 50)
    text = load(dataset="text", train_files=path)
    assert text.tokenizer.decode([*text.train, *text.val]) == "one\ntwo\n" * 50


def test_real_lm1b_text_reads_like_text(cache, real_data):
    lm1b = load(dataset="lm1b", train_files=str(real_data / "lm1b" / "*-00004-of-*"),
                val_files=str(real_data / "lm1b" / "*-00000-of-*"))
    text = lm1b.tokenizer.decode(lm1b.train[:100_000])
    assert text.startswith("Then came an expansion, with everyone eating in a huge democratic hall")
    for torn in (" ,", " .", " n't", " 's ", "( ", " )"):
        assert text.count(torn) < 20, torn
    assert 100_000 < len(lm1b.train) < 250_000 and lm1b.train.dtype == np.uint16


def test_validation_files_are_left_out_of_the_training_files(tmp_path, cache, real_data):
    for name in "abc":
        write(tmp_path / f"{name}.txt", [f"the letter {name}"] * 10)
    lm1b = load(dataset="lm1b", train_files=str(tmp_path / "*.txt"),
                val_files=str(tmp_path / "b.txt"))
    train, val = (lm1b.tokenizer.decode(x) for x in (lm1b.train, lm1b.val))
    assert "letter a" in train and "letter c" in train and "letter b" not in train
    assert set(val.split("<|endoftext|>")) == {"the letter b", ""}


def test_openwebtext_documents_end_with_end_of_text(cache, real_data):
    owt = load(dataset="owt", train_files=str(real_data / "openwebtext-800.jsonl"))
    assert (owt.train == 50256).sum() + (owt.val == 50256).sum() == 800
    assert owt.val[-1] == 50256
    assert len(owt.val) == (len(owt.train) + len(owt.val)) // 10
    with open(real_data / "openwebtext-800.jsonl") as f:
        first = json.loads(f.readline())["text"]
    whole = owt.tokenizer.decode(owt.train[:len(first)])
    assert whole.split("<|endoftext|>")[0] == first


def test_the_validation_part_is_the_last_tenth_but_bounded(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f"document {i:02d}" for i in range(100)])
    text = load(dataset="text", train_files=path)
    ends = "".join(f"document {i}\n" for i in range(90, 100))
    assert text.tokenizer.decode(text.val) == ends
    monkeypatch.setattr(data, "MAX_VAL_TOKENS", 24)
    text = load(dataset="text", train_files=path)
    assert text.tokenizer.decode(text.val) == ends[-24:]
    assert len(text.train) == 1200 - 24


def test_gpt2_cut_to_its_first_tokens_is_a_tokenizer_of_its_own(real_data):
    text = "Grüße, naïve world! <|endoftext|> 12.5"
    small, whole = gd.Tokenizer(size=1024), gd.Tokenizer()
    assert small.vocab_size == 1024 and small.bos_id == 1023
    assert all(small.decode([i]) == whole.decode([i]) for i in range(1023))
    assert small.decode(small.encode(text)) == whole.decode(whole.encode(text)) == text
    ends = small.encode(text) == small.bos_id                   # what ends a document reads back
    assert ends.sum() == 1 and len(small.encode(text)) > len(whole.encode(text))
    assert gd.Tokenizer(**small.state).encode(text).tolist() == small.encode(text).tolist()
    assert small.fingerprint != whole.fingerprint == gd.Tokenizer().fingerprint


@pytest.fixture
def written(monkeypatch):
    """A list that grows with each call of write_tokens."""
    calls, real = [], data.write_tokens
    monkeypatch.setattr(data, "write_tokens", lambda *args: calls.append(1) or real(*args))
    return calls


def test_text_is_tokenised_once_and_again_only_when_something_changed(tmp_path, cache, written):
    given = dict(dataset="text", train_files=write(tmp_path / "a.jsonl", ["a document"] * 100))
    first = load(**given)
    again = load(**given)
    assert len(written) == 1 and again.train.tolist() == first.train.tolist()
    assert again.fingerprint == first.fingerprint and again.tokenizer.words == first.tokenizer.words
    load(**given, max_tokens=200)
    assert len(written) == 2
    write(tmp_path / "a.jsonl", ["something else altogether"] * 90)
    other = load(**given)
    assert len(written) == 3 and "else" in other.tokenizer.decode(other.train[:30])
    assert other.fingerprint != first.fingerprint


def test_tokens_of_an_interrupted_run_are_not_taken_for_the_whole(tmp_path, cache, monkeypatch):
    given = dict(dataset="text", train_files=write(tmp_path / "a.jsonl", ["a document"] * 100))
    real = data.write_tokens

    def stopped(file, pieces, tokenizer, limit, where):
        real(file, pieces, tokenizer, 50, where)
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_tokens", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(**given)
    assert not half_written(cache)
    monkeypatch.setattr(data, "write_tokens", real)
    text = load(**given)
    assert len(text.train) + len(text.val) == 100 * len("a document\n")


def test_max_tokens_stops_the_reading(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", ["0123456789"] * 5000)
    letters = gd.Tokenizer(list("\n0123456789"))
    cfg, read = gd.resolve(gd.Config(dataset="text", train_files=path)), []

    class Counting(gd.Tokenizer):
        def encode_batch(self, texts, where):
            read.append(len(texts))
            return super().encode_batch(texts, where)
    tokens, _ = data.load_tokens(cfg, "train", [path], Counting(letters.words), 500)
    assert len(tokens) == 500 and sum(read) < 1100
    assert letters.decode(tokens) == ("0123456789\n" * 50)[:500]


@pytest.mark.parametrize("ending, content, row", [
    (".jsonl", b'{"text": "fine"}\n{"text": "cut of', None),
    (".jsonl", b'{"text": "fine"}\n{"body": "x"}\n', 2), (".jsonl", b'{"text": 12}\n', 1),
    (".jsonl", b'{"text": "fine"}\n{"text": null}\n', 2), (".jsonl", b'{"body": "x"}\n', 1),
    (".jsonl", b'{"text": "fine"}\n{"text": "ab\\u0000cd"}\n', 2),
    (".parquet", b"PAR1 and then nothing", None), (".txt", b"\xff\xfe\x00b", None),
    (".txt", b"ab\0cd", 1)])
def test_a_corrupt_file_is_named_with_its_row(ending, content, row, tmp_path, cache):
    path = tmp_path / f"bad{ending}"
    path.write_bytes(content)
    with pytest.raises(gd.UserError) as error:
        load(dataset="text", train_files=str(path))
    said = str(error.value)
    assert str(path) in said and "leave the file out" in said and "\n" not in said
    assert row is None or f"row {row}" in said
    assert not half_written(cache)


def test_parquet_without_text_is_refused(tmp_path, cache):
    import pyarrow
    import pyarrow.parquet
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(gd.UserError, match="text"):
        load(dataset="text", train_files=str(path))


@pytest.mark.parametrize("name, decoy", [("a[1].txt", "a1.txt"), ("a*b.txt", "axb.txt")])
def test_a_file_whose_name_is_a_pattern_is_itself_read(name, decoy, tmp_path, cache):
    write(tmp_path / name, ["mine"] * 50)
    write(tmp_path / decoy, ["other"] * 50)
    pieces = list(data.read_pieces(str(tmp_path / name), by_line=True))
    assert pieces == ["mine", None] * 50


def test_a_long_document_is_cut_into_pieces_not_lost(tmp_path, cache):
    letters = "".join(np.random.default_rng(0).choice(list("abcdefgh "), 5 * data.PIECE))
    for ending in (".jsonl", ".txt"):
        path = write(tmp_path / f"a{ending}", [letters])
        pieces = list(data.read_pieces(path, False))
        assert pieces[-1] is None and max(map(len, pieces[:-1])) <= data.PIECE
        text = load(dataset="text", train_files=path)
        both = text.tokenizer.decode(np.concatenate([text.train, text.val]))
        assert both == letters + "\n"


def test_a_full_disk_while_caching_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["document"] * 100)

    def full(file, *args):
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(data, "write_tokens", full)
    with pytest.raises(OSError, match="No space left"):
        load(dataset="text", train_files=path)
    assert not half_written(cache)


@pytest.mark.parametrize("dataset, name", [("lm1b", "dvruette/lm1b"),
                                           ("tinystories", "roneneldan/TinyStories"),
                                           ("owt", "Skylion007/openwebtext")])
def test_without_a_network_the_dataset_is_named_and_the_cure(dataset, name, cache, real_data):
    start = time.time()
    with pytest.raises(gd.UserError, match=f"{name} cannot be fetched.*--train-files") as error:
        load(dataset=dataset)
    assert time.time() - start < 30 and "\n" not in str(error.value)
    assert not half_written(cache)


def test_the_hub_is_read_as_a_stream(cache, tmp_path, monkeypatch, real_data):
    """A local parquet file in place of the hub's: same call, same rows."""
    import datasets
    path = write(tmp_path / "a.parquet", LM1B * 50)
    real, calls = datasets.load_dataset, []

    def local(name, split, streaming):
        calls.append((name, split, streaming))
        return real("parquet", data_files=path, split="train", streaming=streaming)
    monkeypatch.setattr(datasets, "load_dataset", local)
    lm1b = load(dataset="lm1b", max_tokens=100)
    assert calls == [("dvruette/lm1b", "train", True), ("dvruette/lm1b", "test", True)]
    assert len(lm1b.train) == 100 and lm1b.tokenizer.decode(lm1b.train).startswith(CLEAN[0])
    load(dataset="lm1b", max_tokens=100)
    assert len(calls) == 2                                      # now from the cache


def test_lm1b_end_to_end_with_a_small_model(cli, tmp_path, cache, real_data):
    out = tmp_path / "run"
    status, said, err = cli(
        gd.main, "--dataset", "lm1b", "--train-files", real_data / "lm1b" / "*-00004-of-*",
        "--val-files", real_data / "lm1b" / "*-00000-of-*", "--max-tokens", 50_000, "--tokenizer",
        "gpt2-1024", "--seq-len", 16, "--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--batch-size",
        8, "--grad-accum", 1, "--max-steps", 30, "--warmup", 5, "--eval-every", 30, "--nfe", 2,
        "--n-samples", 16, "--tau", 0.8, 1, "--temperature", 0, "--students",
        "gumbel", "--out-dir", out)
    assert status == 0, err
    rows = json.loads((out / "results.json").read_text())
    assert [r["tau"] for r in rows if r["model"] == "gumbel"] == [0.8, 1.0]
    losses = [json.loads(line) for line in open(out / "log.jsonl")]
    assert losses[0]["model"] == "teacher" and losses[0]["val"] < np.log(1024)
    status, said, err = cli(sample.main, "--ckpt", out / "gumbel.pt", "--exact", "--prompt",
                            "The cat ", "-n", 3, "--out", tmp_path / "texts.jsonl")
    assert status == 0 and "3 of 3" in said, err
    texts = [json.loads(line)["text"] for line in open(tmp_path / "texts.jsonl")]
    assert all(text.startswith("The cat") for text in texts)


def gpt2_teacher(folder, seq_len=8):
    cfg = gd.resolve(gd.Config(dataset="lm1b", seq_len=seq_len, device="cpu"))
    return gd.load_teacher(str(folder), gd.Tokenizer(), cfg)


def test_a_gpt2_teacher_gives_the_probabilities_of_transformers(gpt2_folder):
    import transformers
    teacher = gpt2_teacher(gpt2_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder)
    x0 = torch.randint(50257, (3, 8), generator=gd.rng(1))
    with torch.no_grad():
        logits = model(torch.cat([torch.full((3, 1), 50256), x0], dim=1)).logits
        expected = logits[:, :-1].log_softmax(-1)
        is_masked = torch.rand(3, 8, generator=gd.rng(2)) < 0.5
        assert torch.allclose(teacher(x0), expected, atol=1e-4)
        assert torch.allclose(teacher(x0, is_masked), expected[is_masked], atol=1e-4)


def test_cached_serial_extraction_of_a_gpt2_teacher_is_its_own_argmax(gpt2_folder):
    teacher = gpt2_teacher(gpt2_folder)
    xi = gd.sample_gumbel((3, 8, 50257), gd.rng(2))
    x = gd.serial_extraction(teacher, xi)
    best = (teacher(x) + xi).topk(2, dim=-1)
    is_clear = best.values[..., 0] - best.values[..., 1] > 1e-3
    assert is_clear.float().mean() > 0.9
    assert (best.indices[..., 0] == x)[is_clear].all()


def test_serial_extraction_of_a_gpt2_teacher_does_not_warn(gpt2_folder):
    teacher = gpt2_teacher(gpt2_folder)
    xi = gd.sample_gumbel((1, 3, 50257), gd.rng(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gd.serial_extraction(teacher, xi)


def test_a_student_learns_from_a_gpt2_teacher(gpt2_folder, cli, tmp_path, cache):
    out = tmp_path / "run"
    given = ["--dataset", "lm1b", "--train-files", write(tmp_path / "a.txt", LM1B * 50),
             "--seq-len", 8, "--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--batch-size", 8,
             "--max-steps", 2, "--eval-every", 2, "--nfe", 2, "--n-samples", 4, "--students",
             "gumbel", "--init-from", "scratch", "--device", "cpu", "--out-dir", out]
    status, said, err = cli(gd.main, *given, "--teacher", gpt2_folder)
    assert status == 0, err
    assert [path.name for path in out.glob("*.pt")] == ["gumbel.pt"]
    status, said, err = cli(sample.main, "--ckpt", out / "gumbel.pt", "--exact")
    assert status == 0 and "4 of 4" in said, err
    for flags, *said in (
            (["--tokenizer", "gpt2-1024"], "50257", "1024"), (["--tokenizer", "char"], "50257"),
            (["--seq-len", 20], "--seq-len 20", "16"),
            (["--teacher", tmp_path / "nothing"], "--teacher", "nothing", ".pt")):
        status, _, err = cli(gd.main, *given, "--teacher", gpt2_folder, *flags)
        line = err.splitlines()[-1]
        assert status == 1 and line.startswith("error: "), err
        assert all(str(part) in line for part in said), err


def test_a_teacher_of_the_same_size_with_other_tokens_is_refused(gpt2_folder):
    merges = (gpt2_folder / "merges.txt").read_text().splitlines()
    (gpt2_folder / "merges.txt").write_text("\n".join(merges[:1000]))
    for leftover in gpt2_folder.glob("tokenizer*.json"):
        leftover.unlink()
    with pytest.raises(gd.UserError, match="--teacher.*tokenizer"):
        gpt2_teacher(gpt2_folder)


def test_a_teacher_of_transformers_without_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(gd.UserError, match=r'pip install -e "\.\[hf\]"'):
        gd.load_teacher("gpt2", gd.Tokenizer(["a"]), gd.resolve(gd.Config(device="cpu")))


def test_tinystories_is_read_as_it_stands_with_few_tokens(real_data, cache):
    stories = load(dataset="tinystories", train_files=str(real_data / "tinystories-1mb.txt"),
                   max_tokens=50_000)
    assert stories.tokenizer.vocab_size == 1024 and len(stories.train) == 50_000
    assert stories.tokenizer.decode(stories.train[:12]).startswith("One day, a little girl")
