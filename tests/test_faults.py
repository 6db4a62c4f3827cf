"""Other people's files, full disks, clusters, terminals.   python -m pytest tests/test_faults.py"""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import config
import data
import gumbel_distill as gd
import judge
import sample
from conftest import CACHE, ROOT
from test_cli import TINY, TO_BE, assert_refused

STORIES = ["Once upon a time there was a cat.", "One day a dog came home."]
MARK = "<|endoftext|>"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))


def load(path, **given):
    given = dict(dict(dataset="text", seq_len=8), **given)
    return data.load_data(gd.resolve(gd.Config(train_files=str(path), **given)))


def read(text):
    """All the text of a Data, as its tokenizer writes it."""
    return text.tokenizer.decode([*text.train, *text.val])


# -----------------------------------------------------------------------------
# Validation text is never trained on
@pytest.mark.parametrize("spelled", ["./t/b.txt", "t/../t/b.txt", "{}/t/b.txt", "link.txt"])
def test_validation_text_is_left_out_however_it_is_spelled(spelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("t")
    for name in "abc":
        (tmp_path / "t" / f"{name}.txt").write_text(f"letter {name} of abc\n" * 9)
    os.symlink("t/b.txt", "link.txt")
    for pattern in ("t/*", "./t/*", f"{tmp_path}/t/*.txt"):
        text = load(pattern, val_files=spelled.format(tmp_path))
        train = text.tokenizer.decode(text.train)
        assert "letter a" in train and "letter c" in train and "letter b" not in train
        assert set(text.tokenizer.decode(text.val).split("\n")) == {"letter b of abc", ""}


def test_training_text_that_is_all_validated_on_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(TO_BE)
    with pytest.raises(gd.UserError, match="--train-files.*--val-files"):
        load(tmp_path / "a.txt", val_files=f"{tmp_path}/../{tmp_path.name}/a.txt")


# -----------------------------------------------------------------------------
# Long files
def most_memory(call):
    """The largest sum of what Python holds during the call, in bytes; and what it returns."""
    tracemalloc.start()
    answer = call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most, answer


def test_memory_does_not_grow_with_a_text_file(tmp_path, monkeypatch):
    """Neither for its letters nor for its tokens; without any line end."""
    monkeypatch.setattr(data, "PIECE", 2**8)
    needs = []
    for n in (250_000, 750_000):                               # more than a fingerprint reads
        (tmp_path / "a.txt").write_text("word " * n)
        needs.append(most_memory(lambda: load(tmp_path / "a.txt"))[0])
    assert needs[1] < needs[0] + 2e5, needs                     # the text grew by 2.5e6


def test_a_limit_of_tokens_ends_the_reading_of_a_text_file(tmp_path):
    """A file with holes, of 3 GB, whose end cannot be read as text."""
    with open(tmp_path / "a.txt", "w") as f:
        f.write("to be or not to be\n" * 5000)
        f.truncate(3 * 10**9)
    pieces = data.read_pieces(str(tmp_path / "a.txt"), False)
    most, first = most_memory(lambda: next(pieces))
    assert first.startswith("to be or not") and most < 1e6
    file, letters = open(tmp_path / "ids", "wb"), gd.Tokenizer(sorted(set(TO_BE)))
    with file:
        data.write_tokens(file, data.itertools.islice(pieces, 9), letters, 1000, "")
    assert os.path.getsize(tmp_path / "ids") == 2000


def test_pieces_of_a_text_are_the_whole_of_it(tmp_path, monkeypatch):
    """Whatever the length of the pieces; and marks are found across their borders."""
    monkeypatch.setattr(data, "PIECE", 64)
    rng = np.random.default_rng(0)
    for number in range(200):
        words = rng.choice(["a", "bb", " ", "\n", "<", "<|end", MARK, f"\n{MARK}\n"], 120)
        text = "".join(words)
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        pieces = list(data.read_pieces(str(path), False))
        joined = "".join(MARK if piece is None else piece for piece in pieces)
        parts = text.replace(f"\n{MARK}", MARK).replace(f"{MARK}\n", MARK).split(MARK)
        assert joined == "".join(part + MARK for part in parts if part.strip())
        assert max(len(piece or "") for piece in pieces) <= 64


# -----------------------------------------------------------------------------
# <|endoftext|> as text
@pytest.mark.parametrize("tokenizer", ["char", "gpt2-1024"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_written_end_of_text_ends_a_document(tokenizer, ending, tmp_path, real_data):
    path = tmp_path / f"a{ending}"
    text = "".join(f"{story}\n{MARK}\n" for story in STORIES * 40)
    path.write_text(text if ending == ".txt" else json.dumps({"text": text}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES * 40))
    marked, apart = load(path, tokenizer=tokenizer), load(rows, tokenizer=tokenizer)
    assert [*marked.train, *marked.val] == [*apart.train, *apart.val]
    assert MARK not in marked.tokenizer.decode([]) and "|" not in (marked.tokenizer.words or [])
    if tokenizer != "char":
        assert sum(marked.train == 1023) + sum(marked.val == 1023) == 80


def test_printed_text_reads_back(real_data):
    bpe = gd.Tokenizer(size=1024)
    ids = [*bpe.encode(STORIES[0]), 1023, *bpe.encode(STORIES[1]), 1023]
    assert bpe.encode(bpe.decode(ids)).tolist() == ids


# -----------------------------------------------------------------------------
# Formats, fields, encodings
@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", bytes), ("A.JSONL", bytes), ("a.ndjson", bytes), ("a.json", bytes),
    ("a.jsonl.gz", gzip.compress), ("A.JsonL.GZ", gzip.compress)])
def test_rows_are_read_whatever_the_case_and_the_packing(name, pack, tmp_path):
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(99))
    (tmp_path / name).write_bytes(pack(rows.encode()))
    assert read(load(tmp_path / name)) == "".join(f"document {i}\n" for i in range(99))


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ", "news-00001-of-00002.gz", "a.md.gz"])
def test_packed_text_is_text(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(TO_BE.encode()))
    assert read(load(tmp_path / name)) == TO_BE + "\n"


