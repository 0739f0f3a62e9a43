"""Scores equal values computed by hand or by plain formulas."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import launch

from mpt_lightning.data.card import TaskCard
from mpt_lightning.metrics.registry import METRICS
from mpt_lightning.metrics.task import TaskMetrics, average
from mpt_lightning.modules.evaluation import Evaluator, with_gold

RANDOM = torch.Generator().manual_seed(0)


def card(*metrics, **fields):
    kinds = {METRICS[name].needs for name in metrics}
    if "choices" in kinds:
        fields.setdefault("choices", ["no", "yes"])
    if "value_range" in kinds:
        fields.setdefault("value_range", (0, 5))
    return TaskCard(name="t", path="p", input="{x}", metrics=list(metrics), group="g", **fields)


def scores(of, predictions, references, groups=None, sizes=None):
    """Return the scores of rows, added in batches of the given sizes."""
    metrics = TaskMetrics(of)
    groups = groups or [""] * len(predictions)
    references = [[text] if isinstance(text, str) else text for text in references]
    start = 0
    for size in sizes or [len(predictions)]:
        metrics.update(*(column[start : start + size] for column in (predictions, references, groups)))
        start += size
    return {name: value.item() for name, value in metrics.compute().items()}


def test_two_classes():
    # 2 true positives, 1 false positive, 2 false negatives, 3 true negatives.
    predictions = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    gold = ["yes", "yes", "no", "yes", "yes", "no", "no", "no"]
    got = scores(card("accuracy", "f1", "macro_f1", "matthews"), predictions, gold)
    f1, f0 = 2 * 2 / (2 * 2 + 1 + 2), 2 * 3 / (2 * 3 + 2 + 1)
    matthews = (2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5)
    expected = {"accuracy": 5 / 8, "f1": f1, "macro_f1": (f0 + f1) / 2, "matthews": matthews, "invalid": 0}
    assert got == pytest.approx(expected)
    assert list(got) == ["accuracy", "f1", "macro_f1", "matthews", "invalid"]


def test_three_classes():
    words = ["a", "b", "c"]
    got = scores(card("accuracy", "macro_f1", choices=words), ["a", "b", "b", "c", "a"], ["a", "b", "c", "c", "b"])
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_partial_last_batch_counts_by_rows():
    predictions, gold = ["yes"] * 7, ["yes", "yes", "yes", "yes", "yes", "no", "no"]
    whole = scores(card("accuracy", "f1"), predictions, gold)
    assert scores(card("accuracy", "f1"), predictions, gold, sizes=[3, 3, 1]) == pytest.approx(whole)
    assert whole["accuracy"] == pytest.approx(5 / 7)


def test_invalid_class_is_wrong_and_counted():
    of = card("accuracy", "f1", "matthews")
    got = scores(of, ["perhaps", "", "yes", "yes."], ["yes", "no", "yes", "no"])
    assert (got["accuracy"], got["invalid"]) == (0.25, 3)
    assert got["f1"] == pytest.approx(2 / 5)
    three = card("accuracy", choices=["a", "b", "c"])
    assert scores(three, ["x", "x", "x"], ["a", "b", "c"]) == {"accuracy": 0, "invalid": 3}


def test_spaces_and_case_do_not_matter():
    assert scores(card("accuracy"), [" Yes ", "NO\n"], ["yes", "no"]) == {"accuracy": 1, "invalid": 0}
    assert scores(card("accuracy", choices=["not a", "a"]), ["not  a"], ["not a"])["accuracy"] == 1


def test_multirc_f1a_and_group_exact_match():
    predictions = ["yes", "no", "yes", "no", "yes", "yes"]
    gold = ["yes", "no", "yes", "yes", "yes", "no"]
    groups = ["q1", "q1", "q2", "q2", "q3", "q4"]
    # All answers to questions 1 and 3 are right; the rows of one question are in two batches.
    got = scores(card("multirc"), predictions, gold, groups, sizes=[3, 3])
    assert got == pytest.approx({"f1a": 2 * 3 / (2 * 3 + 1 + 1), "em": 2 / 4, "invalid": 0})


def ranks(values):
    """Return average ranks."""
    return torch.stack([((values < v).sum() + (values <= v).sum() + 1) / 2 for v in values])


def correlation(first, second):
    first, second = first - first.mean(), second - second.mean()
    return (first @ second / (first.norm() * second.norm())).item()


def test_correlations():
    gold = torch.randint(0, 26, (50,), generator=RANDOM) / 5
    guess = (gold + torch.randn(50, generator=RANDOM)).clamp(0, 5)
    predictions = [f"{value:.1f}" for value in guess.tolist()]
    guess = torch.tensor([float(text) for text in predictions])
    got = scores(card("pearson", "spearman"), predictions, [f"{v:.1f}" for v in gold.tolist()], sizes=[16, 16, 16, 2])
    assert got["pearson"] == pytest.approx(correlation(guess, gold), abs=1e-4)
    assert got["spearman"] == pytest.approx(correlation(ranks(guess), ranks(gold)), abs=1e-4)
    assert got["invalid"] == 0


@pytest.mark.parametrize("text", ["", "much", "7.0", "-1", "nan", "inf"])
def test_an_invalid_number_counts_as_the_farthest_bound(text):
    gold = ["1", "2", "4.5"]
    got = scores(card("pearson"), ["1.0", text, text], gold)
    assert got["invalid"] == 2
    assert got["pearson"] == pytest.approx(scores(card("pearson"), ["1", "5", "0"], gold)["pearson"])


@pytest.mark.parametrize("predictions", [["2.0"] * 3, [""] * 3])
def test_constant_predictions_have_no_correlation(predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = scores(card("pearson", "spearman"), predictions, ["1", "1.2", "1.4"])
    assert (got["pearson"], got["spearman"]) == (0, 0)


def test_constant_classes_have_no_correlation():
    assert scores(card("matthews"), ["yes", "yes"], ["yes", "no"])["matthews"] == 0


def test_squad_takes_the_best_answer():
    predictions = ["the red house", "dog", "in 1976", ""]
    references = [["house", "a red house"], ["cat"], ["1976", "the year 1976"], ["x"]]
    got = scores(card("squad"), predictions, references, sizes=[3, 1])
    assert got == pytest.approx({"em": 1 / 4, "f1": (1 + 0 + 2 / 3 + 0) / 4})


def test_bleu_of_equal_and_shorter_text():
    text = "there is a house near the river"
    assert scores(card("bleu"), [text], [[text, "x"]]) == pytest.approx({"bleu": 1.0})
    assert scores(card("bleu"), [text.title()], [[text]])["bleu"] < 0.5  # case counts
    # Six of seven words: all n-grams match, the brevity penalty is exp(1 - 7/6).
    got = scores(card("bleu"), ["there is a house near the"], [[text]])
    assert got["bleu"] == pytest.approx(math.exp(1 - 7 / 6), abs=1e-5)


def test_rouge_is_the_mean_over_rows_of_the_best_reference():
    predictions = ["the cat sat", "a dog", "x"]
    references = [["the cat", "nothing"], ["a dog"], ["y"]]
    got = scores(card("rouge"), predictions, references, sizes=[2, 1])
    first = 2 * 1 * (2 / 3) / (1 + 2 / 3)
    assert got["rouge1"] == pytest.approx((first + 1 + 0) / 3, abs=1e-5)
    assert got["rougeL"] == pytest.approx((first + 1 + 0) / 3, abs=1e-5)
    assert got["rouge2"] == pytest.approx((2 * 1 * 0.5 / 1.5 + 1 + 0) / 3, abs=1e-5)


def test_reset_clears_all_scores():
    metrics = TaskMetrics(card("accuracy", "multirc"))
    metrics.update(["no"], [["yes"]], ["q"])
    metrics.compute()
    metrics.reset()
    metrics.update(["yes"], [["yes"]], ["q"])
    assert {name: value.item() for name, value in metrics.compute().items()} == {
        "accuracy": 1,
        "f1a": 1,
        "em": 1,
        "invalid": 0,
    }


def test_average_leaves_out_the_count():
    got = {"accuracy": torch.tensor(0.5), "f1": torch.tensor(1.0), "invalid": torch.tensor(9.0)}
    assert average(got).item() == 0.75


def test_bad_update():
    with pytest.raises(ValueError, match="'t': got 2 predictions, 1 references and 1 groups, expected as many"):
        TaskMetrics(card("accuracy")).update(["a", "b"], [["yes"]], [""])
    with pytest.raises(ValueError, match="got the reference 'maybe', expected one of no, yes; change `choices`"):
        TaskMetrics(card("accuracy")).update(["yes"], [["maybe"]], [""])


ROWS = {
    "classes": (
        ("accuracy", "f1", "macro_f1", "matthews", "multirc"),
        ["yes", "no", "yes", "x", "no"],
        [["yes"], ["no"], ["no"], ["yes"], ["no"]],
    ),
    "values": (("pearson", "spearman"), ["1.0", "2.0", "x", "4.0", "0.2"], [["1"], ["3"], ["2"], ["5"], ["0"]]),
    "texts": (
        ("squad", "bleu", "rouge"),
        ["a red house", "the dog runs in the park", "x", "one two three four", "no"],
        [["red house"], ["the dog ran in the park"], ["y", "x"], ["one two three five"], ["yes"]],
    ),
}


GROUPS = ["q1", "q1", "q2", "q3", "q3"]
SHARES = (5, 1)  # three and two rows, then one and none


def rank_scores(folder):
    """Write the scores of every metric over this rank's share of the rows."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {}
    for share in SHARES:
        for name, (metrics, predictions, references) in ROWS.items():
            whole = TaskMetrics(card(*metrics))
            for start in range(rank, share, 2):
                whole.update(*(column[start : start + 1] for column in (predictions, references, GROUPS)))
            results[f"{name}/{share}"] = {key: value.item() for key, value in whole.compute().items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    launch(rank_scores, str(tmp_path))
    got = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for share in SHARES:
        for name, (metrics, predictions, references) in ROWS.items():
            expected = scores(card(*metrics), predictions[:share], references[:share], GROUPS[:share])
            for rank in range(2):
                assert got[rank][f"{name}/{share}"] == pytest.approx(expected, abs=1e-5), (name, share, rank)


def test_the_average_is_the_mean_over_tasks():
    cards = {"one": card("accuracy"), "two": card("accuracy", "f1")}
    evaluator = Evaluator(["one", "two", "three"], cards, None, torch.device("cpu"))
    evaluator.update("one", ["yes", "yes", "no", "no"], {"references": [["yes"], ["no"], ["yes"], ["yes"]]})
    evaluator.update("two", ["yes", "no"], {"references": [["yes"], ["yes"]]})
    evaluator.update("two", ["no"], {"references": [["no"]]})
    for task, loss, tokens in (("one", 1.0, 3), ("one", 5.0, 1), ("two", 4.0, 2), ("three", 9.0, 7)):
        evaluator.update_loss(task, torch.tensor(loss), tokens)
    got = {name: value.item() for name, value in evaluator.compute().items()}
    two = (2 / 3 + 2 / 3) / 2
    expected = {
        "one/loss": 2, "two/loss": 4, "three/loss": 9, "loss": 5, "one/accuracy": 1 / 4, "one/invalid": 0,
        "two/accuracy": 2 / 3, "two/f1": 2 / 3, "two/invalid": 0, "average": (1 / 4 + two) / 2,
    }  # fmt: skip
    assert got == pytest.approx(expected)


def test_the_gold_answer_is_one_more_choice():
    choices = torch.tensor([[[5, 1], [6, 1]], [[7, 1], [-100, -100]]])
    got = with_gold(choices, torch.tensor([[8, 9, 1], [6, 1, -100]]))
    pad = -100
    assert got.tolist() == [[[5, 1, pad], [6, 1, pad], [8, 9, 1]], [[7, 1, pad], [pad, pad, pad], [6, 1, pad]]]
    assert with_gold(choices, torch.tensor([[6], [7]])).tolist()[0] == [[5, 1], [6, 1], [6, pad]]
