"""One self-contained page: no script, no font and no picture from elsewhere; readable on a telephone, in the dark and on paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .table import Column

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #57606a; --line: #d8dde3; --paper: #fff; --panel: #f6f7f9;
  --good: #1a7f37; --bad: #b3261e; --link: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a2abb6; --line: #3a424d; --paper: #15191f;
  --panel: #1e242c; --good: #57c26d; --bad: #ff8a80; --link: #7ab7f5 } figure svg { background: #fff; border-radius: 6px } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem clamp(.8rem, 4vw, 2.5rem) 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.55rem; line-height: 1.2; margin: .4rem 0 }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--line) }
p, li { max-width: 46rem } .soft, figcaption { color: var(--soft); font-size: .9rem }
.verdict { font-size: 1.12rem; padding: .8rem 1rem; background: var(--panel); border-left: 4px solid var(--link); margin: 1rem 0 }
nav a { margin-right: 1rem; display: inline-block } a { color: var(--link) }
.pictures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: .6rem 0; min-width: 0; overflow-x: auto } figure svg { width: 100%; min-width: 30rem; height: auto; display: block }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: .86rem; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { background: var(--panel); white-space: nowrap } tr:last-child td { border-bottom: 0 }
td.short { white-space: nowrap } td.right, th.right { text-align: right } td.long { min-width: 16rem }
tr.bad td:first-child { box-shadow: inset 3px 0 var(--bad) } tr.good td:first-child { box-shadow: inset 3px 0 var(--good) }
code { font: .9em ui-monospace, monospace; background: var(--panel); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere }
@media print { nav { display: none } .scroll { overflow: visible; border: 0 } h2 { break-after: avoid } figure { break-inside: avoid } }
"""
LONG_TEXT = 34  # a cell with more characters may break


@dataclass
class Section:
    """A heading and what stands under it, in order; every method returns the section."""

    title: str
    blocks: list[str] = field(default_factory=list)

    def text(self, text: str, soft: bool = False) -> "Section":
        """A paragraph."""
        self.blocks.append(f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>")
        return self

    def command(self, text: str, command: str) -> "Section":
        """A sentence that ends in a command to type."""
        self.blocks.append(f'<p class="soft">{escape(text)} <code>{escape(command)}</code></p>')
        return self

    def pictures(self, *pictures: tuple[str, str]) -> "Section":
        """(svg, caption) side by side where there is room."""
        shown = [f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in pictures]
        self.blocks.append(f'<div class="pictures">{"".join(shown)}</div>')
        return self

    def table(
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], mood: Mapping[int, str] | None = None
    ) -> "Section":
        """Rows as people read them; `mood` marks rows by index as "good" or "bad"."""
        head = "".join(f"<th{_side(column)}>{escape(column.title)}</th>" for column in columns)
        lines = []
        for i, row in enumerate(rows):
            cells = "".join(_cell(column, column.text(row)) for column in columns)
            kind = (mood or {}).get(i)
            lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
        self.blocks.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        )
        return self


def _side(column: Column) -> str:
    return ' class="right"' if column.align == "right" else ""


def _cell(column: Column, text: str) -> str:
    kinds = ["long" if len(text) > LONG_TEXT else "short"] + (["right"] if column.align == "right" else [])
    return f'<td class="{" ".join(kinds)}">{escape(text)}</td>'


def page(title: str, verdict: str, sections: Sequence[Section], foot: str) -> str:
    """The whole document."""
    links = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(s.title)}</h2>{"".join(s.blocks)}</section>' for i, s in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="verdict">{escape(verdict)}</p><nav>{links}</nav>{body}<p class="soft">{escape(foot)}</p></body></html>\n'
    )