def test_parquet_is_parquet_in_capitals_too(tmp_path):
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"id": range(99), "text": ["to be"] * 99, "more": [{"a": [1]}] * 99})
    pyarrow.parquet.write_table(table, tmp_path / "A.PARQUET")
    assert read(load(tmp_path / "A.PARQUET")) == "to be\n" * 99


def test_other_fields_do_not_matter(tmp_path):
    """A field that is null for eleven megabytes and then a string; then a list; then missing."""
    others = [{"author": None}] * 11_500 + [{"author": "Ann"}, {"author": [1]}, {}] * 10
    with open(tmp_path / "a.jsonl", "w") as f:
        for other in others:
            f.write(json.dumps({"text": "x" * 1000, **other}) + "\n")
    text = load(tmp_path / "a.jsonl")
    assert len(text.train) + len(text.val) == 1001 * len(others)


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_text(ending, tmp_path):
    text = TO_BE if ending == ".txt" else json.dumps({"text": TO_BE}) + "\n"
    (tmp_path / f"a{ending}").write_text(text)
    (tmp_path / f"v{ending}").write_text("\ufeff" + text)
    given = load(tmp_path / f"a{ending}", val_files=str(tmp_path / f"v{ending}"))
    assert given.tokenizer.decode(given.val) == TO_BE + "\n"


@pytest.mark.parametrize("content", [b"[1, 2]", b'"text"', b"{"])
def test_a_row_that_is_no_text_is_named(content, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + content)
    with pytest.raises(gd.UserError, match="a.jsonl.*row 2"):
        load(tmp_path / "a.jsonl")


def test_a_cut_off_packed_file_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(9999).hex().encode())[:-999])
    with pytest.raises(gd.UserError, match="a.txt.gz.*cannot be read"):
        load(tmp_path / "a.txt.gz")


def test_a_home_is_a_home_in_quotes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text(TO_BE)
    assert read(load("~/*.txt")) == TO_BE + "\n"


