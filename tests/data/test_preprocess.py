"""The preprocess functions of the shipped tasks: exact outputs, unchanged inputs, clear errors."""

import copy

import pytest

from mpt_lightning.data import preprocess

MULTIRC = {
    "paragraph": "<b>Sent 1: </b>Olga keeps bees.<br><b>Sent 2: </b>She sells  honey < 2 crowns.<br>",
    "question": "What does <i>Olga</i> sell?",
    "answer": "Honey",
    "idx": {"paragraph": 3, "question": 17, "answer": 40},
    "label": 1,
}
RECORD = {
    "passage": "Velm reopened.\n@highlight\nIris Holt thanked the crews\n@highlight\nShips wait",
    "query": "The crews were praised by @placeholder.",
    "entities": ["Velm", "Iris Holt", "Velm"],
    "entity_spans": {"text": [], "start": [], "end": []},
    "answers": ["Iris Holt", "Holt", "Holt"],
    "idx": {"passage": 0, "query": 9},
}
WSC = {
    "text": "Clara gave Ruth the map because she was lost.",
    "span1_text": "Ruth",
    "span1_index": 2,
    "span2_text": "she",
    "span2_index": 6,
    "label": 1,
}
SQUAD = {
    "context": "It opened in 1931.",
    "question": "When?",
    "answers": {"text": ["1931", "in 1931", "1931"]},
}
WINOGRANDE = {"sentence": "The _ broke.", "option1": "cup", "option2": "jug", "answer": "2"}
COPA = {"premise": "It hailed.", "choice1": "We ran.", "choice2": "We sat.", "question": "effect", "label": 0}
WEBNLG = {
    "input": ['Velm_Harbour | leader | "Iris Holt"', "Velm_Harbour | city | Velm"],
    "target": "Iris Holt leads Velm Harbour in Velm.",
    "references": ["Iris Holt leads Velm Harbour in Velm.", "Velm Harbour, in Velm, is led by Iris Holt."],
}
ROWS = {
    "multirc": MULTIRC,
    "record": RECORD,
    "wsc": WSC,
    "squad_answers": SQUAD,
    "winogrande": WINOGRANDE,
    "copa": COPA,
    "webnlg": WEBNLG,
}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ROWS)
def test_input_is_not_changed(name, split):
    row = copy.deepcopy(ROWS[name])
    made = getattr(preprocess, name)(row, split)
    assert row == ROWS[name]
    assert made
    assert all("label" in item for item in made)


@pytest.mark.parametrize("name", ROWS)
def test_row_of_another_data_set_raises(name):
    with pytest.raises(ValueError, match=r"got the columns title, text_b, expected also .*; change `path`"):
        getattr(preprocess, name)({"title": "a", "text_b": "b"}, "train")


def test_multirc_cleans_and_names_the_question():
    (made,) = preprocess.multirc(MULTIRC, "validation")
    assert made == {
        **MULTIRC,
        "paragraph": "Olga keeps bees. She sells honey < 2 crowns.",
        "question": "What does Olga sell?",
        "answer": "Honey",
        "group": "3-17",
    }


def test_multirc_index_without_a_question_raises():
    with pytest.raises(ValueError, match="got idx=4, expected a mapping"):
        preprocess.multirc({**MULTIRC, "idx": 4}, "train")


def test_record_has_one_training_row_per_answer():
    clean = {
        "query": "The crews were praised by @placeholder.",
        "entities": "Velm, Iris Holt",
        "passage": "Velm reopened. Iris Holt thanked the crews. Ships wait",
        "group": "0-9",
    }
    assert preprocess.record(RECORD, "train") == [{**clean, "label": "Iris Holt"}, {**clean, "label": "Holt"}]
    assert preprocess.record(RECORD, "test") == [{**clean, "label": ["Iris Holt", "Holt"]}]


