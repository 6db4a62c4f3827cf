"""docs/index.html: its JavaScript computes what torch computes, and a browser can play with it.

The method runs in node, the whole page in Chromium; without them their tests are skipped."""

import copy
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STUDENTS, sharpened, tiny_config

sys.path.insert(0, str(ROOT / "notebooks"))
import gumbel_distill as gd  # noqa: E402
import page  # noqa: E402
import sample  # noqa: E402

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
T, V = 10, 36


def write_run(folder, dataset="maze"):
    """Checkpoints of four random models of the maze in a folder."""
    cfg = tiny_config(dataset=dataset, seq_len=T, n_layer=4, out_dir=str(folder))
    torch.manual_seed(0)
    models = {"teacher": gd.Teacher(cfg, V, V)}
    models.update({name: kind(cfg, V) for name, kind in STUDENTS.items()})
    for name, model in models.items():
        sharpened(model, scale=10.0).float().requires_grad_(False)
        about = dict(teacher=gd.fingerprint(models["teacher"]))
        torch.save(dict(name=name, about=about, config=vars(cfg), tokenizer=gd.Maze.tokenizer,
                        ema=model.state_dict()), folder / f"{name}.pt")


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The page of random models, as a file."""
    path = tmp_path_factory.mktemp("run") / "index.html"
    write_run(path.parent)
    path.write_text(page.build(path.parent))
    return path


@pytest.fixture(scope="module")
def models(html):
    """The models of this page in torch, with the weights that the page has."""
    models, _ = page.load_models(html.parent)
    for model in models.values():
        for p in model.parameters():
            scales, levels = page.round_weights(torch.atleast_2d(p))
            p.copy_((levels * scales[:, None]).view_as(p))
    return models


def in_node(html, code, **given):
    """What the JavaScript `code` returns, with the page's method, `nets` and the `given` values."""
    if not NODE:
        pytest.skip("there is no node here")
    data, method = [re.search(f'<script id="{name}".*?>(.*?)</script>', html.read_text(), re.S)[1]
                    for name in ("data", "method")]
    values = {"content": json.loads(data), **given}
    lines = [method, "const run = (nets, given) => {", code, "};",
             'const given = JSON.parse(require("fs").readFileSync(0));', "const nets = {};",
             "for (const [name, model] of Object.entries(given.content.models))",
             "  nets[name] = load_model(model, given.content.alphabet);",
             "const plain = (key, x) => ArrayBuffer.isView(x) ? [...x] : x;",
             "console.log(JSON.stringify(run(nets, given), plain));"]
    done = subprocess.run([NODE, "-e", "\n".join(lines)], input=json.dumps(values), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_teachers_log_probabilities_are_those_of_torch(html, models):
    x0 = torch.randint(V, (100, T), generator=gd.rng("texts"))
    answer = in_node(html, "return serial_extraction(nets.teacher, given.xi, 100, given.x0).logp",
                     x0=x0.flatten().tolist(), xi=[[0.0] * V] * (100 * T))
    teacher = models["teacher"]
    logp = teacher.logp(teacher.hidden(x0)).flatten(0, 1)       # (100 T, V)
    assert logp.std() > 0.5                                     # they do depend on the text
    torch.testing.assert_close(torch.tensor(answer), logp, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_logits_are_those_of_torch(html, models, name):
    g = gd.rng("masked texts", name)
    xt = torch.randint(V, (100, T), generator=g)
    xt = gd.q_sample(xt, torch.rand(100, 1, generator=g), V, g)
    xi = gd.sample_gumbel((int((xt == V).sum()), V), g)
    answer = in_node(html, "return student(nets[given.name], given.xt, given.xi).logits",
                     name=name, xt=xt.flatten().tolist(), xi=xi.tolist())
    logits = models[name](xt, xi)
    assert logits.std() > 0.5
    torch.testing.assert_close(torch.tensor(answer), logits, atol=1e-3, rtol=0)


def test_the_same_noise_gives_the_same_paths(html, models):
    xi, u = gd.sequence_noise("page", torch.arange(10), T, models["mdlm"])
    settings = list(itertools.product((1, 3, 10), (1.0, 0.7), (0.0, 0.8)))
    code = """
    const texts = {teacher: serial_extraction(nets.teacher, given.xi, 10).x0};
    for (const name of ["mdlm", "gumbel", "gumbel-draft"])
      texts[name] = given.settings.map(([steps, tau, temperature]) =>
        sample(nets[name], given.xi, given.u, steps, tau, temperature));
    return texts"""
    answer = in_node(html, code, xi=xi.flatten(0, 1).tolist(), settings=settings,
                     u=[u[:, k].flatten().tolist() for k in (0, 1)])
    masked = torch.full((10, T), V)
    assert answer["teacher"] == models["teacher"].write(masked, xi).flatten().tolist()
    for name, (i, (steps, tau, temperature)) in itertools.product(STUDENTS, enumerate(settings)):
        student = models[name]
        if name == "mdlm":  # the page draws its tokens by Gumbel-Max with the same noise
            temperature, student = 0.0, copy.copy(student)
            student.forward = lambda xt, noise: models["mdlm"](xt) + noise
        student.draw = functools.partial(sample.nucleus, temperature=temperature)
        x = student.write(masked, tau * xi, u, steps)
        assert answer[name][i] == x.flatten().tolist(), (name, steps, tau, temperature)


def test_the_pages_noise_is_gumbel_noise(html):
    code = """
    const rows = Array.from({length: 3000}, (_, i) => sequence_noise(`n${i}`, 1, 5));
    const logp = [0.5, 0.2, 0.2, 0.05, 0.05].map(Math.log), g = rng("posterior");
    const tokens = rows.map(({xi}) => argmax(plus(logp, xi[0])));
    const posterior = tokens.map(token => posterior_gumbel(logp, token, g));
    return {xi: rows.map(row => row.xi[0]), tokens, posterior,
            winners: posterior.map(xi => argmax(plus(logp, xi)))}"""
    answer = in_node(html, code)
    for name in ("xi", "posterior"):                            # both are iid Gumbel(0, 1)
        xi = torch.tensor(answer[name])
        cdf = (-(-xi).exp()).exp().flatten().sort().values
        gap = (cdf - torch.linspace(0, 1, len(cdf))).abs().max()
        assert gap < 1.63 / len(cdf)**0.5, name                 # Kolmogorov-Smirnov, 1 %
        correlation = torch.corrcoef(xi.T) - torch.eye(5)
        assert correlation.abs().max() < 0.08, name
    assert answer["winners"] == answer["tokens"]                # Theorem 4.1
    share = torch.tensor(answer["tokens"]).bincount(minlength=5) / 3000
    assert (share - torch.tensor([0.5, 0.2, 0.2, 0.05, 0.05])).abs().max() < 0.035


def test_a_page_shows_a_teacher_of_the_maze_and_its_own_students(tmp_path, html):
    write_run(tmp_path, dataset="cities")
    with pytest.raises(SystemExit, match="trained on cities"):
        page.build(tmp_path)
    saved = torch.load(html.parent / "mdlm.pt")
    saved["about"]["teacher"] = "another"
    for path in html.parent.glob("*.pt"):
        shutil.copy(path, tmp_path)
    torch.save(saved, tmp_path / "mdlm.pt")
    with pytest.raises(SystemExit, match="another teacher"):
        page.build(tmp_path)


def test_the_stored_page_is_that_of_the_models_of_the_course():
    stored = (ROOT / "docs" / "index.html").read_text(encoding="utf-8")
    is_fresh = stored == page.build(ROOT / "notebooks" / "models" / "maze")
    assert is_fresh, "run python notebooks/page.py"
    assert len(stored.encode()) <= 600_000


# -----------------------------------------------------------------------------
# In a browser
FLAGS = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --remote-debugging-pipe").split()


class Browser:
    """Chromium, driven by its DevTools protocol over two pipes; it reads from 3 and writes to 4."""

    def __init__(self, folder):
        read, self.to = os.pipe()
        self.back, write = os.pipe()
        for end in (read, write):
            os.set_inheritable(end, True)
        command = f'exec "$@" 3<&{read} 4>&{write}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.number, self.rest, self.events, self.session = 0, b"", [], {}
        pages = self("Target.getTargets")["targetInfos"]
        target = next(p["targetId"] for p in pages if p["type"] == "page")
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def read(self):
        while b"\0" not in self.rest:
            more = os.read(self.back, 2**20)
            assert more, "the browser has ended"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def __call__(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path, width=1400, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
             mobile=width < 500)
        scheme = "dark" if dark else "light"
        self("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.events = []
        self("Page.navigate", url=path.as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self.read())

    def seen(self, *methods):
        return [event for event in self.events if event["method"] in methods]

    def js(self, code):
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value") if "exceptionDetails" not in answer else answer

    def click(self, selector):
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.js(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("there is no chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.session = {}
    browser("Browser.close")
    browser.process.wait(20)


@pytest.mark.parametrize("width, dark", [(390, False), (820, True), (1400, False)])
def test_the_page_opens_without_error_network_or_overflow(browser, html, width, dark):
    browser.open(html, width, dark)
    paths = browser.js("MODELS.map(name => answers[name].path)")
    assert len(paths) == 4 and all(len(path) == T for path in paths)
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    assert not browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    urls = [e["params"]["request"]["url"] for e in browser.seen("Network.requestWillBeSent")]
    assert not [url for url in urls if url.startswith(("http", "ws", "ftp"))]


def test_a_click_changes_the_noise_of_one_position_and_the_teacher_follows(browser, html):
    browser.open(html)
    read_xi = "noise.xi.map(row => [...row])"
    path, xi = browser.js("answers.gumbel.path"), browser.js(read_xi)
    browser.click(f".model:nth-child(3) .cells button:nth-child({path[3] + 1})")
    i = browser.js("position")
    assert path[i] == path[3]
    assert [k for k, row in enumerate(browser.js(read_xi)) if row != xi[k]] == [i]
    browser.click("#undo")
    assert browser.js(read_xi) == xi and browser.js("answers.gumbel.path") == path
    cell = next(cell for cell in (7, 20, 34) if cell not in browser.js("answers.teacher.path"))
    browser.click(f".model:nth-child(1) .cells button:nth-child({cell + 1})")
    assert browser.js(f"answers.teacher.path[{cell // 6 + cell % 6 - 1}]") == cell


def test_the_tally_counts_turns_with_the_teacher_and_a_setting_resets_it(browser, html):
    browser.open(html)
    browser.js("const real = write; write = (name, ...given) => "   # ours becomes a perfect student
               "real(name === 'gumbel-draft' ? 'teacher' : name, ...given); answer()")
    read = "({...tally, path: answers.teacher.path, ours: tally.with_it['gumbel-draft']})"
    turned, old = 0, browser.js(read)
    for k in range(12):
        browser.click(f"#strip button:nth-child({k % T + 1})")
        new = browser.js(read)
        turned += new["path"] != old["path"]
        assert (new["clicks"], new["turned"], new["ours"]) == (k + 1, turned, turned)
        assert browser.js("$('strip').querySelectorAll('.changed').length") == 1
        last, old = old, new
    assert 0 < turned < 12 and f"turned {turned}." in browser.js("$('tally').textContent")
    browser.click("#undo")
    assert browser.js(read) == last
    browser.js("$('steps').value = 3; $('steps').oninput()")
    browser.click("#undo")
    assert browser.js("tally.clicks") == 0


@pytest.mark.parametrize("width", [390, 820])
def test_headings_are_level_cells_fit_fingers_and_buttons_are_above(browser, html, width):
    browser.open(html, width)
    box = "(query => [...document.querySelectorAll(query)].map(e => e.getBoundingClientRect()))"
    tops = browser.js(f"['.model h2', '.model .maze'].map(s => {box}(s).map(r => r.top))")
    tops = [top[int(width == 390):] for top in tops]            # a phone shows one above three
    assert all(max(top) - min(top) < 1 for top in tops), tops
    assert browser.js(f"{box}('#new, #undo, #film').every(r => r.bottom < {box}('#mazes')[0].top)")
    if width == 390:
        browser.click(".model:nth-child(4) .enlarge")
        assert browser.js(f"{box}('.large .cells button').filter(r => r.width >= 40).length") == V


@pytest.mark.parametrize("typed", ["", "-3", "2.5", "seven", "123456789"])
def test_a_bad_noise_number_changes_nothing_and_is_named(browser, html, typed):
    browser.open(html)
    give = "$('seed').value = {!r}; $('seed').dispatchEvent(new Event('change'))"
    read = "[seed, noise.xi.map(row => [...row]), past.length]"
    before = browser.js(read)
    browser.js(give.format(typed))
    told = browser.js("!$('wrong').hidden && $('wrong').textContent") or []
    assert browser.js(read) == before and typed in told
    assert browser.js(give.format("7") + "; [seed, $('wrong').hidden]") == [7, True]


def test_counting_makes_200_texts_lets_the_page_answer_and_goes_on(browser, html):
    browser.open(html)
    browser.click("#count")
    browser.click("#new")                                       # answered before the count ends
    assert browser.js("seed === 2 && counting && runs[0].texts < 200")
    wait = "new Promise(r => setInterval(() => counting || r(runs[0].texts), 20))"
    assert browser.js(wait) == 200
    browser.click("#more")
    browser.js("new Promise(r => setTimeout(r, 100))")
    browser.click("#count")                                     # Stop
    assert 200 < browser.js(wait) < 1000 and len(browser.js("runs")) == 1
