"""Sections of a report for the terminal, as Markdown and as LaTeX."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pandas as pd
from rich.console import Console
from rich.table import Table

# What LaTeX reads as a command, and how it is written.
_ESCAPED = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$",
    ">": r"$>$", **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of a report: a title, a table of strings with a row for each method, if any, and lines of text."""

    title: str
    lines: Collection[str] = ()
    table: pd.DataFrame | None = None


def print_sections(sections: Iterable[Section], console: Console) -> None:
    """Print sections to the terminal."""
    for section in sections:
        if section.table is None:
            console.print(section.title, style="bold", markup=False, highlight=False)
        else:
            console.print(rich_table(section.title, "method", section.table))
        for line in section.lines:
            console.print(line, markup=False, highlight=False)
        console.print()


def rich_table(title: str, corner: str, strings: pd.DataFrame, sections: Collection[str] = ()) -> Table:
    """Return a table for the terminal, with lines below the rows named in `sections`."""
    table = Table(title=title)
    for place, column in enumerate([corner, *strings.columns]):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for name, row in strings.iterrows():
        table.add_row(*(cell.replace("[", "\\[") for cell in [str(name), *row]), end_section=name in sections)
    return table


def to_markdown(sections: Iterable[Section]) -> str:
    """Return sections as Markdown, the first title as that of the page."""
    parts = []
    for number, section in enumerate(sections):
        parts.append(f"{'##' if number else '#'} {section.title}")
        if section.table is not None:
            table = section.table.reset_index(names="method")
            rows = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.to_numpy()]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts.append("\n".join(f"- {line}" for line in section.lines))
    return "\n\n".join(filter(None, parts)) + "\n"


def to_latex(sections: Iterable[Section]) -> str:
    r"""Return sections as LaTeX to be read by `\input`: tables for the package booktabs, other lines as comments."""
    parts = ["% Needs \\usepackage{booktabs,graphicx}. A table is scaled down if it is wider than the text."]
    for section in sections:
        lines = [f"% {line}" for line in [section.title, *section.lines]]
        if section.table is not None:
            table = section.table.reset_index(names="method")
            rows = [" & ".join(map(escape_latex, row)) + r" \\" for row in [table.columns, *table.to_numpy()]]
            lines += [
                r"\begin{table}", r"\centering\small", f"\\caption{{{escape_latex(section.title)}}}",
                r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
                f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
                r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}}", r"\end{table}",
            ]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """Return a text in which LaTeX reads every character as itself, and a hyphen before a number as a minus."""
    found = re.sub("|".join(map(re.escape, _ESCAPED)), lambda character: _ESCAPED[character[0]], text)
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", found)