def test_a_name_that_is_also_a_pattern_names_its_file(tmp_path):
    (tmp_path / "a[1].txt").write_text(TO_BE)
    assert read(load(tmp_path / "a[1].txt")) == TO_BE + "\n"


# -----------------------------------------------------------------------------
# The program's own files
def test_the_own_cache_is_no_text(tmp_path, monkeypatch):
    """The second run would find the files that the first one left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE", CACHE)
    for name in ("data/a.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TO_BE)
    for pattern, n in (("data/*", 685), ("*", 685), ("**/*.txt", 1370), ("**/*", 1370)):
        assert len(load(pattern).train) == len(load(pattern).train) == n


def test_text_on_disk_needs_no_library_of_the_hub(tmp_path, monkeypatch):
    """Nor the folder that it would write to."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.txt").write_text(TO_BE)
    assert read(load(tmp_path / "a.txt")) == TO_BE + "\n"


def refuse(*args, **settings):
    """In place of a library's function, which could not write into its cache."""
    raise PermissionError(13, "Permission denied", "/proc/none")


def test_a_folder_of_a_library_that_cannot_be_written_is_named(monkeypatch, real_data):
    import datasets
    import tiktoken
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(gd.UserError, match="lm1b.*'/proc/none'"):
        load("", dataset="lm1b")
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(gd.UserError, match="'/proc/none'.*TIKTOKEN_CACHE_DIR"):
        gd.Tokenizer()


@pytest.mark.parametrize("args", ["--seed 1" + 30 * "0", "--batch-size 1" + 30 * "0", "--lr inf",
                                  "--temperature inf", "--tau 1 inf", "--t-min 2"])
def test_a_number_without_measure_is_refused(args, cli):
    assert_refused(cli(gd.main, *TINY, *args.split()), args.split()[0], args.split()[-1][:5])


# -----------------------------------------------------------------------------
# Disks, numbers, clusters, terminals
MAZE = [*TINY, "--students", "mdlm", "--device", "cpu", "--dtype", "float32", "--no-compile"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_leaves_the_last_checkpoint(cli, tmp_path):
    given = [*MAZE, "--out-dir", tmp_path]
    assert cli(gd.main, *given)[0] == 0
    before = (tmp_path / "teacher.pt").read_bytes()
    (tmp_path / "mdlm.pt").unlink()
    os.symlink("/dev/full", tmp_path / "mdlm.pt.tmp")
    assert_refused(cli(gd.main, *given), "mdlm.pt", "room")
    assert (tmp_path / "teacher.pt").read_bytes() == before
    assert not (tmp_path / "mdlm.pt").exists()
    os.remove(tmp_path / "mdlm.pt.tmp")
    assert cli(gd.main, *given)[0] == 0


def test_a_model_that_is_not_a_number_is_not_kept(cli, tmp_path):
    given = [*MAZE, "--out-dir", tmp_path, "--warmup", 0, "--eval-every", 1]
    assert_refused(cli(gd.main, *given, "--lr", "1e30"), "no finite loss", "--lr")
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "results.json").exists()


def test_a_cluster_that_is_no_torchrun_is_told_so(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(cli(gd.main, *MAZE, "--out-dir", tmp_path), "WORLD_SIZE", "2", "torchrun")


def test_writing_knows_nothing_of_a_cluster(cli, tmp_path):
    assert cli(gd.main, *MAZE, "--out-dir", tmp_path)[0] == 0
    env = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="many", MASTER_ADDR="x", MASTER_PORT="1")
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", "mdlm.pt", "-n", "1"],
                          cwd=tmp_path, text=True, capture_output=True, env={**os.environ, **env})
    assert done.returncode == 0 and not done.stderr, done.stderr


def interrupted(main, monkeypatch, name, after):
    """main, in which the call number `after` of the function gd.`name` is met by Ctrl-C."""
    real, calls = getattr(gd, name), []

    def stop(*args, **settings):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args, **settings)
    monkeypatch.setattr(gd, name, stop)
    return main


