"""Shared by all tests: tiny models and texts, real text where it is at hand."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"     # there is a worker on each core

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)                # where another plugin has imported torch before
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import drafts  # noqa: E402
import gumbel_distill as gd  # noqa: E402

V, T = 7, 6                             # of the tiny models
STUDENTS = {**gd.STUDENTS, "gumbel-draft": drafts.DraftStudent}
# A command line for a run of a second, without a card
TINY = ("--n-layer 1 --n-head 2 --n-embd 16 --batch-size 8 --teacher-steps 4 --max-steps 4 "
        "--eval-every 2 --n-samples 20 --device cpu --no-compile").split()


def tiny_config(config=gd.Config, **more):
    given = dict(seq_len=T, n_layer=2, n_head=2, n_embd=16, batch_size=8, warmup=2, eval_every=2,
                 device="cpu", compile=False)
    return config(**{**given, **more})


def sharpened(model, scale=3.0):
    """New layers do nothing, and the outputs are nearly uniform; here they differ. In float64."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p += 0.2 * torch.randn(p.shape) * (not p.any())
                p.mul_(scale if p is model.net.head.weight else 5.0)
    return model.double().eval()


def tiny_student(name="gumbel", **more):
    torch.manual_seed(0)
    return sharpened(STUDENTS[name](tiny_config(**more), V))


@pytest.fixture
def teacher():
    """A random teacher with sharp outputs, V = 7, T = 6, in float64."""
    torch.manual_seed(0)
    return sharpened(gd.Teacher(tiny_config(), V, V))


class Letters:
    """40 random texts to train on and 13 to validate on, with the attributes of gd.Maze."""
    vocab_size = bos_id = V
    pretrained = None
    tokenizer = dict(words=list("abcdefg"))
    fingerprint = "letters"
    n_train = 40

    def __init__(self):
        texts = torch.randint(V, (53, T), generator=gd.rng("letters"))
        self.texts, self.val = texts.split([40, 13])

    def rows(self, index):
        return self.texts[index]


@pytest.fixture(scope="session")
def real_data():
    """The folder named by GD_TEST_DATA: real text and GPT-2's BPE files, not in this repository."""
    folder = os.environ.get("GD_TEST_DATA", "")
    if not os.path.isdir(folder):
        pytest.skip("GD_TEST_DATA names no folder with real text")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.join(folder, "tiktoken_cache"))
    return Path(folder)


@pytest.fixture
def cli(capsys):
    """cli(main, *words) -> (exit status, stdout, stderr) of main(words=words) in this process."""
    def call(main, *words):
        if "sample" in sys.modules:     # it says each note once
            sys.modules["sample"].note.cache_clear()
        status = 0
        try:
            main(words=[str(word) for word in words])
        except SystemExit as e:
            status = e.code or 0
        out, err = capsys.readouterr()
        if isinstance(status, str):     # Python would print it and exit with status 1
            status, err = 1, err + status
        return status, out, err
    return call
