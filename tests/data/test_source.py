"""Loading from a simulated Hub, without a network."""

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from mpt_lightning.data import source


@pytest.fixture
def hub(monkeypatch):
    """Return a function that replaces the Hub's answer and returns the list of requests."""
    monkeypatch.delenv("MPT_DATA_ROOT", raising=False)
    asked = []

    def answer(with_):
        def load_dataset(path, name=None, **options):
            asked.append((path, name, options["split"], options["revision"], options.get("data_files")))
            if isinstance(with_, Exception):
                raise with_
            return with_

        monkeypatch.setattr(source, "load_dataset", load_dataset)
        return asked

    return answer


@pytest.mark.parametrize(
    ("subset", "revision", "expected"),
    [
        ("small", "v2", ("someone/film", "small", "dev", "v2", None)),
        # The branch of converted files has a folder per subset and split, and no configurations.
        ("small", source.CONVERTED, ("someone/film", None, "dev", source.CONVERTED, {"dev": "small/dev/*.parquet"})),
        (None, source.CONVERTED, ("someone/film", None, "dev", source.CONVERTED, {"dev": "default/dev/*.parquet"})),
    ],
)
def test_card_fields_reach_the_hub(make_card, hub, subset, revision, expected):
    asked = hub(Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}]))
    raw = source.load_raw(make_card(subset=subset, revision=revision), "dev")
    assert asked == [expected]
    assert raw.to_list() == [{"text": "a", "label": 1, "__row__": 0}, {"text": "b", "label": 0, "__row__": 1}]


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'someone/film' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach the Hub"),
        ValueError('Unknown split "dev". Should be one of train.'),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_errors_of_the_hub_are_one_message(make_card, hub, error):
    hub(error)
    with pytest.raises(ValueError, match=r"Task 'film': got 'someone/film' \(small\), split 'dev'") as caught:
        source.load_raw(make_card(subset="small"), "dev")
    assert str(error) in str(caught.value)
    assert "change `path`, `subset`, `revision` or `splits` of the card, or set `data_root`" in str(caught.value)


def test_empty_split_of_the_hub(make_card, hub):
    hub(Dataset.from_dict({"text": [], "label": []}))
    with pytest.raises(
        ValueError, match="got an empty data set 'someone/film', split 'train', expected at least one row"
    ):
        source.load_raw(make_card(), "train")


def test_an_edited_preprocess_function_makes_new_rows(make_card, monkeypatch):
    card = make_card(preprocess="mpt_lightning.data.preprocess.copa")
    before = source.preprocess_source(card)
    monkeypatch.setattr(source.inspect, "getsource", lambda module: before + "# edited")
    assert source.preprocess_source(card) != before
    assert source.preprocess_source(make_card()) == ""


def test_local_files_are_read_without_a_network(make_card, write_split, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    root = write_split([{"text": "a", "label": 1}])
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    assert len(source.load_raw(make_card(), "train", root, str(tmp_path / "cache"))) == 1
