"""The runs that a comparison's file defines, and errors for mistakes in it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mpt_lightning.compare.plan import Comparison, Method, Recipe, read_comparison

FILE = """
tasks: [demo/topic, demo/voice]
shots: [16, null]
seeds: [0, 1, 2]
arguments: {data.seed: $seed, trainer.max_steps: 3, model.lr: 1}
few_shot_arguments: {data.k_shot: $k}
full_data_arguments: {data.max_train_rows: 50}
prepare:
  teachers: {recipe: demo/teachers}
  source: {recipe: demo/source, arguments: {model.teachers: $teachers}}
methods:
  lora: {recipe: baselines/lora, arguments: {model.lr: 0.5, model.peft_config.target_modules: [q, v]}}
  mpt: {recipe: demo/target, shots: [16], arguments: {model.source: $source}}
  hard: {recipe: baselines/hard_prompt, fit: false, shots: [0], seeds: [7]}
  cpt:
    recipe: [demo/cpt, cpt/instruction]
    seeds: [0]
    few_shot_arguments: {data.context_shots: $k, data.answer_prefix: "cost $$ :"}
    full_data_arguments: {data.context_shots: 4, data.separator: -}
"""


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., Comparison]:
    def read(*changes: tuple[str, str]) -> Comparison:
        text = FILE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "mine.yaml").write_text(text)
        return read_comparison(str(tmp_path / "mine.yaml"))

    return read


def test_every_run_exists_once(comparison: Callable[..., Comparison]) -> None:
    runs = comparison().runs()
    counts = {name: sum(run.method == name for run in runs) for name in ("lora", "mpt", "hard", "cpt")}
    assert counts == {"lora": 2 * 2 * 3, "mpt": 2 * 3, "hard": 2, "cpt": 2 * 2}
    assert len({run.place for run in runs}) == len(runs) == sum(counts.values())
    assert len({run.fingerprint for run in runs}) == len(runs)
    assert runs[0].place == "lora/demo/topic/16/0"
    assert comparison().name == "mine"


def test_arguments_of_the_command_line(comparison: Callable[..., Comparison]) -> None:
    runs = {run.place: run for run in comparison().runs()}

    def words(place: str, **checkpoints: str) -> str:
        return " ".join(runs[place].arguments(checkpoints))

    common = "--seed_everything {0} --data.seed {0} --trainer.max_steps 3"
    lora = "--config baselines/lora --data demo/voice " + common.format(2)
    lora += ' --model.lr 0.5 --model.peft_config.target_modules ["q", "v"]'
    assert words("lora/demo/voice/16/2") == lora + " --data.dev_shot 16 --data.k_shot 16"
    full = " --data.dev_shot 16 --data.k_shot null --data.max_train_rows 50"  # the recipe draws 32 rows
    assert words("lora/demo/voice/full/2") == lora + full
    target = f"--config demo/target --data demo/topic {common.format(1)} --model.lr 1 --model.source a/b.ckpt"
    assert words("mpt/demo/topic/16/1", source="a/b.ckpt") == target + " --data.dev_shot 16 --data.k_shot 16"
    hard = f"--config baselines/hard_prompt --data demo/topic {common.format(7)} --model.lr 1"
    assert words("hard/demo/topic/0/7") == hard
    cpt = f"--config demo/cpt --config cpt/instruction --data demo/topic {common.format(0)} --model.lr 1"
    assert (
        words("cpt/demo/topic/16/0")
        == cpt + " --data.dev_shot 16 --data.context_shots 16 --data.answer_prefix cost $ :"
    )
    assert words("cpt/demo/topic/full/0") == cpt + " --data.dev_shot 16 --data.context_shots 4 --data.separator=-"
    assert not runs["hard/demo/topic/0/7"].fit


@pytest.mark.parametrize(
    ("dev", "few", "full"), [("k", "16", "16"), ("7", "7", "7"), ("null", "null", "null")], ids=["k", "number", "none"]
)
def test_dev_rows_replace_the_recipes(comparison: Callable[..., Comparison], dev: str, few: str, full: str) -> None:
    runs = comparison(("tasks:", f"dev: {dev}\ntasks:")).runs()
    for place, expected in (("lora/demo/topic/16/0", few), ("lora/demo/topic/full/0", full)):
        (words,) = [run.words for run in runs if run.place == place]
        assert words[words.index("--data.dev_shot") + 1] == expected
    assert not any("--data.dev_shot" in run.words for run in runs if run.method == "hard")


def test_seeds_draw_the_rows_unless_an_argument_does() -> None:
    methods = {"mpt": Method("demo/target", {"model.source": "$source"})}
    prepare = {"source": Recipe("demo/source", seeds=[7])}
    plan = Comparison(["demo/topic"], [16, None], methods, [3], prepare=prepare)
    for run, seed in zip([*plan.runs(), *plan.prepared_runs()], ("3", "3", "7"), strict=True):
        assert run.words[run.words.index("--data.seed") + 1] == seed
    few, full = (run.words for run in plan.runs())
    assert few[few.index("--data.k_shot") :] == ("--data.k_shot", "16", "--data.shots_per", "balanced")
    assert full[full.index("--data.k_shot") :] == ("--data.k_shot", "null")
    methods["mpt"].arguments["data.seed"] = 1
    assert {run.words[run.words.index("--data.seed") + 1] for run in plan.runs()} == {"1"}


def test_prepared_runs_are_in_order_and_needed_by_methods(comparison: Callable[..., Comparison]) -> None:
    plan = comparison()
    teachers, source = plan.prepared_runs()
    assert (teachers.place, source.place) == ("prepare/teachers", "prepare/source")
    assert source.needs == (teachers,)
    assert source.arguments({"teachers": "t.ckpt"}) == ["--config", "demo/source", "--model.teachers", "t.ckpt"]
    assert {run.needs for run in plan.runs() if run.method == "mpt"} == {(source,)}
    assert {run.needs for run in plan.runs() if run.method != "mpt"} == {()}


def test_a_fingerprint_changes_with_all_that_changes_a_run(
    comparison: Callable[..., Comparison], tmp_path: Path
) -> None:
    def changed(*changes: tuple[str, str]) -> set[str]:
        before = {run.place: run.fingerprint for run in comparison().runs()}
        after = {run.place: run.fingerprint for run in comparison(*changes).runs()}
        return {place.split("/")[0] for place in before if before[place] != after[place]}

    assert changed() == set()
    assert changed(("model.lr: 0.5", "model.lr: 0.4")) == {"lora"}
    assert changed(("{recipe: demo/teachers}", "{recipe: demo/teachers, arguments: {model.lr: 1}}")) == {"mpt"}
    assert changed(("max_steps: 3", "max_steps: 4")) == {"lora", "mpt", "hard", "cpt"}
    assert changed(("seeds: [0, 1, 2]", "metric: loss\nseeds: [0, 1, 2]")) == {"lora", "mpt", "hard", "cpt"}
    recipe = tmp_path / "own.yaml"
    own = ("baselines/lora", str(recipe))
    recipe.write_text("model: {a: 1}")
    before = {run.place: run.fingerprint for run in comparison(own).runs()}
    recipe.write_text("# a comment changes nothing\nmodel:\n  a: 1\n")
    assert before == {run.place: run.fingerprint for run in comparison(own).runs()}
    recipe.write_text("model: {a: 2}")
    after = {run.place: run.fingerprint for run in comparison(own).runs()}
    assert {place.split("/")[0] for place in before if before[place] != after[place]} == {"lora"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baselines/lora", "baselines/lore", "unknown recipe 'baselines/lore'"),
        ("recipe: demo/source", "recipe: []", "recipe of prepare/source: got []"),
        ("demo/voice", "demo/voices", "unknown task 'demo/voices'"),
        ("[demo/topic, demo/voice]", "[]", "tasks: got [], expected one or more different values"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", "seeds of lora: got [0, 0], expected one or more different values"),
        ("shots: [16]", "shots: []", "shots of mpt: got []"),
        ("shots: [16, null]", "shots: [-1]", "shots of lora: got [-1]"),
        ("shots: [16, null]", "shots: [0, 16]", "shots of lora: got 0, but training needs rows"),
        ("shots: [16, null]", "shots: [few]", "Given value: few"),
        ("seeds: [0, 1, 2]", "seeds: 3", "Expected a <class 'list'>. Got value: 3"),
        ("fit: false", "fits: false", "'fits' is not accepted"),
        ("seeds: [0, 1, 2]", "seeds: [0]\nseed: 3", "'seed' is not accepted"),
        ("$source", "$sorce", "unknown name ('sorce'). Known here are $seed, $task, $k, $teachers, $source"),
        ("$teachers", "$source", "unknown name ('source')"),
        ("  hard:", "  prepare:", "Got the name 'prepare'"),
        ("  hard:", "  ../hard:", "Got the name '../hard'"),
        ("  teachers:", "  k:", "`prepare`: got the name 'k'"),
        ("tasks:", "tasks: [", "cannot be read as YAML"),
        ("tasks:", "dev: 0\ntasks:", "`dev`: got 0, expected 1 or more."),
        ("tasks:", "control: lore\ntasks:", "`control`: got 'lore', expected one of lora, mpt, hard, cpt."),
        ("tasks:", "search_tasks: [demo/voice]\ntasks:", "`search_tasks` and `tasks` both have demo/voice"),
        ("baselines/lora,", "baselines/lora, search: {model.lr: 1},", "got model.lr: 1, expected a list of values"),
        ("baselines/lora,", "baselines/lora, search: {model.lr: [1, 2]},", "got lora 2, mpt 1, cpt 1."),
        ("baselines/lora,", "baselines/lora, search: {model.lr: {low: 1, high: 2}},", "set `trials` to the number"),
        ("fit: false", "fit: false, search: {data.pattern: [0, 1]}", "nothing is trained (fit: false)"),
    ],
)
def test_mistakes_get_one_message(
    comparison: Callable[..., Comparison], old: str, new: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml") as raised:
        comparison((old, new))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arguments_for_every_run_and_a_methods_own_before_them() -> None:
    comparison = read_comparison("compare/demo", {"model.backbone": "mine", "trainer.max_steps": "7"})
    words = {run.method: run.words for run in [*comparison.prepared_runs(), *comparison.runs()]}
    for method in ("prepare", "prompt_tuning", "mpt"):
        option = words[method].index("--model.backbone")
        assert words[method][option + 1] == "mine"
    steps = {method: words[method][words[method].index("--trainer.max_steps") + 1] for method in ("lora", "cpt")}
    assert steps == {"lora": "7", "cpt": "30"}


def test_unknown_and_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown comparison 'compare/dem'.*compare/demo, compare/few"):
        read_comparison("compare/dem")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="got list, expected a mapping"):
        read_comparison(str(tmp_path / "list.yaml"))


def test_full_data_has_no_k() -> None:
    comparison = Comparison(["demo/topic"], [None], {"a": Method("demo/cpt", {"data.context_shots": "$k"})}, [0], dev=8)
    with pytest.raises(ValueError, match=r"unknown name \('k'\)"):
        comparison.runs()


def test_names_of_prepared_runs_are_replaced_exactly() -> None:
    prepare = {"a": Recipe("demo/teachers"), "ab": Recipe("demo/teachers", {"model.lr": 1})}
    method = Method("demo/target", {"model.source": "x$ab/${a}b$$a"})
    (run,) = Comparison(["demo/topic"], [4], {"m": method}, [0], prepare=prepare).runs()
    assert "x2/1b$a" in run.arguments({"a": "1", "ab": "2"})


def test_the_shipped_comparisons_are_complete() -> None:
    demo = read_comparison("compare/demo")
    assert [len(demo.tasks), demo.shots, demo.seeds] == [4, [16, 32, None], [0, 1, 2]]
    trained = [method for method in demo.methods.values() if method.fit]
    assert len(demo.runs()) == len(trained) * 4 * 3 * 3 + 2 * 4 + 4 * 2 * 3
    assert {run.name for run in demo.prepared_runs()} == {"teachers", "source"}
    assert len(read_comparison("compare/few").runs()) == 4


def test_the_documented_comparison_is_complete(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    comparison = read_comparison(str(tmp_path / "mine.yaml"))
    assert len(comparison.runs()) == 3 * 3 * 2 * 5
    assert {len(trials) for trials in comparison.trials_of.values()} == {3}