@pytest.mark.parametrize("name, after, goes_on", [
    ("load_data", 0, False), ("backward", 1, False), ("backward", 3, True), ("generate", 0, True)])
def test_ctrl_c_says_whether_the_same_command_goes_on(name, after, goes_on, cli, tmp_path,
                                                      monkeypatch):
    """Which it does once there is a checkpoint."""
    monkeypatch.setattr(config, "SAVED", [])
    given = [*MAZE, "--out-dir", tmp_path]
    with monkeypatch.context() as patch:
        status, _, err = cli(interrupted(gd.main, patch, name, after), *given)
    assert status == 130 and err.count("\n") == 1
    assert (str(tmp_path / "teacher.pt") in err or str(tmp_path / "mdlm.pt") in err) == goes_on
    assert ("goes on" in err) == goes_on == bool(list(tmp_path.glob("*.pt")))
    status, said, err = cli(gd.main, *given)
    assert status == 0 and ("from step 0/4" not in said.split("mdlm:")[0]) == goes_on, err


@pytest.mark.parametrize("args, said", [
    ("--train-files a.txt b.txt", ["b.txt", "quote"]), ("--train-files a b c", ["b", "quote"]),
    ("--dataset LM1B", ["--dataset", "LM1B", "lm1b"]), ("--students mdlm,bd3lm", ["mdlm,bd3lm"]),
    ("--nfe 1,3,10", ["--nfe", "'1,3,10'"]), ("--max-steps 1e3", ["--max-steps", "1e3", "int"]),
    ("--lr 0,1", ["--lr", "'0,1'"]), ("--lr", ["--lr", "argument"]),
    ("--batchsize 3", ["--batchsize", "mean --batch-size"]), ("-lr 3", ["mean --lr"]),
    ("--maxsteps=3", ["--maxsteps", "mean --max-steps"]), ("--t 3", ["--t-min", "--tau"]),
    ("--nfe", ["--nfe", "argument"]), ("—lr 3", ["—lr"])])
def test_a_slip_of_the_shell_or_the_keys_gets_its_cure(args, said, cli):
    assert_refused(cli(gd.main, *args.split()), *said)


def test_help_has_every_setting_of_a_dataset_once(cli):
    """In the table below, not in the lines of the flags; and no default that says nothing."""
    texts = [cli(main, "--help")[1] for main in (gd.main, sample.main, judge.main)]
    assert all("None" not in text for text in texts)
    text = texts[0]
    head, _, table = text.partition("by --dataset")
    for name in {name for preset in config.PRESETS.values() for name in preset}:
        row = next(line.split() for line in table.split("\n")
                   if line.startswith(config.flag(name) + " "))
        values = [preset[name] for preset in config.PRESETS.values() if name in preset]
        assert " ".join(row[1:]) == " ".join(map(config.words, values))
        assert head.count("\n  " + config.flag(name) + " ") == 1


def test_a_terminal_that_lacks_a_letter_shows_another(tmp_path):
    code = "import config; config.run_cli(lambda: print('na\\u00efve', '\\u4e2d'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.split() == [b"na?ve", b"?"], done.stderr


@pytest.mark.parametrize("name", ["a.docx", "a.jsonl.zst", "a.CSV"])
def test_an_ending_that_is_not_known_is_refused_by_name(name, tmp_path, cli):
    (tmp_path / name).write_text(TO_BE)
    status, _, err = cli(gd.main, "--dataset", "text", "--train-files", tmp_path / name)
    assert status == 1 and name in err and ".jsonl" in err


@pytest.mark.parametrize("words, near", [
    (["--dataset", "maz"], "maze"), (["--students", "draft"], "gumbel-draft"),
    (["--nfe", "1,3,10"], "1 3 10"), (["--batchsize", "8"], "--batch-size")])
def test_a_slip_is_answered_with_what_was_meant(words, near, cli):
    status, _, err = cli(gd.main, *words)
    assert status == 1 and near in err.split(";")[-1]
