"""Write docs/reading.html: what the paper says, beside the code that does it.

    python docs/reading.py          # after each change of gumbel_distill.py or of a note

The code is that of gumbel_distill.py, with its line numbers. The words are those of
docs/reading.notes.html, which is the page without the code:

    <article code="Student.loss">   a note, and the names in gumbel_distill.py to set beside it
    $x_i$, $$x = \\frac{1}{t}$$      a formula in a line, and on its own: some TeX, see `atom`
    `Student.loss`                  code; a link, where the page has this name
    {{lm1b.lr}}                     a default setting of the maze or of LM1B
    {{contents}}                    the table of contents
"""

import ast
import html
import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gumbel_distill as gd  # noqa: E402
from data import config_of  # noqa: E402

CONFIGS = {"maze": gd.Config, "lm1b": config_of("lm1b", gd.Config)}
STRING, COMMENT = r'"""[\s\S]*?"""|f?"(?:\\.|[^"\\\n])*"', "#.*"
COLORED = re.compile(rf"(?P<s>{STRING})|(?P<c>{COMMENT})|(?P<k>\b(?:{'|'.join(keyword.kwlist)})\b)")

# --- Formulas: some TeX as MathML -----------------------------------------------------------------
LETTERS = dict(xi="ξ", zeta="ζ", theta="θ", alpha="α", tau="τ", mu="μ", mean="𝔼")
SIGNS = {"sim": "∼", "approx": "≈", "ge": "≥", "lt": "<", "gt": ">", "ne": "≠", "cdot": "·",
         "mid": "∣", "dots": "…", "in": "∈", "notin": "∉", "sum": "∑", "prod": "∏", "-": "−"}
SCRIPTS = {"_": "msub", "^": "msup"}
BIG = ["sum", "prod", "argmax"]             # what is below stands under these
FUNCTIONS = ["log", "min", "argmax", "softmax", "Exp", "Gumbel", "mean"]


def formula(tex):
    """A formula as MathML. Its lines end with \\\\, and their columns are parted by &."""
    if "&" in tex:
        table = ""
        for line in tex.split(r"\\"):
            cells = "".join(f"<mtd>{formula(cell)}</mtd>" for cell in line.split("&"))
            table += f"<mtr>{cells}</mtr>"
        return f"<mtable>{table}</mtable>"
    return row(re.findall(r"\\text\{.*?\}|\\?[A-Za-z]+|\d[\d.]*|\S", tex)[::-1])


def row(tokens):
    """All that comes up to a }, or to the end. The next token is the last of the list."""
    items = []
    while tokens and tokens[-1] != "}":
        name, item = tokens[-1].lstrip("\\"), atom(tokens)
        while tokens and tokens[-1] in SCRIPTS:
            tag = SCRIPTS[tokens.pop()]
            tag = "munder" if name in BIG else tag
            item = f"<{tag}>{item}{atom(tokens)}</{tag}>"
        items.append(item)
        if name in FUNCTIONS and tokens and (name in BIG or tokens[-1] != "("):
            items.append('<mspace width="0.17em"/>')
    return f"<mrow>{''.join(items)}</mrow>"


def atom(tokens):
    """A group in { }, a fraction, a space, text, a number, a letter, or a sign."""
    token = tokens.pop()
    name = token.lstrip("\\")
    if token == "{":
        group = row(tokens)
        tokens.pop()                                            # its }
        if group.startswith("<mrow><mo "):                      # a sign in front needs no space
            group = group.replace("<mo ", '<mo lspace="0" rspace="0" ', 1)
        return group
    if name == "frac":
        return f"<mfrac>{atom(tokens)}{atom(tokens)}</mfrac>"
    if name == "quad":
        return '<mspace width="1em"/>'
    if name.startswith("text"):                                 # MathML would drop outer spaces
        return f"<mtext>{name[5:-1].replace(' ', chr(160))}</mtext>"
    if name[0].isdigit():
        return f"<mn>{name}</mn>"
    if name in SIGNS or not name.isalpha():
        return f'<mo stretchy="false">{html.escape(SIGNS.get(name, name))}</mo>'
    return f"<mi>{LETTERS.get(name, name)}</mi>"


