"""docs/index.html: its JavaScript computes what torch computes, and a browser can play with it.

    python -m pytest tests/test_page.py

The method runs in node, the whole page in Chromium; without them their tests are skipped.
"""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT, sharpened

sys.path.insert(0, str(ROOT / "notebooks"))
import gumbel_distill as gd  # noqa: E402
import page  # noqa: E402
from config import resolve, save_checkpoint, weights_id  # noqa: E402

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
T, V = 10, 36


def write_run(folder, **more):
    """Checkpoints of four random models of the maze in a folder; returns the folder."""
    cfg = resolve(gd.Config(**{**CPU, "n_embd": 16, "out_dir": str(folder), **more}))
    tokenizer = gd.load_data(cfg).tokenizer
    torch.manual_seed(0)
    teacher = sharpened(gd.Teacher(cfg, tokenizer), scale=10.0)
    models = [teacher]
    for name in page.MODELS[1:]:
        models.append(sharpened(gd.new_student(cfg, name, tokenizer.vocab_size), scale=10.0))
    for model in models:
        save_checkpoint(f"{folder}/{model.name}.pt", {"ema": model}, name=model.name,
                        config=vars(cfg), tokenizer=tokenizer.state,
                        settings={"teacher": weights_id(teacher)})
    return folder


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The page of random models, as a file."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    path = folder / "index.html"
    path.write_text(page.build(folder))
    return path


@pytest.fixture(scope="module")
def models(html):
    """The models of this page in torch, with the weights that the page has."""
    rounded = {}
    for model in page.load_models(html.parent):
        for p in model.parameters():
            scales, levels = page.round_weights(torch.atleast_2d(p))
            p.copy_((levels * torch.tensor(scales)[:, None]).view_as(p))
        rounded[model.name] = model
    return rounded


def script(html, name):
    """The text of the page's script of that name."""
    return re.search(f'<script id="{name}".*?>(.*?)</script>', html.read_text(), re.S)[1]


