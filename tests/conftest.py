"""Shared by all tests: tiny models, real text where it is at hand, one maze run per session."""

import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"     # there is a worker on each core

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)                # where another plugin has imported torch before
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gumbel_distill as gd  # noqa: E402

CPU = dict(device="cpu", dtype="float32", compile=False)
CACHE = data.CACHE                      # as the programs have it
LETTERS = gd.Tokenizer(list("abcdefg"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker takes all tests of the maze run, so that it is trained once."""
    for item in items:
        if "maze_run" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("maze"))


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory):
    data.CACHE = str(tmp_path_factory.mktemp("data"))


def tiny_config(**more):
    given = dict(CPU, seq_len=6, block_size=6, n_layer=2, n_head=2, n_embd=16, dropout=0.0,
                 max_steps=4, batch_size=4, lr=1e-2, warmup=2, eval_every=2)
    return gd.Config(**{**given, **more})


def sharpened(model, scale=30.0):
    """Random weights give nearly uniform outputs; this makes them differ."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale if p is model.net.head.weight else 5.0)
    return model.eval()


@pytest.fixture
def tiny():
    """A random teacher and a random student "gumbel", V = 7, T = 6, in float64."""
    torch.manual_seed(0)
    cfg = tiny_config()
    teacher = sharpened(gd.Teacher(cfg, LETTERS).double())
    student = sharpened(gd.Student(cfg, "gumbel", LETTERS.vocab_size).double())
    return cfg, teacher, student


@pytest.fixture(scope="session")
def real_data():
    """The folder named by GD_TEST_DATA: real text and GPT-2's BPE files, not in this repository."""
    folder = os.environ.get("GD_TEST_DATA", "")
    if not os.path.isdir(folder):
        pytest.skip("GD_TEST_DATA names no folder with real text")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.join(folder, "tiktoken_cache"))
    return Path(folder)


def maze_config(folder):
    return gd.Config(**CPU, max_steps=450, eval_every=450, n_samples=1000, nfe=[1, 3],
                     out_dir=str(folder))


@pytest.fixture(scope="session")
def maze_run(tmp_path_factory):
    """One short run of the default experiment with its three students: (folder, rows)."""
    folder = tmp_path_factory.mktemp("maze")
    return folder, gd.run(maze_config(folder))


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(main, *args) -> (exit status, stdout, stderr) of a command-line call in this process."""
    def call(main, *args):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        status = 0
        try:
            gd.run_cli(main)
        except SystemExit as e:
            status = e.code or 0
        out, err = capsys.readouterr()
        if isinstance(status, str):  # Python would print it and exit with status 1
            status, err = 1, err + status + "\n"
        return status, out, err
    return call


@pytest.fixture
def gpt2_folder(tmp_path, real_data):
    """A tiny random GPT-2 and its tokenizer, in the files that transformers expects."""
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    folder = tmp_path / "tiny-gpt2"
    config = transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                     initializer_range=0.5, tie_word_embeddings=False)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name, sha in (("merges.txt", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                      ("vocab.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")):
        shutil.copy(real_data / "tiktoken_cache" / sha, folder / name)
    return folder
