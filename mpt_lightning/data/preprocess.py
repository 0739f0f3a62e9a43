"""Row functions of the tasks whose raw rows need more than a template.

A card names one by its dotted path (`preprocess: mpt_lightning.data.preprocess.multirc`). Each is pure:
`(row, split) -> list of rows`, where `row` is one raw row of the Hub data set, `split` is `train`, `validation` or
`test`, and the rows returned have the columns of the card's template and its label. Training and evaluation differ only
if a row has several right answers: training rows have one target each, evaluation rows have all of them as references.
All raise MPTError if a column is missing or has an unusable value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mpt_lightning.errors import MPTError

Row = dict[str, Any]

# Tags of the markup in MultiRC and ReCoRD; any other text in angle brackets is text.
_SENTENCE_MARK = re.compile(r"<b>\s*Sent\s+\d+\s*:\s*</b>", re.IGNORECASE)
_TAG = re.compile(r"</?(?:b|br|i|p|u)\s*/?>", re.IGNORECASE)
_HIGHLIGHT = re.compile(r"\s*@highlight\s*")
_COPA_QUESTIONS = {"cause": "What was the cause?", "effect": "What was the effect?"}


def multirc(row: Row, split: str) -> list[Row]:
    """Remove the markup of a MultiRC row, and add `group`, the id of the question, such as `3-17`.

    Rows of one question stay in one half when a split is halved, and are scored together.
    """
    _need(row, "MultiRC", "paragraph", "question", "answer", "idx")
    idx = row["idx"]
    if not isinstance(idx, Mapping) or "paragraph" not in idx or "question" not in idx:
        raise MPTError(f"MultiRC row: got idx={idx!r}, expected a mapping with `paragraph` and `question`.")
    texts = {column: _plain(row[column]) for column in ("paragraph", "question", "answer")}
    return [{**row, **texts, "group": f"{idx['paragraph']}-{idx['question']}"}]


def record(row: Row, split: str) -> list[Row]:
    """Turn a ReCoRD row into one row per answer (training) or one row with all answers (evaluation).

    `entities` become one text, comma separated, the highlights of `passage` sentences, and `group` the query's id.
    """
    _need(row, "ReCoRD", "passage", "query", "entities", "answers")
    answers = _unique(row["answers"])
    if not answers:
        raise MPTError("ReCoRD row: got no answers, expected some; change `splits`: the Hub's test split has none.")
    idx = row.get("idx")
    clean = {
        "query": _plain(row["query"]),
        "entities": ", ".join(_unique(row["entities"])),
        "passage": _highlights(row["passage"]),
        "group": f"{idx['passage']}-{idx['query']}" if isinstance(idx, Mapping) else "",
    }
    return [{**clean, "label": answer} for answer in (answers if split == "train" else [answers])]


def wsc(row: Row, split: str) -> list[Row]:
    """Mark the two spans of a Winograd schema in its text: `* the noun *` and `# the pronoun #`.

    `span1_index` and `span2_index` count words separated by white space. Case is ignored when a span is looked up; if
    an index is slightly wrong (the data set has some), the nearest occurrence of the span is marked.
    """
    _need(row, "WSC", "text", "span1_text", "span1_index", "span2_text", "span2_index")
    text: str = row["text"]
    spans = [(*_find_span(text, row[f"span{n}_text"], row[f"span{n}_index"]), "*#"[n - 1]) for n in (1, 2)]
    # From the right, so that the first mark does not move the second.
    for start, end, mark in sorted(spans, reverse=True):
        text = f"{text[:start]}{mark} {text[start:end]} {mark}{text[end:]}"
    return [{**row, "text": text}]


def squad_answers(row: Row, split: str) -> list[Row]:
    """Turn SQuAD's `answers`, `{"text": [...]}` or a list, into `label`: the first in training, else all different."""
    _need(row, "SQuAD", "question", "context", "answers")
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    unique = _unique(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else []
    if not unique:
        raise MPTError(
            f"SQuAD row: got answers={answers!r}, expected a mapping with a non-empty list `text`, or a list."
        )
    return [{**row, "label": unique[0] if split == "train" else unique}]


def winogrande(row: Row, split: str) -> list[Row]:
    """Turn the `answer` of a WinoGrande row, `1` or `2`, into `label`, 0 or 1; the Hub's test split has none."""
    _need(row, "WinoGrande", "sentence", "option1", "option2", "answer")
    if str(row["answer"]) not in ("1", "2"):
        raise MPTError(f"WinoGrande row: got answer={row['answer']!r}, expected '1' or '2'.")
    return [{**row, "label": int(row["answer"]) - 1}]


def copa(row: Row, split: str) -> list[Row]:
    """Write COPA's `question` (`cause` or `effect`) as a question."""
    _need(row, "COPA", "premise", "choice1", "choice2", "question")
    if row["question"] not in _COPA_QUESTIONS:
        raise MPTError(f"COPA row: got question={row['question']!r}, expected 'cause' or 'effect'.")
    return [{**row, "question": _COPA_QUESTIONS[row["question"]]}]


def webnlg(row: Row, split: str) -> list[Row]:
    """Write the triples of a WebNLG row as one text, `triples`: `subject | relation | object && ...`.

    Its `label` is the target in training, otherwise all references.
    """
    _need(row, "WebNLG", "input", "target")
    triples = []
    for triple in row["input"]:
        parts = [" ".join(part.replace("_", " ").replace('"', " ").split()) for part in triple.split("|")]
        if len(parts) != 3:
            raise MPTError(f"WebNLG row: got triple {triple!r}, expected 'subject | relation | object'.")
        triples.append(" | ".join(parts))
    references = _unique(row.get("references") or [row["target"]])
    if not triples or not references:
        raise MPTError(f"WebNLG row: got {len(triples)} triples and {len(references)} texts, expected some of both.")
    label = row["target"] if split == "train" else references
    return [{**row, "triples": " && ".join(triples), "label": label}]


def _need(row: Row, task: str, *columns: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise MPTError(
            f"{task} row: got the columns {', '.join(row)}, expected also {', '.join(missing)}; change "
            "`path`, `subset` or `preprocess` of the card."
        )


def _plain(text: str) -> str:
    """Return the text without markup, words separated by one space."""
    return " ".join(_TAG.sub(" ", _SENTENCE_MARK.sub(" ", text)).split())


def _highlights(passage: str) -> str:
    """Return the passage with its `@highlight` bullets as sentences."""
    parts = [part for bullet in _HIGHLIGHT.split(passage) if (part := _plain(bullet))]
    # A bullet has no full stop.
    ended = [part if part[-1] in ".?!\"'" else f"{part}." for part in parts[:-1]]
    return " ".join([*ended, *parts[-1:]])


def _unique(texts: Iterable[str]) -> list[str]:
    """Return the non-empty texts, stripped, in order, each once."""
    return list(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))


def _find_span(text: str, span: str, index: int) -> tuple[int, int]:
    """Return start and end (characters) of the occurrence of a span that is nearest to the word with that index."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(word) for word in span.split()) + r"(?!\w)"
    found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if span.strip() else []
    if not found or not 0 <= index < len(starts):
        raise MPTError(f"WSC row: got the span {span!r} at word {index}, expected it in the text {text!r}.")
    return min(found, key=lambda place: abs(place[0] - starts[index]))
