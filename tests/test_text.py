"""Real text: files, hub, token cache, GPT-2 teachers.   python -m pytest tests/test_text.py"""

import errno
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import gumbel_distill as gd
import sample
import text as text_module
from conftest import ROOT

LM1B = ["He did n't say \" no \" ( or yes ) , she 's sure .", "Prices rose 5 % : to $ 3 ."]
CLEAN = ["He didn't say \"no\" (or yes), she's sure.", "Prices rose 5%: to $3."]


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
    monkeypatch.setattr(text_module, "CACHE", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_lm1b_is_detokenised_and_joined_whatever_the_format(ending, tmp_path, cache, real_data):
    path = write(tmp_path / f"lm{ending}", LM1B * 50)
    data = load(dataset="lm1b", train_files=path)
    bpe, eos = data.tokenizer, [50256]
    pair = [*bpe.encode(CLEAN[0]), *eos, *bpe.encode(CLEAN[1]), *eos]
    assert data.train.tolist() == pair * 45
    assert data.val.tolist() == pair * 5
    assert data.rows([0, 1]).tolist() == [pair[0:8], pair[1:9]]


def test_real_lm1b_text_reads_like_text(cache, real_data):
    data = load(dataset="lm1b", train_files=str(real_data / "lm1b" / "*-00004-of-*"),
                val_files=str(real_data / "lm1b" / "*-00000-of-*"))
    text = data.tokenizer.decode(data.train[:100_000])
    assert text.startswith("Then came an expansion, with everyone eating in a huge democratic hall")
    for torn in (" ,", " .", " n't", " 's ", "( ", " )"):
        assert text.count(torn) < 20, torn
    assert 100_000 < len(data.train) < 250_000 and data.train.dtype == np.uint16


def test_validation_files_are_left_out_of_the_training_files(tmp_path, cache, real_data):
    for name in "abc":
        write(tmp_path / f"{name}.txt", [f"the letter {name}"] * 10)
    data = load(dataset="lm1b", train_files=str(tmp_path / "*.txt"),
                val_files=str(tmp_path / "b.txt"))
    train, val = (data.tokenizer.decode(x) for x in (data.train, data.val))
    assert "letter a" in train and "letter c" in train and "letter b" not in train
    assert set(val.split("<|endoftext|>")) == {"the letter b", ""}


def test_openwebtext_documents_end_with_end_of_text(cache, real_data):
    data = load(dataset="owt", train_files=str(real_data / "openwebtext-800.jsonl"))
    assert (data.train == 50256).sum() + (data.val == 50256).sum() == 800
    assert data.train[-1] == 50256 and 0.85 < len(data.train) / (len(data.train) + len(data.val))
    with open(real_data / "openwebtext-800.jsonl") as f:
        first = json.loads(f.readline())["text"]
    whole = data.tokenizer.decode(data.train[:len(first)])
    assert whole.split("<|endoftext|>")[0] == first


def test_the_validation_part_is_the_last_documents_100000_at_most(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_VAL_DOCUMENTS", 3)
    path = write(tmp_path / "a.jsonl", [f"document {i:02d}" for i in range(100)])
    data = load(dataset="text", train_files=path)
    text = data.tokenizer.decode(data.val)
    assert text == "document 97\ndocument 98\ndocument 99\n"


def test_gpt2_cut_to_its_first_tokens_is_a_tokenizer_of_its_own(real_data):
    text = "Grüße, naïve world! <|endoftext|> 12.5"
    small, whole = gd.Tokenizer(size=1024), gd.Tokenizer()
    assert small.vocab_size == 1024 and small.bos_id == 1023
    assert small.decode(small.encode(text)) == whole.decode(whole.encode(text)) == text
    assert small.encode(text).max() < 1023 and len(small.encode(text)) > len(whole.encode(text))
    assert gd.Tokenizer(**small.state).encode(text).tolist() == small.encode(text).tolist()


def test_text_is_tokenised_once_and_again_only_when_something_changed(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f"document {i}" for i in range(100)])
    calls = []
    real = text_module.write_tokens
    monkeypatch.setattr(text_module, "write_tokens", lambda *args: calls.append(1) or real(*args))
    given = dict(dataset="text", train_files=path)
    first = load(**given)
    again = load(**given)
    assert len(calls) == 1 and again.train.tolist() == first.train.tolist()
    assert again.fingerprint == first.fingerprint and again.tokenizer.words == first.tokenizer.words
    (written,) = cache.iterdir()
    whole = written.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"some other program's file" * 10, whole[2:]):
        written.write_bytes(broken)
        assert load(**given).train.tolist() == first.train.tolist()
        assert written.read_bytes() == whole
    assert len(calls) == 6
    load(**given, max_tokens=200)
    write(tmp_path / "a.jsonl", ["something else altogether"] * 90)
    assert "else" in (other := load(**given)).tokenizer.decode(other.train[:30])
    assert len(calls) == 8


