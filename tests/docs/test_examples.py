"""The pages tell the truth: their Python prints what stands under it; links, files and commands that they name exist.

The ```python blocks of a page run one after the other, in one namespace. A ```text block directly after one is what it
prints. `<!-- example: not run ... -->` above a block says why it is only parsed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench/README.md"]
    if path.parent != ROOT / "docs/generated"
)
RUN = (
    "README.md",
    "docs/index.md",
    "docs/quickstart.md",
    "docs/api.md",
    "docs/attention.md",
    "docs/graph.md",
    "docs/memory.md",
    "docs/scale.md",
    "docs/interop.md",
    "docs/demo.md",
    "docs/plots.md",
)

_BLOCK = re.compile(
    r"(?P<skip><!-- example: not run[^>]*-->\n)?^```python\n(?P<code>.*?)^```$(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?(?: s\b|(?: [KMG]iB\b))?")


@dataclass(frozen=True)
class Example:
    """A block of a page: its code, what is printed under it (None: nothing is), the line it begins in."""

    code: str
    output: str | None
    line: int
    runs: bool


def examples(page: Path) -> list[Example]:
    """The Python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Example(m["code"], m["output"], text.count("\n", 0, m.start("code")) + 1, m["skip"] is None)
        for m in _BLOCK.finditer(text)
    ]


def run(example: Example, page: Path, namespace: dict) -> str:
    """Run a block and return what it prints; a traceback names the page and its line."""
    code = compile("\n" * (example.line - 1) + example.code, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def assert_alike(printed: str, page: str) -> None:
    """Compare two outputs: words alike, numbers up to 0.02, times not at all, bytes to a factor of two.

    Rounding errors (`3.2e-07`) may be anything small; blanks, which align a table, any number. What a plan says of the
    machine's own memory (`available`) is left out.
    """
    printed, page = (re.sub(r"^available .*$", "", text, flags=re.MULTILINE) for text in (printed, page))
    words = [" ".join(_NUMBER.sub("#", text).split()) for text in (printed, page)]
    assert words[0] == words[1], f"\nprinted:\n{printed}\nthe page says:\n{page}"
    for got, said in zip(*([m[0] for m in _NUMBER.finditer(text)] for text in (printed, page)), strict=True):
        (a, unit), (b, unit_said) = (_parts(text) for text in (got, said))
        assert unit == unit_said, (got, said)
        if "e" in said:
            assert max(abs(a), abs(b)) < 1e-5, (got, said)
        elif unit.endswith("B"):
            assert b / 2 <= a <= 2 * b, (got, said)
        elif unit != "s":
            assert a == pytest.approx(b, abs=0.02), (got, said)


def _parts(text: str) -> tuple[float, str]:
    number, _, unit = text.partition(" ")
    return float(number), unit


class Dictionary:
    """A small stand-in for a dictionary of SAE Lens, on the demo model's residual stream: D = 128, F = 256."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.W_dec = torch.nn.functional.normalize(torch.randn(256, 128, generator=generator), dim=1)
        self.cfg = types.SimpleNamespace(metadata=types.SimpleNamespace(hook_name="blocks.2.hook_resid_post"))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_dec.T - 0.5)

    def decode(self, activations: torch.Tensor) -> torch.Tensor:
        return activations @ self.W_dec

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str) -> Dictionary:
        return cls()


@pytest.mark.parametrize("name", RUN)
def test_examples_print_what_stands_under_them(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    if name in ("docs/plots.md", "docs/quickstart.md"):
        pytest.importorskip("matplotlib", reason="pictures need the extra plot")
    if name == "docs/quickstart.md":
        pytest.importorskip("vl_convert", reason="pages need the extra report")
    monkeypatch.delenv("DEPASS_FAST_BACKEND", raising=False)
    # a reader without a GPU does not interpret kernels; the tests do, and kernels may be imported here first
    monkeypatch.setattr("depass_fast.backends.selection.why_not_triton", lambda *_: "it needs a GPU")
    monkeypatch.chdir(tmp_path)  # files that examples write
    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=Dictionary))  # whatever is installed
    page = ROOT / name
    namespace = {"release": "a release", "sae_id": "an id"}
    found = examples(page)
    assert any(example.runs for example in found)
    for example in found:
        ast.parse(example.code)
        if example.runs:
            printed = run(example, page, namespace)
            assert_alike(printed, example.output or "")


def test_a_wrong_output_is_noticed():
    with pytest.raises(AssertionError, match="the page says"):
        assert_alike("logit 17.09", "difference 17.09")
    with pytest.raises(AssertionError):
        assert_alike("logit 17.09", "logit 17.19")
    with pytest.raises(AssertionError):
        assert_alike("error 3.2e-07", "error 3.2e-02")
    assert_alike("a  +1.001   0.96 s", "a +1.000 12.3 s")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:bench|depass_fast|docs|tests)/[\w./*-]+)", text):
        assert any(ROOT.glob(name)), f"{page.name}: {name}"
    for name in re.findall(r"python -m ((?:bench|depass_fast)[\w.]*)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: python -m {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
