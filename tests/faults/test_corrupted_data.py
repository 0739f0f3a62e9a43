"""Damaged data files, caches and inputs of `mpt predict` are refused with a clear message or read correctly."""

import gc
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from mpt_lightning import Predictor, TaskDataModule
from mpt_lightning.cli.main import main
from mpt_lightning.data.card import load_card
from mpt_lightning.predictor import predict_file
from tests.faults.conftest import CARD, ROWS, Outcome, World

pytestmark = pytest.mark.usefixtures("own_folder")
LINES = [json.dumps(row) for row in ROWS]
HEADED = ["text,label", *(f"{row['text']},{row['label']}" for row in ROWS)]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def join(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def line(number: int, text: str, lines: list[str] = LINES) -> bytes:
    """Return the file with one line replaced."""
    return join(*lines[:number], text, *lines[number + 1 :])


def row(**values: Any) -> bytes:
    """Return the file with other values in the fourth row."""
    return line(3, json.dumps(ROWS[3] | values))


def table(**columns: Any) -> bytes:
    parquet.write_table(pa.table(columns), buffer := io.BytesIO())
    return buffer.getvalue()


def not_utf8() -> pa.Array:
    """Return two texts, "a\\xff" and "b\\xfe", that Arrow accepts as strings."""
    ends = b"".join(end.to_bytes(4, "little") for end in (0, 2, 4))
    return pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(ends), pa.py_buffer(b"a\xffb\xfe")])


