"""Plain English: phrases that the project does not use, in code, documentation and scripts.

`ALLOWED` counts what is left in each place. The numbers may only become smaller.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

BANNED = {  # pattern: what to write instead
    r"\b(is|are|was|were|be|newest|last) whole\b": "complete, valid",
    r"\bwhole (one|ones|checkpoint|checkpoints|line|lines)\b": "complete, valid",
    r"\bwhole or (absent|none)\b": "written atomically",
    r"\b(goes|go|going|went|gone) on\b": "resumes, continues",
    r"\b(begins?|began|begun|starts?) anew\b|\banew\b": "again, from scratch",
    r"\bbegin(s|ning)? with the weights\b": "is initialised from",
    r"\bthe same words\b|\bin words\b|\blast words\b": "the same command; text",
    r"\btold\b": "reported, stated",
    r"\bsaid\b": "logged, stated",
    r"\bspeaks? of\b": "names",
    r"\b(judge|judges|judged|judging)\b": "evaluate",
    r"\breckon(s|ed|ing)?\b": "compute",
    r"\banswer(s|ed|ing)?\b": "return",
    r"\bthat (is|are) none\b|\bof no classifier\b": "is not a ..., no ...",
    r"\bbecomes? of\b": "result",
    r"\b(who|which|process|worker|rank)s? (is|are) dead\b|\bthe dead\b": "exited",
    r"\bsettle(s|d)?\b": "resolve, prepare",
    r"\bmend(s|ed|ing|able)?\b": "correct, fix",
    r"\bfront doors?\b": "program",
    r"\bforeign\b": "of another program",
    r"\bnewcomer\b": "new process",
    r"\bhand(s|ed)? (over|out)\b": "pass, return",
    r"\bworked (on|out)\b": "processed, computed",
    r"\blook(s|ed) at\b": "read, check, compare",
    r"\blikewise\b": "as for ...",
    r"\bwhoever\b": "those who",
    r"\bby the look of\b": "depending on",
    r"\bseeing that all of it\b": "to try the program",
    r"\bnumber to expect\b": "expected",
    r"\bis no (dump|folder|checkpoint)\b": "is not a ...",
    r"\byardstick\b|\bin the plainest way\b": "baseline, in the simplest way",
    r"\blies? (below|beside)\b": "is in, is beside",
}

# Places (a file or a folder with everything below it) and how many banned phrases are left there.
ALLOWED: dict[str, int] = {}


def prose_of_python(text, names):
    """Yield (line, text) of comments and string literals and, with `names`, of the names of tests."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif names and isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def find_banned(path):
    """Return a line of text for each banned phrase in a file."""
    text = path.read_text(encoding="utf-8")
    is_test = path.is_relative_to(PROJECT / "tests")
    parts = list(prose_of_python(text, is_test)) if path.suffix == ".py" else [(1, text)]
    found = []
    for start, part in parts:
        part = re.sub(r"`test_\w+`", "", part)
        for pattern, instead in BANNED.items():
            for match in re.finditer(pattern, re.sub(r"\s", " ", part), re.IGNORECASE):
                if match[0].isupper():  # the name of a constant
                    continue
                line = start + part[: match.start()].count("\n")
                found.append(f"{path.relative_to(PROJECT)}:{line}: {match[0]!r}: write: {instead}")
    return found


def files():
    """Yield the place and path of every file with prose, except docs/options.md, which is generated from options/."""
    patterns = ["*.py", "*.md", "*/**/*.py", "docs/**/*.md", "configs/**/*.yaml", "scripts/*.sh", "requirements/*.txt"]
    for path in sorted({path for pattern in patterns for path in PROJECT.glob(pattern)}):
        relative = path.relative_to(PROJECT)
        if relative.parts[0] in (".venv", "venv", "output") or path.name in ("test_words.py", "options.md"):
            continue
        yield relative.parts[0] if len(relative.parts) > 1 else relative.name, path


def test_banned_phrases_only_become_fewer():
    found = {place: [] for place, _ in files()}
    for place, path in files():
        found[place] += find_banned(path)
    counts = Counter({place: len(lines) for place, lines in found.items()})
    more = {place: count for place, count in counts.items() if count > ALLOWED.get(place, 0)}
    report = "\n".join(line for place in more for line in found[place])
    assert not more, f"{more}\n{report}"


@pytest.mark.parametrize("phrase", ["the run goes on", "Answers the loss.", "a run that is whole", "it is told"])
def test_the_patterns_find_the_phrases(phrase):
    assert [pattern for pattern in BANNED if re.search(pattern, phrase, re.IGNORECASE)]


@pytest.mark.parametrize("phrase", ["the whole image", "resume the run", "the figure shows", "a goal on the field"])
def test_the_patterns_spare_plain_english(phrase):
    assert not [pattern for pattern in BANNED if re.search(pattern, phrase, re.IGNORECASE)]
