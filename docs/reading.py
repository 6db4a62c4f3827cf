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
SIGNS = dict(sim="∼", approx="≈", le="≤", ge="≥", lt="<", gt=">", ne="≠", cdot="·", mid="∣", dots="…",
             **{"in": "∈", "-": "−"}, notin="∉", sum="∑", prod="∏", prime="′")
FUNCTIONS = ["log", "min", "argmax", "softmax", "Exp", "Gumbel"]


def formula(tex):
    """A formula as MathML. Its lines end with \\\\, and their columns are parted by &."""
    tex = tex.replace("'", r"^{\prime}")
    table = [[row(re.findall(r"\\text\{.*?\}|\\[A-Za-z]+|\d[\d.]*|\\?\S", cell)[::-1])
              for cell in line.split("&")] for line in tex.split(r"\\")]
    if len(table) == len(table[0]) == 1:
        return table[0][0]
    lines = ["".join(f"<mtd>{cell}</mtd>" for cell in cells) for cells in table]
    return "<mtable>" + "".join(f"<mtr>{line}</mtr>" for line in lines) + "</mtable>"


def row(tokens):
    """All that comes up to a }, or to the end. The next token is the last of the list."""
    items = []
    while tokens and tokens[-1] != "}":
        name, item, scripts = tokens[-1].lstrip("\\"), atom(tokens), {}
        while tokens and tokens[-1] in "_^":
            kind = tokens.pop()
            scripts[kind] = atom(tokens)
        if scripts:
            below, above = ("under", "over") if name in ("sum", "prod", "argmax") else ("sub", "sup")
            tag = "m" + below * ("_" in scripts) + above * ("^" in scripts)
            item = f"<{tag}>{item}{scripts.get('_', '')}{scripts.get('^', '')}</{tag}>"
        items.append(item)
        if name in FUNCTIONS and tokens and (scripts or tokens[-1] != "("):
            items.append('<mspace width="0.17em"/>')
    return f"<mrow>{''.join(items)}</mrow>"


def atom(tokens):
    """A group in { }, a fraction, a space, text, a number, a letter, or a sign."""
    token = tokens.pop()
    name = token.lstrip("\\")
    if token == "{":
        group = row(tokens)
        tokens.pop()                                            # its }
        return group
    if name == "frac":
        return f"<mfrac>{atom(tokens)}{atom(tokens)}</mfrac>"
    if name == "quad":
        return '<mspace width="1em"/>'
    if name.startswith("text"):                                 # MathML would drop outer spaces
        return f"<mtext>{name[5:-1].replace(' ', chr(160))}</mtext>"
    if name[0].isdigit():
        return f"<mn>{name}</mn>"
    if name in LETTERS or name in FUNCTIONS or len(name) == 1 and name.isalpha():
        return f"<mi>{LETTERS.get(name, name)}</mi>"
    return f'<mo stretchy="false">{html.escape(SIGNS.get(name, name))}</mo>'


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
            places |= {prefix + ast.unparse(one): lines for one in getattr(target, "elts", [target])}
    return places


def colored_lines(source):
    """The lines of a program in HTML; line 1 has index 1."""
    def color(match):
        parts = match[0].split("\n")                            # a color ends with its line
        return "\n".join(f'<span class="{match.lastgroup}">{part}</span>' for part in parts)
    return ["", *COLORED.sub(color, html.escape(source, quote=False)).split("\n")]


def listing(name, places, shown, code):
    """The lines of a name, without those of its methods that stand with another note."""
    lines, text = places[name], ""
    hidden = {i for other in shown if other.startswith(name + ".") for i in places[other]}
    for i in lines:
        if i not in hidden:
            text += f'<i data-n="{i}"></i>{code[i]}\n'
        elif i - 1 not in hidden:
            text += '<i data-n="⋮"></i>\n'
    where = f"lines {lines[0]} to {lines[-1]}" if len(lines) > 1 else f"line {lines[0]}"
    link = f'<a href="../gumbel_distill.py#L{lines[0]}"><code>{name}</code> {where}</a>'
    return f'<section id="{name}">{link}<pre tabindex="0">{text}</pre></section>'


def words(notes, shown):
    """The notes with their formulas, settings and names set."""
    def math(match):
        display = ' display="block"' * match[0].startswith("$$")
        return f"<math{display}>{formula(match[1] or match[2])}</math>"

    def setting(match):
        value = getattr(CONFIGS[match[1]], match[2])
        values = value if isinstance(value, tuple) else [value]
        return ", ".join(f"{one:,}" if isinstance(one, int) else str(one) for one in values)

    def name(match):
        text = f"<code>{match[1]}</code>"
        return f'<a href="#{match[1]}">{text}</a>' if match[1] in shown else text

    notes = re.sub(r"\{\{(maze|lm1b)\.(\w+)\}\}", setting, notes)
    notes = re.sub(r"\$\$([^$]+)\$\$|\$([^$]+)\$", math, notes)
    return re.sub(r"`([^`]+)`", name, notes)


def build(source, notes):
    """The page, of the texts of gumbel_distill.py and of the notes."""
    parts = re.findall(r'<h2 id="(.*?)">(.*?)</h2>|<article code="(.*?)">', notes)
    shown = " ".join(names for _, _, names in parts).split()
    places, code = find_places(ast.parse(source).body), colored_lines(source)
    gone = [name for name in shown if name not in places]
    if gone:
        raise SystemExit(f"gumbel_distill.py has no {', '.join(gone)}: mend docs/reading.notes.html")

    def article(match):
        listings = [listing(name, places, shown, code) for name in match[1].split()]
        return f'<article><div class="note">{match[2]}</div><div>{"".join(listings)}</div></article>'

    contents = ""
    for anchor, title, names in parts:
        contents += f'\n<dt><a href="#{anchor}">{title}</a>' * bool(anchor)
        contents += "".join(f'\n<dd><a href="#{name}">{name}</a>' for name in names.split())
    page = words(notes, shown).replace("{{contents}}", contents)
    return re.sub(r'<article code="(.*?)">(.*?)</article>', article, page, flags=re.S)


def main():
    source = (ROOT / "gumbel_distill.py").read_text(encoding="utf-8")
    notes = (ROOT / "docs" / "reading.notes.html").read_text(encoding="utf-8")
    page = build(source, notes)
    path = ROOT / "docs" / "reading.html"
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {len(page.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