GOOD, GOOD_CSV = join(*LINES), join(*HEADED)
GOOD_PARQUET = table(text=[r["text"] for r in ROWS], label=[r["label"] for r in ROWS])
BAD: dict[str, dict[str, bytes]] = {
    "jsonl": {
        "empty": b"",
        "blank": b"\n\n  \n",
        "cut": GOOD[:-10],
        "cut at random": GOOD[:77],
        "broken line": line(3, LINES[3][:9]),
        "text line": line(3, "hello"),
        "number line": line(3, "5"),
        "list line": line(3, "[1]"),
        "null line": line(3, "null"),
        "null first": line(0, "null"),
        "nulls": join("null", "null"),
        "lists": join("[1, 2]", "[3, 4]"),
        "an array": json.dumps(ROWS).encode(),
        "commas": GOOD.replace(b"\n", b",\n"),
        "single quotes": GOOD.replace(b'"', b"'"),
        "UTF-16": GOOD.decode().encode("utf-16"),
        "UTF-16 without a mark": GOOD.decode().encode("utf-16-le"),
        "latin-1": GOOD.replace(b"fun", b"f\xfcn"),
        "cut character": GOOD.replace(b"fun", b"f\xe2\x82"),
        "zero byte": GOOD.replace(b"fun", b"f\0n"),
        "escaped zero byte": GOOD.replace(b"fun", b"f\\u0000n"),
        "half a surrogate pair": GOOD.replace(b"fun", b"f\\ud800n"),
        "no text column": join(*[json.dumps({"label": 1})] * 3),
        "no label column": join(*[json.dumps({"text": "a"})] * 3),
        "other columns": join('{"a": 1}', '{"b": 2}'),
        "a row without text": line(3, '{"label": 1}'),
        "a row without label": line(3, '{"text": "a"}'),
        "text null": row(text=None),
        "text empty": row(text=""),
        "text blank": row(text=" \t"),
        "text list": row(text=["a"]),
        "text mapping": row(text={"a": "b"}),
        "all texts lists": join(*[json.dumps({"text": ["a"], "label": 1})] * 3),
        "label null": row(label=None),
        "label -1": row(label=-1),
        "label 2": row(label=2),
        "label huge": row(label=10**30),
        "label fraction": row(label=0.5),
        "label NaN": row(label=float("nan")),
        "label another word": row(label="fine"),
        "label list": row(label=[1]),
        "label mapping": row(label={"a": 1}),
        "labels as text": join(*[json.dumps({"text": "a", "label": "1"})] * 3),
        "a column twice": join(*['{"text": "a", "text": "b", "label": 1}'] * 3),
        "our own column": join(*[json.dumps({"text": "a", "label": 1, "__row__": 3})] * 3),
        "deep": b'{"text": ' + b"[" * 2000,
        "gzip": gzip.compress(GOOD),
        "parquet": GOOD_PARQUET,
        "png": PNG,
    },
    "json": {
        "empty": b"",
        "null": b"null",
        "number": b"5",
        "array with null": b"[null, {}]",
        "array of numbers": b"[1, 2]",
        "cut array": json.dumps(ROWS).encode()[:-20],
        "columns": json.dumps({"text": ["a", "b"], "label": [0, 1]}).encode(),
        "UTF-16": json.dumps(ROWS).encode("utf-16"),
    },
    "csv": {
        "empty": b"",
        "header only": b"text,label\n",
        "blank": b"\n\n",
        "no header": join(*HEADED[1:]),
        "short row": line(3, "a fun film", HEADED),
        "long row": line(3, "a fun film,1,2", HEADED),
        "all rows long": join(HEADED[0], *(f"well, {text}" for text in HEADED[1:])),
        "first row long": line(1, "well, a film,1", HEADED),
        "commas at the end": join(HEADED[0], *(f"{text}," for text in HEADED[1:])),
        "open quote": line(3, '"a fun film,1', HEADED),
        "semicolons": GOOD_CSV.replace(b",", b";"),
        "tabs": GOOD_CSV.replace(b",", b"\t"),
        "UTF-16": GOOD_CSV.decode().encode("utf-16"),
        "UTF-16 without a mark": GOOD_CSV.decode().encode("utf-16-le"),
        "latin-1": GOOD_CSV.replace(b"fun", b"f\xfcn"),
        "zero byte": GOOD_CSV.replace(b"fun", b"f\0n"),
        "zero bytes": GOOD_CSV[:40] + bytes(20) + GOOD_CSV[60:],
        "a column twice": GOOD_CSV.replace(b"text,label", b"text,text"),
        "empty text": line(3, ",1", HEADED),
        "empty label": line(3, "a film,", HEADED),
        "label another word": line(3, "a film,fine", HEADED),
        "label 2": line(3, "a film,2", HEADED),
        "label fraction": line(3, "a film,0.5", HEADED),
        "parquet": GOOD_PARQUET,
        "png": PNG,
    },
    "parquet": {
        "empty": b"",
        "half": GOOD_PARQUET[: len(GOOD_PARQUET) // 2],
        "last byte gone": GOOD_PARQUET[:-1],
        "footer": GOOD_PARQUET[:-60] + bytes(10) + GOOD_PARQUET[-50:],
        "zeros": GOOD_PARQUET[:20] + bytes(30) + GOOD_PARQUET[50:],
        "csv": GOOD_CSV,
        "no rows": table(text=pa.array([], pa.string()), label=pa.array([], pa.int64())),
        "no text column": table(label=[0, 1]),
        "no label column": table(text=["a", "b"]),
        "all null": table(text=pa.nulls(2), label=[0, 1]),
        "text null": table(text=["a", None], label=[0, 1]),
        "label null": table(text=["a", "b"], label=pa.array([0, None])),
        "bytes": table(text=[b"a", b"b"], label=[0, 1]),
        "dates": table(text=pa.array([1, 2], pa.timestamp("s")), label=[0, 1]),
        "lists": table(text=[["a"], ["b"]], label=[0, 1]),
        "labels as text": table(text=["a", "b"], label=["0", "1"]),
        "not UTF-8": table(text=not_utf8(), label=[0, 1]),
        "not UTF-8 elsewhere": table(text=["a", "b"], label=[0, 1], more=not_utf8()),
    },
}
CASES = [pytest.param(kind, name, id=f"{kind}-{name}") for kind, files in BAD.items() for name in files]


def load(root: Path, world: World, **fields: Any) -> list[dict[str, Any]]:
    module = TaskDataModule(
        load_card(CARD | fields), backbone=world.backbones["t5"], data_root=str(root), cache_dir=str(root / "cache")
    )
    module._load("train")
    return module._splits["train"][0].to_list()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def run(kind: str, content: bytes) -> Path:
        file = tmp_path / "film" / f"train.{kind}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return file

    return run


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_damaged_file(kind: str, name: str, world: World, tmp_path: Path, write: Callable, outcome: Outcome) -> None:
    file = write(kind, BAD[kind][name])
    message = outcome(lambda: load(tmp_path, world))
    assert message is not None
    if "UnicodeDecodeError" in message:
        gc.collect()  # closes the file, which pandas left open
    assert "Task 'film'" in message
    assert str(file) in message or "column" in message or "row " in message


GENERATED = [
    "labels as lists with null", "labels as mappings", "groups with null", "nested label", "preprocess", "unlabelled"
]  # fmt: skip


@pytest.mark.parametrize("name", GENERATED)
def test_a_file_that_does_not_fit_a_card(
    name: str, world: World, tmp_path: Path, write: Callable, outcome: Outcome
) -> None:
    free = {"choices": None, "metrics": ["squad"]}
    content, fields = {
        "labels as lists with null": ([{"text": "a", "label": [None]}], free),
        "labels as mappings": ([{"text": "a", "label": {"b": 1}}], free),
        "groups with null": ([{"text": "a", "label": 1, "g": "x"}, {"text": "b", "label": 0}], {"group": "g"}),
        "nested label": ([{"text": "a", "answers": {"text": 1}}], free | {"label": "answers.answer"}),
        "preprocess": (
            [{"paragraph": 5, "question": "a", "answer": "b", "label": 1, "idx": {"paragraph": 1, "question": 2}}],
            {"preprocess": "mpt_lightning.data.preprocess.multirc", "input": "{paragraph}"},
        ),
        "unlabelled": ([{"text": "a", "label": -1}], {"unlabelled": "drop"}),
    }[name]
    write("jsonl", join(*map(json.dumps, content)))
    assert outcome(lambda: load(tmp_path, world, **fields)) is not None


SAME: dict[str, tuple[str, bytes]] = {
    "byte order mark": ("jsonl", b"\xef\xbb\xbf" + GOOD),
    "byte order mark in csv": ("csv", b"\xef\xbb\xbf" + GOOD_CSV),
    "line ends of Windows": ("jsonl", GOOD.replace(b"\n", b"\r\n")),
    "line ends of Windows in csv": ("csv", GOOD_CSV.replace(b"\n", b"\r\n")),
    "blank lines": ("jsonl", GOOD.replace(b"\n", b"\n\n")),
    "no last line end": ("jsonl", GOOD[:-1]),
    "array": ("json", json.dumps(ROWS).encode()),
    "array over lines": ("json", json.dumps(ROWS, indent=1).encode()),
    "more columns": ("parquet", table(x=[None] * 8, text=[r["text"] for r in ROWS], label=[r["label"] for r in ROWS])),
}


@pytest.mark.parametrize("name", SAME)
def test_harmless_changes_do_not_change_the_rows(name: str, world: World, tmp_path: Path, write: Callable) -> None:
    write(*SAME[name])
    assert [(r["text"], r["references"]) for r in load(tmp_path, world)] == [
        (f"sentence : {r['text']}", [CARD["choices"][r["label"]]]) for r in ROWS
    ]


def test_csv_texts_are_read_literally(world: World, tmp_path: Path, write: Callable) -> None:
    texts = ["NA", "null", "007", "1.50", "True", "a, b"]
    write("csv", join("text,label", *(f'"{text}",1' for text in texts)))
    assert [r["text"] for r in load(tmp_path, world)] == [f"sentence : {text}" for text in texts]


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "zeros"])
@pytest.mark.parametrize("cached", ["json", "generator"])
def test_a_damaged_cache(
    cached: str, damage: str, world: World, tmp_path: Path, write: Callable, outcome: Outcome
) -> None:
    write("jsonl", GOOD)
    load(tmp_path, world)
    (file,) = (tmp_path / "cache" / cached).rglob("*.arrow")
    whole = file.read_bytes()
    file.unlink()  # a file that is mapped into memory must not be written to
    if damage != "gone":
        file.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "zeros": whole[:100] + bytes(200)}[damage])
    message = outcome(lambda: load(tmp_path, world))
    assert message is not None
    assert "cache_dir" in message


