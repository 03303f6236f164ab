"""The training text: the Python source of CPython's standard library, as the running interpreter has it.

A file is held out when the hash of its path says so (about 4.5 % of the files); held-out files reach neither
the tokenizer nor the training. Chat pairs are made from the training files only: the question is a function's
signature and the first line of its docstring, the answer is the function's source.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tools.train_tiny.spec import ASSISTANT, END, SYSTEM, USER

HELD_OUT_PER_MILLE = 45
SYSTEM_PROMPT = "You are a helpful assistant that writes Python."
QUESTIONS = (
    "Write a Python function `{name}({arguments})`: {summary}",
    "Write a Python function `{name}`. {summary}",
    "Write a Python function: {summary}",
)


@dataclass(frozen=True)
class Document:
    """One source file: its path inside the standard library and its text, exactly as on disk."""

    path: str
    text: str


def read_library() -> list[Document]:
    """All `*.py` files of the standard library that are valid UTF-8, sorted by path; no site-packages."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if path.startswith("site-packages/"):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a dozen files that test other encodings
        if text:
            documents.append(Document(path, text))
    return documents


def is_held_out(path: str) -> bool:
    """Whether a file is held out; depends on nothing but its path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out)."""
    training = [document for document in documents if not is_held_out(document.path)]
    return training, [document for document in documents if is_held_out(document.path)]


def chat_texts(documents: list[Document], max_characters: int = 2400) -> list[str]:
    """Rendered conversations, one for each documented function of `documents`."""
    texts = []
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue  # files that test the parser
        lines = document.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring, answer = ast.get_docstring(node) or "", _function_source(node, lines)
            if docstring.strip() and len(answer) <= max_characters:
                texts.append(render_chat(_question(node, docstring), answer))
    return texts


def render_chat(question: str, answer: str) -> str:
    """One exchange, exactly as chat_template.jinja renders it; every fourth opens with the system prompt."""
    choice = hashlib.sha256(question.encode()).digest()[1] % 4
    system = f"{SYSTEM}\n{SYSTEM_PROMPT}" if choice == 0 else ""
    return f"{system}{USER}\n{question}{ASSISTANT}\n{answer}{END}"


def _question(node: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str) -> str:
    summary = docstring.strip().splitlines()[0].strip()
    form = QUESTIONS[hashlib.sha256(docstring.encode()).digest()[0] % len(QUESTIONS)]
    return form.format(name=node.name, arguments=ast.unparse(node.args), summary=summary)


def _function_source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    return textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
