"""What the chapters share, and a command for those who teach, and for the README's pictures.

    python notebooks/classroom.py --run out/maze --to out        # out/hero.png, of that run
    python notebooks/classroom.py --gif                          # out/maze.gif, likewise
    python notebooks/classroom.py --hand-out FOLDER              # the chapters without answers
    python notebooks/classroom.py --models       # packs out/maze into notebooks/models/maze
    python notebooks/classroom.py --address https://github.com/you/project       # badges for Colab
"""

import argparse
import copy
import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

from drawings import BLUE, GREEN, GREY, MASK, PURPLE, RED, ROOT, STYLE  # noqa: F401
from drawings import curve, draw, draw_all, gd, label, on_grid, plt, write_gif  # noqa: F401
import data
import exact
import sample

NOTEBOOKS = ROOT / "notebooks"
MODELS = NOTEBOOKS / "models"
CHAPTERS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def where(name):
    """Settings: the folder out/NAME of a training in a chapter. The tests set GD_SMALL to another
    folder; there the training is short."""
    if "GD_SMALL" in os.environ:
        return dict(out_dir=f"{os.environ['GD_SMALL']}/{name}", max_steps=4, batch_size=8)
    return dict(out_dir=os.path.relpath(ROOT / "out" / name))


def size(n):
    """The number of samples: n, or a few in the tests."""
    return n // 200 + 4 if "GD_SMALL" in os.environ else n


def load_models(*names, of="maze"):
    """The models of these names in the folder models/OF, which come with the course."""
    models = [sample.load_model(MODELS / of / f"{name}.pt")[0] for name in names]
    for name, model in zip(names, models):
        model.name = name
    return models


def load_saved(name, of="maze"):
    """The Tokenizer of such a model, and all that its checkpoint holds."""
    return sample.load_model(MODELS / of / f"{name}.pt")[1:]


def load_cities():
    """The data set of toy sentences."""
    return data.config_of("cities", gd.Config)().load()


def at_temperature(student, temperature):
    """A copy of a student that draws its tokens at this temperature; 0 is the argmax."""
    other = copy.copy(student)
    other.draw = functools.partial(sample.nucleus, temperature=temperature)
    return other


def texts_of(teacher, n, seq_len):
    """n texts that a teacher writes, as data to train on; the last tenth is for validation."""
    x = gd.generate(teacher, size(n), seq_len, "texts of the teacher")     # (n, T)
    train, val = x[:-(len(x) // 10)], x[-(len(x) // 10):]
    return SimpleNamespace(n_train=len(train), rows=lambda index: train[index], val=val,
                           fingerprint="texts of the teacher", tokenizer={})


def entropy(x):
    """Mean over texts (N, T) of the entropy of their tokens' counts, in nats."""
    return data.Data.judge(None, x)["entropy"]


# -----------------------------------------------------------------------------
# Exercises: each has a test of the answer, by a hash or by a computed value, and a hint
def plain(answer):
    """An answer as text: numbers with three digits, a set in its order, small letters."""
    if hasattr(answer, "item"):                                 # a tensor of one number
        answer = answer.item()
    if isinstance(answer, set):
        return "{" + " ".join(sorted(map(plain, answer))) + "}"
    if isinstance(answer, (list, tuple)):
        return " ".join(map(plain, answer))
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return f"{answer:.3f}"
    return str(answer).strip().lower()


def has_digest(right, values=lambda answer: answer):
    """A test by a hash of the answer, or of values that it gives. No one reads them from a hash."""
    return lambda answer: hashlib.sha256(plain(values(answer)).encode()).hexdigest()[:10] == right


FIVE = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05]).log()       # logp (V,) of chapter 1


def draws_colder(sampler, n=20_000):
    """1.1: the tokens are those of the argmax, so the noise decides them. A tie may be broken."""
    xi = gd.sample_gumbel((n, 5), gd.rng("exercise"))
    return (sampler(FIVE, xi) == (2 * FIVE + xi).argmax(dim=-1)).double().mean() > 0.999


def is_mean_of_maximum(number, n=100_000):
    """1.2: the mean of max(logp + xi), here with one token of probability 1."""
    return abs(number - gd.sample_gumbel((n,), gd.rng("exercise")).mean()) < 0.015


def is_straight(inequality, n=5000):
    """1.4: it holds for all noise of Theorem 4.1, and for half of the noise that is independent."""
    g, rows = gd.rng("exercise"), FIVE.expand(n, 5)
    by_theorem = [gd.posterior_gumbel(rows, torch.full((n,), k), g) for k in (0, 3)]
    independent = gd.sample_gumbel((2, n, 5), g)
    share = inequality(*independent, 0, 3).double().mean()
    return inequality(*by_theorem, 0, 3).all() and 0.45 < share < 0.55