def test_damaged_data_gets_one_message_from_the_command(world: World, tmp_path: Path, outcome: Outcome) -> None:
    for name in ("latin-1", "null first", "cut", "label 2"):
        file = tmp_path / name / "film" / "train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_bytes(BAD["jsonl"][name])
        words = ["--config", str(world.recipes["PromptTuning"]), "--data.data_root", str(tmp_path / name)]
        assert outcome(lambda words=words: main(["fit", *words])) is not None


INPUTS: dict[str, bytes] = {
    "text": b"a fine film\n",
    "number": b"5\n",
    "null": b"null\n",
    "list": b'["a"]\n',
    "array": b'[{"task": "one", "text": "a"}]',
    "no text": b'{"task": "one"}\n',
    "text null": b'{"task": "one", "text": null}\n',
    "text a list": b'{"task": "one", "text": ["a"]}\n',
    "text a mapping": b'{"task": "one", "text": {"text": "a"}}\n',
    "text blank": b'{"task": "one", "text": " "}\n',
    "text NaN": b'{"task": "one", "text": NaN}',
    "no task": b'{"text": "a film"}\n',
    "unknown task": b'{"task": "three", "text": "a"}\n',
    "task a number": b'{"task": 0, "text": "a"}\n',
    "task a list": b'{"task": ["one"], "text": "a"}\n',
    "task null": b'{"task": null, "text": "a"}\n',
    "cut": b'{"task": "one", "te',
    "zero byte": b'{"task": "one", "text": "\0"}',
    "escaped zero byte": b'{"task": "one", "text": "a\\u0000"}',
    "half a surrogate pair": b'{"task": "one", "text": "a\\ud800"}',
    "UTF-16": '{"task": "one", "text": "a"}'.encode("utf-16"),
    "latin-1": b'{"task": "one", "text": "\xfc"}',
    "png": PNG,
    "deep": b'{"text": ' + b"[" * 100_000,
    "two on a line": b"{} {}",
    "a number too long": b'{"task": "one", "text": ' + b"9" * 5000 + b"}",
    "one line of many": join(*['{"task": "one", "text": "a film"}'] * 3, "{", '{"task": "two", "text": "a"}'),
}