def test_max_tokens_stops_the_reading(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", ["0123456789"] * 1000)
    with open(path, "a") as f:
        f.write("this line would be refused\n")
    with pytest.raises(gd.UserError, match="line 1001"):
        load(dataset="text", train_files=path)
    letters = gd.Tokenizer(list("0123456789"))
    cfg = gd.resolve(gd.Config(dataset="text", train_files=path))
    tokens, _, _ = text_module.load_tokens(cfg, "train", [path], letters, 500)
    assert len(tokens) == 500


@pytest.mark.parametrize("ending, content, said", [
    (".jsonl", b'{"text": "fine"}\n{"text": "cut of', "line 2"),
    (".jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "line 2"),
    (".jsonl", b'{"text": 12}\n', "line 1"),
    (".parquet", b"PAR1 and then nothing", "its beginning"),
    (".txt", b"\xff\xfe\x00b", "utf-8"), (".txt", b"ab\0cd", "binary")])
def test_a_corrupt_file_is_named_with_its_place(ending, content, said, tmp_path, cache):
    path = tmp_path / f"bad{ending}"
    path.write_bytes(content)
    with pytest.raises(gd.UserError, match=said) as error:
        load(dataset="text", train_files=str(path))
    assert str(path) in str(error.value) and "leave the file out" in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_parquet_without_text_is_refused(tmp_path, cache):
    import pyarrow
    import pyarrow.parquet
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(gd.UserError, match="text"):
        load(dataset="text", train_files=str(path))


def test_a_long_document_is_cut_into_pieces_not_lost(tmp_path, cache):
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 5 * text_module.PIECE)
    for ending in (".jsonl", ".txt"):
        data = load(dataset="text", train_files=write(tmp_path / f"a{ending}", ["".join(letters)]))
        both = data.tokenizer.decode(np.concatenate([data.train, data.val]))
        assert both.rstrip("\n") == "".join(letters)


def test_a_full_disk_while_caching_is_named_and_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["document"] * 100)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(text_module, "write_tokens", full)
    with pytest.raises(gd.UserError, match="cannot be written .No space left.*make room"):
        load(dataset="text", train_files=path)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("dataset, name", [("lm1b", "dvruette/lm1b"),
                                           ("owt", "Skylion007/openwebtext")])
def test_without_a_network_the_dataset_is_named_and_the_cure(dataset, name, cache, real_data):
    start = time.time()
    with pytest.raises(gd.UserError, match=f"{name} cannot be fetched.*--train-files"):
        load(dataset=dataset)
    assert time.time() - start < 30


def test_the_hub_is_read_as_a_stream(cache, tmp_path, monkeypatch, real_data):
    """A local parquet file in place of the hub's: same call, same rows."""
    import datasets
    path = write(tmp_path / "a.parquet", LM1B * 50)
    real, calls = datasets.load_dataset, []

    def local(name, split, streaming):
        calls.append((name, split, streaming))
        return real("parquet", data_files=path, split="train", streaming=streaming)
    monkeypatch.setattr(datasets, "load_dataset", local)
    data = load(dataset="lm1b", max_tokens=100)
    assert calls == [("dvruette/lm1b", "train", True), ("dvruette/lm1b", "test", True)]
    assert len(data.train) == 100 and data.tokenizer.decode(data.train).startswith(CLEAN[0])


MEMORY = """
import resource, sys
import gumbel_distill as gd
import text as text_module
text_module.CACHE = sys.argv[2]
cfg = gd.resolve(gd.Config(dataset="lm1b", train_files=sys.argv[1]))
gd.Tokenizer().encode_batch(["warm up"] * 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = gd.load_data(cfg)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(data.train) + len(data.val), (after - before) / 1024)
"""