def in_node(html, code, **given):
    """What the JavaScript `code` returns, with the page's method, `nets` and the `given` values."""
    if not NODE:
        pytest.skip("there is no node here")
    values = {"content": json.loads(script(html, "data")), **given}
    lines = [script(html, "method"), "const run = (nets, given) => {", code, "};",
             'const given = JSON.parse(require("fs").readFileSync(0));', "const nets = {};",
             "for (const [name, model] of Object.entries(given.content.models))",
             "  nets[name] = load_model(model);",
             "const plain = (key, x) => ArrayBuffer.isView(x) ? [...x] : x;",
             "console.log(JSON.stringify(run(nets, given), plain));"]
    done = subprocess.run([NODE, "-e", "\n".join(lines)], input=json.dumps(values), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_teachers_log_probabilities_are_those_of_torch(html, models):
    g = gd.rng("texts")
    x0 = torch.randint(V, (100, T), generator=g)
    answer = in_node(html, "return serial_extraction(nets.teacher, given.xi, 100, given.x0).logp",
                     x0=x0.flatten().tolist(), xi=[[0.0] * V] * (100 * T))
    logp = models["teacher"](x0).view(100 * T, V)
    assert logp.std() > 0.5                                     # they do depend on the text
    torch.testing.assert_close(torch.tensor(answer), logp, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", page.MODELS[1:])
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


SETTINGS = list(itertools.product((1, 3, 10), (1.0, 0.7), (0.0, 0.8)))    # steps, tau, temperature


def test_the_same_noise_gives_the_same_paths(html, models):
    xi, u = gd.sequence_noise("page", torch.arange(10), T, models["mdlm"])
    code = """
    const texts = {teacher: serial_extraction(nets.teacher, given.xi, 10).x0};
    for (const name of ["mdlm", "gumbel", "gumbel-draft"])
      texts[name] = given.settings.map(([steps, tau, temperature]) =>
        sample(nets[name], given.xi, given.u, steps, tau, temperature));
    return texts"""
    answer = in_node(html, code, xi=xi.flatten(0, 1).tolist(), settings=SETTINGS,
                     u=[u[:, k].flatten().tolist() for k in (0, 1)])
    assert answer["teacher"] == gd.serial_extraction(models["teacher"], xi).flatten().tolist()
    for name in page.MODELS[1:]:
        for (steps, tau, temperature), text in zip(SETTINGS, answer[name]):
            student = models[name]
            predict = student
            if name == "mdlm":  # the page draws its tokens by Gumbel-Max with the same noise
                def predict(xt, noise):
                    return models["mdlm"](xt) + noise
                temperature = 0.0
            x = torch.full((10, T), V)
            with torch.no_grad():
                gd.denoise(predict, x, xi, u, steps, tau, temperature)
            assert text == x.flatten().tolist(), (name, steps, tau, temperature)


def test_the_pages_noise_is_gumbel_noise(html):
    code = """
    const rows = Array.from({length: 3000}, (_, i) => sequence_noise(`n${i}`, 1, 5));
    const logp = [0.5, 0.2, 0.2, 0.05, 0.05].map(Math.log), g = rng("posterior");
    const tokens = rows.map(({xi}) => argmax(plus(logp, xi[0])));
    const posterior = tokens.map(token => posterior_gumbel(logp, token, g));
    return {xi: rows.map(row => row.xi[0]), u: rows.map(row => row.u[0][0]), tokens, posterior,
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
    assert abs(torch.tensor(answer["u"]).mean() - 0.5) < 0.02


def test_weights_survive_their_text(html, models):
    code = "return Object.fromEntries(Object.entries(nets.gumbel).filter(([, w]) => w.flat))"
    answer = in_node(html, code)
    for name, w in models["gumbel"].state_dict().items():
        there = torch.tensor(answer[name])
        torch.testing.assert_close(there, w.reshape(there.shape), atol=1e-6, rtol=1e-5)


def test_a_weight_is_rounded_by_half_a_level_at_most():
    w = torch.randn(50, 64, generator=gd.rng("weights"))
    w[3] = 0
    scales, levels = page.round_weights(w)
    error = (levels * torch.tensor(scales)[:, None] - w).abs().amax(dim=1)
    assert (error <= torch.tensor(scales) * 0.75).all() and levels.abs().max() <= page.LEVELS
    text = page.encode(torch.arange(-page.LEVELS, page.LEVELS + 1))
    assert len(set(text)) == len(text)
    assert not set(text) & set('<"\\')                          # they end a script or a string


@pytest.mark.parametrize("break_it", ["empty", "cities", "foreign"])
def test_a_folder_that_does_not_fit_ends_in_one_line(tmp_path, cli, monkeypatch, break_it):
    folder = tmp_path / "run"
    folder.mkdir()
    if break_it == "foreign":                                   # a student of another teacher
        write_run(folder)
        (tmp_path / "other").mkdir()
        write_run(tmp_path / "other", n_head=1, seed=1)
        model = torch.load(tmp_path / "other" / "mdlm.pt")
        model["settings"] = {"teacher": "another"}
        torch.save(model, folder / "mdlm.pt")
    if break_it == "cities":
        write_run(folder)
        saved = torch.load(folder / "teacher.pt")
        saved["config"]["dataset"] = "cities"
        torch.save(saved, folder / "teacher.pt")
    target = tmp_path / "index.html"
    status, _, err = cli(page.main, folder, "--to", target)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert not target.exists()


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
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self("Page.navigate", url=path.as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self.read())

    def seen(self, *methods):
        return [event for event in self.events if event["method"] in methods]

    def js(self, code):
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector):
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.js(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def key(self, name, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, text=text,
                 windowsVirtualKeyCode=code)

    def screenshot(self, path):
        """For the eye: the whole page as a PNG."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        shot = self("Page.captureScreenshot", captureBeyondViewport=True,
                    clip=dict(size, scale=1))
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.session = {}
        self("Browser.close")
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("there is no chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


XI = "noise.xi.map(row => [...row])"
PATHS = "MODELS.map(name => answers[name].path)"


@pytest.mark.parametrize("width, dark", itertools.product((360, 1400), (False, True)))
def test_the_page_opens_without_error_network_or_overflow(browser, html, width, dark):
    browser.open(html, width, dark)
    paths = browser.js(PATHS)
    assert len(paths) == 4 and all(len(path) == T for path in paths)
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    content, room = browser.js(widths)
    assert content == room
    assert not browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    urls = [e["params"]["request"]["url"] for e in browser.seen("Network.requestWillBeSent")]
    assert not [url for url in urls if url.startswith(("http", "ws", "ftp"))]


def test_a_click_on_a_cell_of_a_path_changes_the_noise_of_its_position_only(browser, html):
    browser.open(html)
    path, xi = browser.js("answers.gumbel.path"), browser.js(XI)
    cell = path[3]
    browser.click(f".model:nth-child(3) .cells button:nth-child({cell + 1})")
    i = browser.js("position")
    assert path[i] == cell
    changed = [k for k, row in enumerate(browser.js(XI)) if row != xi[k]]
    assert changed == [i]
    browser.click("#undo")
    assert browser.js(XI) == xi and browser.js("answers.gumbel.path") == path


def test_a_click_on_another_cell_makes_the_teacher_go_there(browser, html):
    browser.open(html)
    for cell in (7, 20, 34):
        if cell in browser.js("answers.teacher.path"):
            continue
        browser.click(f".model:nth-child(1) .cells button:nth-child({cell + 1})")
        assert browser.js(f"answers.teacher.path[{cell // 6 + cell % 6 - 1}]") == cell


def test_the_keyboard_alone_reaches_every_change(browser, html):
    browser.open(html)
    xi = browser.js(XI)
    browser.js("document.querySelector('.cells button').focus()")
    for name, code in [("ArrowRight", 39), ("ArrowDown", 40), ("Enter", 13)]:
        browser.key(name, code, "\r" if name == "Enter" else "")
    assert browser.js("document.activeElement === $('mazes').querySelectorAll('button')[7]")
    assert browser.js(XI) != xi                                 # cell 7 was clicked
    browser.js("$('steps').focus()")
    browser.key("ArrowRight", 39)
    assert browser.js("$('steps-out').textContent") == "2"
    xi = browser.js(XI)
    browser.js("document.querySelector('.track input').focus()")
    browser.key("ArrowRight", 39)
    changed = [i for i, (a, b) in enumerate(zip(sum(browser.js(XI), []), sum(xi, []))) if a != b]
    assert len(changed) == 1                                    # one token's noise
    assert browser.js("document.activeElement.type") == "range"
    browser.js("$('new').focus()")
    browser.key("Enter", 13, "\r")
    assert browser.js("seed") == 2


def test_a_handle_dragged_to_the_right_wins(browser, html):
    browser.open(html)
    token = browser.js("""(() => {
      const row = [...document.querySelectorAll('#bars tbody tr')].find(row => !row.className);
      const input = row.querySelector("input");
      input.value = 8;
      input.dispatchEvent(new Event("input"));
      input.dispatchEvent(new Event("change"));
      return Number(row.dataset.token);
    })()""")
    assert browser.js("answers.teacher.path[position]") == token
    assert browser.js("answers.mdlm.path[position]") in browser.js("tokens_shown()")


def test_the_film_ends_with_the_whole_paths(browser, html):
    browser.open(html)
    end = browser.js("$('mazes').innerHTML")
    browser.js("$('steps').value = 5; $('film').click()")
    assert "step 0 of 5" in browser.js("$('mazes').textContent")
    browser.js("$('film').click(); $('steps').value = 1; answer(); show()")
    assert browser.js("$('mazes').innerHTML") == end


def test_the_counter_counts_valid_paths_and_their_distance(browser, html):
    browser.open(html)
    browser.js("serial_extraction = (net, xi, B) =>"            # nine right paths, and a wrong one
               " ({x0: [...content.paths.slice(0, B - 1), content.paths[0].map(() => 3)].flat()})")
    browser.js("count()")
    run = browser.js("({n: runs[0].n, valid: runs[0].valid, counts: runs[0].counts,"
                     " tv: tv(runs[0], 'teacher')})")
    assert run["n"]["teacher"] == 1000
    counts = torch.tensor(run["counts"]["teacher"]).numpy()
    assert run["valid"]["teacher"] == counts.sum() == 900
    assert run["tv"] == pytest.approx(page.data.total_variation(counts, 100))


def test_a_browser_without_a_feature_is_told_which(browser, html):
    cut = browser("Page.addScriptToEvaluateOnNewDocument",
                  source="delete String.prototype.replaceAll")
    browser.open(html)
    assert "String.replaceAll" in browser.js("$('stop').textContent")
    assert not browser.seen("Runtime.exceptionThrown")
    browser("Page.removeScriptToEvaluateOnNewDocument", identifier=cut["identifier"])