@pytest.fixture(scope="module")
def predictor(world: World) -> Predictor:
    return Predictor.from_checkpoint(str(world.checkpoints["PromptTuning"]))


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_input_of_predict(name: str, predictor: Predictor, tmp_path: Path, outcome: Outcome) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUTS[name])
    assert outcome(lambda: predict_file(predictor, str(tmp_path / "in.jsonl"), "out.jsonl")) is not None
    assert not list(tmp_path.glob("out*"))


def test_only_jsons_line_breaks_end_a_line(predictor: Predictor, tmp_path: Path) -> None:
    text = "a \u2028 good \u0085 film"
    lines = [json.dumps({"task": "one", "text": text}, ensure_ascii=False) for _ in range(2)]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert predict_file(predictor, "in.jsonl", "out.jsonl") == 2
    answers = Path("out.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(answer)["text"] for answer in answers[:2]] == [f"sentence : {text}"] * 2


def test_damaged_input_is_one_line_of_the_command_line(world: World, tmp_path: Path, outcome: Outcome) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUTS["one line of many"])
    words = ["--input", "in.jsonl", "--ckpt_path", str(world.checkpoints["PromptTuning"])]
    message = outcome(lambda: main(["predict", *words]))
    assert message is not None
    assert "in.jsonl, line 4" in message
