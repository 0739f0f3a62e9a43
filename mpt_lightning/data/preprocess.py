"""Row functions of the tasks whose raw rows need more than a template.

A card names one by its dotted path (`preprocess: mpt_lightning.data.preprocess.multirc`). Each is pure:
`(row, split) -> list of rows`, where `row` is one raw row of the Hub data set, `split` is `train`,
`validation` or `test`, and the rows that come back hold the columns of the card's template and its label. The
input is never changed. Training and evaluation differ only where a row has several right answers: training
gets one target a row, evaluation gets all of them as references.
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
    """Clean a MultiRC row and name the question it belongs to.

    Args:
        row: `paragraph`, `question`, `answer` (texts), `label` (0 or 1) and `idx` (a mapping with `paragraph`
            and `question`).
        split: Not used: the rows of all splits are alike.

    Returns:
        One row: the texts without markup, and `group`, the id of the question, such as `3-17`. Rows of one
        question share it, so that they stay in one half when a split is halved and are scored together.

    Raises:
        MPTError: If a column is missing.
    """
    _need(row, "MultiRC", "paragraph", "question", "answer", "idx")
    idx = row["idx"]
    if not isinstance(idx, Mapping) or "paragraph" not in idx or "question" not in idx:
        raise MPTError(f"MultiRC row: got idx={idx!r}, expected a mapping with `paragraph` and `question`.")
    texts = {column: _plain(row[column]) for column in ("paragraph", "question", "answer")}
    return [{**row, **texts, "group": f"{idx['paragraph']}-{idx['question']}"}]


def record(row: Row, split: str) -> list[Row]:
    """Turn a ReCoRD row into one row per answer (training) or one row with all answers (evaluation).

    Args:
        row: `passage`, `query` (with `@placeholder`), `entities` and `answers` (lists of texts), `idx`.
        split: `train` or another name; see above.

    Returns:
        Rows with `query`, `entities` (one text, comma separated), `passage` (the highlights as sentences),
        `label` (a text in training, a list of texts otherwise) and `group`, the id of the query.

    Raises:
        MPTError: If a column is missing or there is no answer.
    """
    _need(row, "ReCoRD", "passage", "query", "entities", "answers")
    answers = _unique(row["answers"])
    if not answers:
        raise MPTError(
            "ReCoRD row: got no answers, expected at least one; the Hub's test split has none, so the card's "
            "`splits` must not use it."
        )
    idx = row.get("idx")
    clean = {
        "query": _plain(row["query"]),
        "entities": ", ".join(_unique(row["entities"])),
        "passage": _highlights(row["passage"]),
        "group": f"{idx['passage']}-{idx['query']}" if isinstance(idx, Mapping) else "",
    }
    if split == "train":
        return [{**clean, "label": answer} for answer in answers]
    return [{**clean, "label": answers}]


def wsc(row: Row, split: str) -> list[Row]:
    """Mark the two spans of a Winograd schema in its text: `* the noun *` and `# the pronoun #`.

    Args:
        row: `text`, `span1_text`, `span1_index`, `span2_text`, `span2_index` (index of the span's first word,
            words being separated by white space) and `label`.
        split: Not used: the rows of all splits are alike.

    Returns:
        One row, `text` with the marks. Case does not count when a span is looked up, and where a row gives an
        index that is a little off (the data set has some), the nearest occurrence of the span is marked.

    Raises:
        MPTError: If a column is missing or a span does not occur in the text.
    """
    _need(row, "WSC", "text", "span1_text", "span1_index", "span2_text", "span2_index")
    text: str = row["text"]
    spans = [(*_find_span(text, row[f"span{n}_text"], row[f"span{n}_index"]), "*#"[n - 1]) for n in (1, 2)]
    # From the right, so that the first mark does not move the second.
    for start, end, mark in sorted(spans, reverse=True):
        text = f"{text[:start]}{mark} {text[start:end]} {mark}{text[end:]}"
    return [{**row, "text": text}]


def squad_answers(row: Row, split: str) -> list[Row]:
    """Take the answer texts out of SQuAD's `answers` mapping.

    Args:
        row: `question`, `context` and `answers` (`{"text": [...], "answer_start": [...]}` or a list).
        split: `train` or another name; see below.

    Returns:
        One row with `label`: the first answer in training, otherwise all different answers.

    Raises:
        MPTError: If a column is missing or there is no answer.
    """
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
    """Turn the answer of a WinoGrande row, `1` or `2`, into a class index.

    Args:
        row: `sentence` with a blank `_`, `option1`, `option2` and `answer`.
        split: Not used: the rows of all splits are alike.

    Returns:
        One row with both options and `label` 0 (the first) or 1 (the second).

    Raises:
        MPTError: If a column is missing or the answer is something else (the Hub's test split has none).
    """
    _need(row, "WinoGrande", "sentence", "option1", "option2", "answer")
    if str(row["answer"]) not in ("1", "2"):
        raise MPTError(f"WinoGrande row: got answer={row['answer']!r}, expected '1' or '2'.")
    return [{**row, "label": int(row["answer"]) - 1}]


def copa(row: Row, split: str) -> list[Row]:
    """Write COPA's `question` (`cause` or `effect`) as a question.

    Args:
        row: `premise`, `choice1`, `choice2`, `question` and `label`.
        split: Not used: the rows of all splits are alike.

    Returns:
        One row with `question` in words.

    Raises:
        MPTError: If a column is missing or `question` is something else.
    """
    _need(row, "COPA", "premise", "choice1", "choice2", "question")
    if row["question"] not in _COPA_QUESTIONS:
        raise MPTError(f"COPA row: got question={row['question']!r}, expected 'cause' or 'effect'.")
    return [{**row, "question": _COPA_QUESTIONS[row["question"]]}]


def webnlg(row: Row, split: str) -> list[Row]:
    """Write the triples of a WebNLG row as one text, with all its references.

    Args:
        row: `input` (list of `subject | relation | object`), `target` (a text), `references` (a list of
            texts, empty in training).
        split: `train` or another name; see below.

    Returns:
        One row with `triples` (`subject | relation | object && ...`, without underscores and quotes) and
        `label`: the target in training, otherwise all references.

    Raises:
        MPTError: If a column is missing, a triple has not three parts, or there is no text to learn.
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
    """Refuse a row without the columns, which means that the card points to other data."""
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise MPTError(
            f"{task} row: got the columns {', '.join(row)}, expected also {', '.join(missing)}; change "
            "`path`, `subset` or `preprocess` of the card."
        )


def _plain(text: str) -> str:
    """The text without markup, words separated by one space."""
    return " ".join(_TAG.sub(" ", _SENTENCE_MARK.sub(" ", text)).split())


def _highlights(passage: str) -> str:
    """The passage with its `@highlight` bullets as sentences."""
    parts = [_plain(part) for part in _HIGHLIGHT.split(passage)]
    parts = [part for part in parts if part]
    # A bullet has no full stop of its own: without one it would run into the next.
    ended = [part if part[-1] in ".?!\"'" else f"{part}." for part in parts[:-1]]
    return " ".join([*ended, *parts[-1:]])


def _unique(texts: Iterable[str]) -> list[str]:
    """The non-empty texts, stripped, in order, each once."""
    return list(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))


def _find_span(text: str, span: str, index: int) -> tuple[int, int]:
    """Start and end (characters) of the occurrence of a span that is nearest to the word with that index."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(word) for word in span.split()) + r"(?!\w)"
    found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if span.strip() else []
    if not found or not 0 <= index < len(starts):
        raise MPTError(f"WSC row: got the span {span!r} at word {index}, expected it in the text {text!r}.")
    return min(found, key=lambda place: abs(place[0] - starts[index]))