# --- Code and words -------------------------------------------------------------------------------
def find_places(body, prefix=""):
    """{name: the numbers of its lines} of functions, classes, methods and variables."""
    places = {}
    for node in body:
        lines = range(node.lineno - len(getattr(node, "decorator_list", [])), node.end_lineno + 1)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            places[prefix + node.name] = lines
        if isinstance(node, ast.ClassDef):
            places |= find_places(node.body, node.name + ".")
        for target in getattr(node, "targets", []):
            targets = getattr(target, "elts", [target])
            places |= {prefix + ast.unparse(one): lines for one in targets}
    return places


def color(match):
    """A comment, string or keyword in its color, which ends with each line."""
    parts = match[0].split("\n")
    return "\n".join(f'<span class="{match.lastgroup}">{part}</span>' for part in parts)


def words(notes, names):
    """The notes with their settings, formulas and names set."""
    def setting(match):
        value = getattr(CONFIGS[match[1]], match[2])
        return f"{value:,}" if isinstance(value, int) else str(value).strip("()")

    def math(match):
        display = ' display="block"' * match[0].startswith("$$")
        return f"<math{display}>{formula(match[0].strip('$'))}</math>"

    def name(match):
        text = f"<code>{match[1]}</code>"
        return f'<a href="#{match[1]}">{text}</a>' if match[1] in names else text

    notes = re.sub(r"\{\{(maze|lm1b)\.(\w+)\}\}", setting, notes)
    notes = re.sub(r"\$\$?[^$]+\$\$?", math, notes)
    return re.sub(r"`([^`]+)`", name, notes)


def build(source, notes):
    """The page, of the texts of gumbel_distill.py and of the notes."""
    places = find_places(ast.parse(source).body)
    code = COLORED.sub(color, html.escape(source, quote=False)).split("\n")
    parts = re.findall(r'<h2 id="(.*?)">(.*?)</h2>|<article code="(.*?)">', notes)
    names = " ".join(part[2] for part in parts).split()
    gone = [name for name in names if name not in places]
    if gone:
        raise SystemExit(f"docs/reading.notes.html: gumbel_distill.py has no {', '.join(gone)}")

    def listing(name):
        lines, text, before = places[name], "", True
        methods = {i for other in names if other.startswith(name + ".") for i in places[other]}
        for i in lines:
            here = i not in methods and (code[i - 1] or not {i - 1, i + 1} & methods)
            if here:
                text += f'<i data-n="{i}"></i>{code[i - 1]}\n'
            elif before:                                        # methods that stand elsewhere
                text += '<i data-n="…"></i>\n'
            before = here
        where = f"lines {lines[0]} to {lines[-1]}" if len(lines) > 1 else f"line {lines[0]}"
        link = f'<a href="../gumbel_distill.py#L{lines[0]}"><code>{name}</code> {where}</a>'
        return f'{link}<pre tabindex="0">{text}</pre>'

    def article(match):
        first, *others = match[1].split()
        text = f'<article id="{first}"><div class="note">{match[2]}</div><div>'
        text += f"<section>{listing(first)}</section>"
        text += "".join(f'<section id="{name}">{listing(name)}</section>' for name in others)
        return text + "</div></article>"

    contents = ""
    for anchor, title, own in parts:
        contents += f'\n<dt><a href="#{anchor}">{title}</a>' * bool(anchor)
        contents += "".join(f'\n<dd><a href="#{name}">{name}</a>' for name in own.split())
    page = words(notes, names).replace("{{contents}}", contents)
    return re.sub(r'<article code="(.*?)">(.*?)</article>', article, page, flags=re.S)


if __name__ == "__main__":
    page = build((ROOT / "gumbel_distill.py").read_text(encoding="utf-8"),
                 (ROOT / "docs" / "reading.notes.html").read_text(encoding="utf-8"))
    (ROOT / "docs" / "reading.html").write_text(page, encoding="utf-8")
    print(f"docs/reading.html: {len(page.encode()) / 1000:.0f} kB")