def test_memory_of_tokenising_does_not_grow_with_the_corpus(tmp_path, real_data):
    used = {}
    for name, pattern in (("few", "*-0000[4-5]-of-*"), ("many", "*-0000[0-9]-of-*")):
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, str(real_data / "lm1b" / pattern), str(tmp_path / name)],
            capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
        used[name] = int(out[0]), float(out[1])
    assert used["many"][0] > 4 * used["few"][0]
    assert used["many"][1] < used["few"][1] + 20, used  # MB


def test_lm1b_end_to_end_with_a_small_model(cli, tmp_path, cache, real_data):
    status, said, err = cli(
        gd.main, "--dataset", "lm1b", "--train-files", real_data / "lm1b" / "*-0000[4-5]-of-*",
        "--val-files", real_data / "lm1b" / "*-00000-of-*", "--max-tokens", 50_000, "--tokenizer",
        "gpt2-1024", "--seq-len", 16, "--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--batch-size",
        8, "--max-steps", 30, "--warmup", 5, "--eval-every", 30, "--nfe", "2", "--n-samples", 16,
        "--tau", "0.8,1", "--out-dir", tmp_path / "run")
    assert status == 0, err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(r["tau"], "agree_token" in r) for r in rows if r["model"] == "gumbel"] == [
        (0.8, False), (1.0, True)]
    exact = next(r for r in rows if r["model"] == "exact, gumbel")
    assert exact["equal"] == 1
    losses = [r["val_loss"] for r in rows if r["model"] == "teacher"]
    assert losses[0] < np.log(1024)


def test_a_gpt2_teacher_gives_the_probabilities_of_transformers(gpt2_folder):
    import transformers
    teacher = gd.load_teacher(str(gpt2_folder), gd.Tokenizer(), 8, "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder)
    x0 = torch.randint(50257, (3, 8), generator=gd.rng(1))
    with torch.no_grad():
        logits = model(torch.cat([torch.full((3, 1), 50256), x0], dim=1)).logits
    assert torch.allclose(teacher(x0), logits[:, :-1].log_softmax(-1), atol=1e-4)
    xi = gd.sample_gumbel((3, 8, 50257), gd.rng(2))
    x, gap = gd.serial_extraction(teacher, xi)
    is_clear = gap > 1e-3
    assert is_clear.float().mean() > 0.9
    assert ((teacher(x) + xi).argmax(-1) == x)[is_clear].all()


def test_a_student_learns_from_a_gpt2_teacher(gpt2_folder, cli, tmp_path, cache):
    given = ["--dataset", "lm1b", "--train-files", write(tmp_path / "a.txt", LM1B * 50),
             "--seq-len", 8, "--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--batch-size", 4,
             "--max-steps", 2, "--eval-every", 2, "--nfe", 2, "--n-samples", 4, "--noise", "gumbel",
             "--out-dir", tmp_path / "run"]
    status, said, err = cli(gd.main, *given, "--teacher", gpt2_folder)
    assert status == 0, err
    assert not (tmp_path / "run" / "teacher.pt").exists()
    ckpt = tmp_path / "run" / "student-gumbel.pt"
    status, said, err = cli(sample.main, "--ckpt", ckpt, "--exact")
    assert status == 0 and "equal to serial 4 of 4" in said, err
    for flags, text in ((["--tokenizer", "gpt2-1024"], ["50257", "1024"]),
                        (["--tokenizer", "char"], ["50257", "tokens) is not the one here"]),
                        (["--seq-len", 20], ["--seq-len 20", "at most 16"]),
                        (["--teacher", tmp_path / "nothing"], ["cannot be loaded", ".pt"])):
        status, _, err = cli(gd.main, *given, "--teacher", gpt2_folder, *flags)
        assert status == 1 and all(t in err for t in text), err
        assert err.splitlines()[-1].startswith("error: ")


def test_a_teacher_of_the_same_size_with_other_tokens_is_refused(gpt2_folder):
    merges = (gpt2_folder / "merges.txt").read_text().splitlines()
    (gpt2_folder / "merges.txt").write_text("\n".join(merges[:1000]))
    for leftover in gpt2_folder.glob("tokenizer*.json"):
        leftover.unlink()
    with pytest.raises(gd.UserError, match="is not the one here"):
        gd.load_teacher(str(gpt2_folder), gd.Tokenizer(), 8, "cpu")


def test_a_teacher_of_transformers_without_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(gd.UserError, match=r'pip install -e "\.\[hf\]"'):
        gd.load_teacher("gpt2", gd.Tokenizer(["a"]), 8, "cpu")