def test_record_without_answers_raises():
    with pytest.raises(ValueError, match="got no answers"):
        preprocess.record({**RECORD, "answers": []}, "validation")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "Clara gave * Ruth * the map because # she # was lost."),
        (
            {"span1_text": "Clara", "span1_index": 0},
            "* Clara * gave Ruth the map because # she # was lost.",
        ),
        (
            {"span1_text": "The map", "span1_index": 3},
            "Clara gave Ruth * the map * because # she # was lost.",
        ),
        ({"span2_index": 4}, "Clara gave * Ruth * the map because # she # was lost."),
        (
            {"text": 'Ruth said: "She left, she did."', "span1_index": 0, "span2_index": 2},
            '* Ruth * said: "# She # left, she did."',
        ),
        (
            {"text": "She saw Ruth, and she ran.", "span1_index": 2, "span2_index": 4},
            "She saw * Ruth *, and # she # ran.",
        ),
        (
            {"text": "As she left, Ruth fell.", "span1_index": 3, "span2_index": 1},
            "As # she # left, * Ruth * fell.",
        ),
    ],
    ids=["plain", "first word", "case", "index off", "punctuation", "second of two", "pronoun first"],
)
def test_wsc_marks_the_spans(change, text):
    (made,) = preprocess.wsc({**WSC, **change}, "train")
    assert made == {**WSC, **change, "text": text}


@pytest.mark.parametrize("change", [{"span1_text": "Rut"}, {"span2_index": 90}, {"span2_text": " "}])
def test_wsc_span_that_is_missing_raises(change):
    with pytest.raises(ValueError, match="expected it in the text"):
        preprocess.wsc({**WSC, **change}, "train")


def test_squad_extracts_texts_of_the_mapping():
    assert preprocess.squad_answers(SQUAD, "train") == [{**SQUAD, "label": "1931"}]
    assert preprocess.squad_answers(SQUAD, "validation") == [{**SQUAD, "label": ["1931", "in 1931"]}]
    plain = {**SQUAD, "answers": ["1931"]}
    assert preprocess.squad_answers(plain, "test") == [{**plain, "label": ["1931"]}]


@pytest.mark.parametrize("answers", [{"text": []}, {"text": [" "]}, {"start": [3]}, "1931", 1931])
def test_squad_without_answers_raises(answers):
    with pytest.raises(ValueError, match="expected a mapping with a non-empty list `text`"):
        preprocess.squad_answers({**SQUAD, "answers": answers}, "train")


@pytest.mark.parametrize(("answer", "label"), [("1", 0), ("2", 1), (2, 1)])
def test_winogrande_keeps_both_options(answer, label):
    row = {**WINOGRANDE, "answer": answer}
    assert preprocess.winogrande(row, "train") == [{**row, "label": label}]


@pytest.mark.parametrize("answer", ["", "0", "3"])
def test_winogrande_unknown_answer_raises(answer):
    with pytest.raises(ValueError, match="expected '1' or '2'"):
        preprocess.winogrande({**WINOGRANDE, "answer": answer}, "train")


@pytest.mark.parametrize(("asked", "words"), [("cause", "What was the cause?"), ("effect", "What was the effect?")])
def test_copa_writes_the_question_in_words(asked, words):
    assert preprocess.copa({**COPA, "question": asked}, "test") == [{**COPA, "question": words}]


def test_copa_unknown_question_raises():
    with pytest.raises(ValueError, match="got question='reason', expected 'cause' or 'effect'"):
        preprocess.copa({**COPA, "question": "reason"}, "train")


def test_webnlg_writes_triples_and_keeps_all_references():
    triples = "Velm Harbour | leader | Iris Holt && Velm Harbour | city | Velm"
    (train,) = preprocess.webnlg({**WEBNLG, "references": []}, "train")
    assert (train["triples"], train["label"]) == (triples, WEBNLG["target"])
    (test,) = preprocess.webnlg(WEBNLG, "test")
    assert (test["triples"], test["label"]) == (triples, WEBNLG["references"])


def test_webnlg_without_references_uses_the_target():
    (made,) = preprocess.webnlg({**WEBNLG, "references": []}, "validation")
    assert made["label"] == [WEBNLG["target"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ["Velm | city"]}, "got triple 'Velm | city'"),
        ({"input": []}, "got 0 triples"),
        ({"references": [" "]}, "and 0 texts"),
    ],
)
def test_webnlg_broken_row_raises(change, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        preprocess.webnlg({**WEBNLG, **change}, "validation")