def is_valid_by_chance(number):
    """2.2: ten independent draws, each from its own distribution, are a path."""
    paths = gd.Maze().paths                                     # (51, 10)
    share = (paths[:, None] == paths).double().mean(dim=0)      # (51, 10), of each cell of a path
    return abs(number - share.prod(dim=1).sum()) < 1e-4


def is_loss(loss):
    """3.2: the loss of a batch. Its value and those of usual slips are printed, too."""
    x0, t, g = gd.Maze().paths[:8], torch.linspace(0.2, 0.9, 8)[:, None], gd.rng("exercise")
    xt = gd.q_sample(x0, t, MASK, g)
    target, t_each = x0[xt == MASK], t.expand_as(x0)[xt == MASK]           # (M,) each
    logits = torch.randn(len(target), MASK, generator=g)
    nll = -logits.log_softmax(dim=-1)[range(len(target)), target]
    yours = loss(logits, x0, xt, t)
    if yours is None:
        raise ValueError("your function returns nothing")
    values = {"yours": yours, "right": (nll / t_each).sum() / x0.numel(),
              "without 1/t": nll.sum() / x0.numel(), "divided by M": (nll / t_each).mean()}
    print("; ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return abs(values["yours"] - values["right"]) < 1e-4


def counts_texts(count):
    """3.3: how many of 1,000 texts differ, at three sizes of the noise. A seed changes it a bit."""
    ours, = load_models("gumbel-draft")
    right = {tau: len(gd.generate(ours, 1000, 10, nfe=1, tau=tau).unique(dim=0))
             for tau in (0.0, 0.5, 1.0)}
    return all(abs(count(tau) / right[tau] - 1) < 0.2 for tau in right)


def is_break_even(number):
    """3.4: what a call of the student may cost, in calls of the teacher."""
    teacher, ours = load_models("teacher", "gumbel-draft")
    xi, _ = gd.sequence_noise(0, torch.arange(size(1000)), 10, teacher)
    rounds = [exact.draft_and_verify(student, teacher, xi)[1].double().mean()
              for student in (None, ours)]
    return abs(number - (rounds[0] / rounds[1] - 1)) < 0.05


def reads_a_curve(nll_at):
    """4.3: the NLL at an entropy between two points of a curve."""
    points = (("a", 4, 3.0, 5.0), ("a", 4, 4.0, 7.0), ("a", 4, 3.5, 5.5), ("a", 1, 3.2, 9.0),
              ("b", 4, 3.2, 1.0))
    rows = [dict(zip(("model", "nfe", "entropy", "nll"), point)) for point in points]
    return abs(nll_at(rows, "a", 4, 3.2) - 5.2) + abs(nll_at(rows, "a", 4, 3.75) - 6.25) < 1e-5


def is_bound_of_borders(bound):
    """6.1: how often a shared u agrees at least, by the places of the borders."""
    p = torch.full((1, 10), 0.1)
    q = p + torch.tensor([-0.004, 0.004]).repeat_interleave(5)
    pairs = torch.rand(2, 50, 4, generator=gd.rng("exercise")).softmax(dim=-1)
    shift = (pairs[0].cumsum(dim=-1) - pairs[1].cumsum(dim=-1)).abs()
    is_right = (bound(*pairs) - 1 + shift.sum(dim=-1)).abs().max() < 1e-4
    return is_right and abs(bound(p, q) - 0.9) < 1e-4


def is_gumbel_agreement(number, n=40_000):
    """6.3: how often the argmax of two models with shared Gumbel noise is one token."""
    xi = gd.sample_gumbel((n, 3), gd.rng("exercise"))
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    tokens = [(p.log() + xi).argmax(dim=-1), (q.log() + xi).argmax(dim=-1)]
    return abs(number - (tokens[0] == tokens[1]).double().mean()) < 0.015


EXERCISES = {
    "1.1": (draws_colder, "xi decides the token. What is doubled, and what is not?"),
    "1.2": (is_mean_of_maximum, "Average (logp + xi).amax(-1) over the draws above. The number is "
            "named after Euler."),
    "1.3": (has_digest("44136fa355"), "A likely loser must have smaller noise than a rare one. "
            "Does the winner stay on top? The answer is a set."),
    "1.4": (is_straight, "Write down that k1 beats k2 in the first row, and that k2 beats k1 in "
            "the second. Add the two. The answer is a function of one, two, k1, k2."),
    "2.1": (has_digest("a8daa0f42c", lambda pair: [*map(pair[0], (0.0, 0.5, 0.8)), pair[1]]),
            "Add the probabilities of ABAB and of BABA. The answer is a pair: a function of a, and "
            "the a at which it is smallest."),
    "2.2": (is_valid_by_chance, "Multiply true_p[i, path[i]] along a path; add up. Four decimals."),
    "2.3": (has_digest("b07c03b413"), "Half the sum of |share - 1/51| over the 51 paths."),
    "3.1": (has_digest("1705701365"), "Which of them was made by reading the masked tokens?"),
    "3.2": (is_loss, "The cross-entropy of a masked token counts 1/t. Divide the sum by B T."),
    "3.3": (counts_texts, "A function of tau: generate with "
            "gd.generate(ours, 1000, 10, nfe=1, tau=tau), and count the rows of unique(dim=0)."),
    "3.4": (is_break_even, "A round with a student costs 1 + c, a round without one costs 1. "
            "Multiply by the mean numbers of rounds."),
    "4.1": (has_digest("399d0c7e69"), "A number. How many blocks? Each takes its own steps."),
    "4.2": (has_digest("ec7eb527d8"), "Each block is one token. Which tokens does the model see?"),
    "4.3": (reads_a_curve, "Keep the rows of this model and nfe, sort them by entropy, and "
            "interpolate (numpy.interp). The answer is a function of rows, model, nfe, entropy."),
    "5.1": (has_digest("93cd75cb26"), "Token i + 2 depends on the tokens i and i + 1. What decides "
            "these? The answer is a set."),
    "5.2": (has_digest("dadcc89cf1", lambda mean: [mean([0.5, 0.5]), mean([1, 0.9, 0.5])]),
            "The guess of head k stays if the heads 1 to k are all right: multiply."),
    "5.3": (has_digest("baada11eca"), "What does a guess without noise do? And what does the "
            "teacher do with xi? The answer is two numbers."),
    "5.4": (has_digest("7681a09eb4"), "Compare the rows no noise and noise added: a set."),
    "6.1": (is_bound_of_borders, "F is p.cumsum(dim=-1). Take the distance of the two places of "
            "each border, and add up over the borders."),
    "6.2": (has_digest("2496861e08"), "Which distribution has 1 - u? And which token does the "
            "teacher pick at 1 - u? The answer is a set."),
    "6.3": (is_gumbel_agreement, "Token k has 1 / sum_j max(p_j / p_k, q_j / q_k). Add up."),
}


def check(number, answer):
    """Say if an answer to an exercise is right. A wrong one, of whatever type, gets the hint."""
    is_right, hint = EXERCISES[number]
    if answer is None:
        print(f"{number}: no answer yet")
        return
    try:
        verdict = "right!" if is_right(answer) else f"not yet. {hint}"
    except Exception as e:                                      # a wrong type fails in many ways
        verdict = f"not yet ({type(e).__name__}: {e}). {hint}"
    print(f"{number}: {verdict}")


# -----------------------------------------------------------------------------
# For those who teach: what goes to the class, the models, the badges, the README's picture
HANDED = "*.py *.toml LICENSE docs/index.html notebooks/[cd]*.py notebooks/models/*/*.pt".split()
CLASS_README = """# Gumbel Distillation: a course of six chapters
Install it in this folder with `pip install -e ".[dev]" notebook` (Python 3.10 or newer), and start
`jupyter notebook`. Take the chapters of the folder notebooks in order. Answer each question before
you run the cell below it. In an exercise, replace `None` by your answer: `check` says "right!", or
"not yet" with a hint. docs/index.html is a page to play with. classroom.py has solutions.
"""


def write_chapter(book, path):
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def hand_out(folder):
    """Write the chapters as a class gets them: without outputs, folded answers, and cells that have
    the tag "answer". What they import lies where it lies here; result tables and links are out."""
    if folder.exists():
        raise gd.UserError(f"--hand-out {folder}: is there already; name a new folder")
    for path in [path for pattern in HANDED for path in ROOT.glob(pattern)]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in CHAPTERS:
        book = json.loads(path.read_text(encoding="utf-8"))
        book["cells"] = [c for c in book["cells"] if "answer" not in c["metadata"].get("tags", ())
                         and not "".join(c["source"]).startswith("<details>")]
        for cell in book["cells"]:
            cell["source"] = re.sub(r" \(\[[^]]+]\(../docs/\w+.md\)\)", "", "".join(cell["source"]))
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        write_chapter(book, folder / path.relative_to(ROOT))
    (folder / "README.md").write_text(CLASS_README, encoding="utf-8")
    return folder / "notebooks"


def pack_models(run):
    """The models of a run's folder out/NAME into notebooks/models/NAME: the averaged weights alone,
    in half precision, half a megabyte each."""
    folder = MODELS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["teacher", *sorted({path.stem for path in run.glob("*.pt")} - {"teacher"})]:
        saved = torch.load(run / f"{name}.pt", map_location="cpu", weights_only=True)
        with_words(saved)
        saved["ema"] = {key: weight.half() for key, weight in saved["ema"].items()}
        saved["config"].update(train_files="", val_files="")
        if name != "teacher":  # a student belongs to the teacher as it is rounded here
            saved["about"]["teacher"] = gd.fingerprint(load_models("teacher", of=run.name)[0])
        del saved["model"], saved["optimizer"]
        torch.save(saved, folder / f"{name}.pt")
    return folder


def with_words(saved):
    """Give a checkpoint a list of its pieces in place of GPT-2's BPE: it opens without a network.
    With a list BOS has an input row of its own, a teacher's last one: that of <|endoftext|>."""
    tokens = data.Tokenizer(**saved["tokenizer"])
    if tokens.words is None:
        saved["tokenizer"] = dict(words=[tokens.decode([i]) for i in range(tokens.vocab_size)])
        if saved["name"] == "teacher":
            saved["ema"]["net.embed.weight"][-1] = saved["ema"]["net.embed.weight"][tokens.bos_id]


def add_badges(address):
    """Give each chapter a badge that opens it in Colab, and a cell that fetches the project there.
    address: the project's on GitHub. An older badge and cell are replaced."""
    place = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not place:
        raise gd.UserError(f"--address {address}: must look like https://github.com/you/project")
    colab = "https://colab.research.google.com"
    for path in CHAPTERS:
        book = json.loads(path.read_text(encoding="utf-8"))
        cells = [c for c in book["cells"] if "hosted" not in c["metadata"]]
        link = f"{colab}/github/{place[1]}/blob/main/notebooks/{path.name}"
        badge = dict(cell_type="markdown", id="badge", metadata={"hosted": True},
                     source=f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({link})")
        fetch = dict(cell_type="code", id="fetch", metadata={"hosted": True}, outputs=[],
                     execution_count=None, source="![ -e classroom.py ] || (git clone -q "
                     f"{address} project && pip install -q -e project)")
        write_chapter(dict(book, cells=[cells[0], badge, fetch, *cells[1:]]), path)
    return NOTEBOOKS


def draw_hero(run, path):
    """Valid paths and their distance from the truth, against the steps, of a run's students."""
    mdlm, paper, ours = load_models("mdlm", "gumbel", "gumbel-draft", of=run)
    greedy, rows = at_temperature(mdlm, 0), []
    greedy.name = "mdlm-argmax"
    for model in (mdlm, greedy, paper, ours):
        for nfe in (1, 2, 3, 5, 10):
            x = gd.generate(model, size(3000), 10, nfe=nfe)
            rows.append(dict(model=model.name, nfe=nfe, **gd.Maze().judge(x)))
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.9), layout="constrained")
    curve(axes[0], rows, "valid", "share of valid paths")
    curve(axes[1], rows, "tv", "distance from the truth (tv)")
    axes[1].axhline(0.05, color="black", lw=1, ls="--", label="as many exact draws")
    plt.setp(axes, ylim=(0, 1.04))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=200)


def main(words=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    for flag in ("--gif", "--models"):
        parser.add_argument(flag, action="store_true")
    for flag, default in dict(hand_out=None, run="out/maze", to="out").items():
        parser.add_argument("--" + flag.replace("_", "-"), default=default, type=Path)
    parser.add_argument("--address")
    args = parser.parse_args(words)
    plt.switch_backend("Agg")
    run = args.run.resolve()
    if args.hand_out:
        written = hand_out(args.hand_out)
    elif args.address:
        written = add_badges(args.address)
    elif args.models:
        written = pack_models(run)
    elif args.gif:
        written = args.to / "maze.gif"
        write_gif(load_models("mdlm", "gumbel", "gumbel-draft", of=run), 5, 3, written)
    else:
        written = args.to / "hero.png"
        draw_hero(run, written)
    print(written)


if __name__ == "__main__":
    main()
