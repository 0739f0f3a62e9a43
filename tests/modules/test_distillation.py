"""The teachers of source training: the memory and the frequency of their pass, and its cache on disk."""

import contextlib
import copy
import csv
import os
import pickle
import signal
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from processes import launch, start
from torch.utils.data import DataLoader

from mpt_lightning import MPTSource, PromptTuning, ShardedStrategy, load_backbone
from mpt_lightning.modules.teacher_cache import TeacherCache
from tests.conftest import VOCABULARY, make_batch
from tests.modules.checks import StopAfter
from tests.modules.conftest import TASKS, AnyData

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]
Batch = dict[str, torch.Tensor]


def build_source(folder: str, seed: int = 1, **options: Any) -> MPTSource:
    """Return a module with random teachers that is ready for a step without a Trainer."""
    L.seed_everything(0)
    module = MPTSource(folder, tasks=TASKS, prompt_length=4, prompt_init="random", **options)
    module.backbone = load_backbone(folder, module.hparams["backbone_dtype"], module.hparams["backbone_dropout"])
    module.prompt = module.build_prompt(module.backbone)
    generator = torch.Generator().manual_seed(seed)
    module.teacher_prompts = torch.randn(3, 4, module.backbone.dim, generator=generator)
    return module.train()


def terms(module: MPTSource, batch: Batch) -> dict[str, float]:
    return {name: value.item() for name, value in module.losses(batch).items()}


@contextlib.contextmanager
def teacher_passes(module: MPTSource) -> Iterator[list[torch.Tensor]]:
    """Collect the input ids of every pass without gradients."""
    seen: list[torch.Tensor] = []

    def note(_: object, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            seen.append(inputs[2])

    with module.backbone.register_forward_pre_hook(note):
        yield seen


def test_each_pass_draws_new_dropout_for_the_teachers_prompts(model_folder: Folder) -> None:
    module, batch = build_source(model_folder("gpt2"), backbone_dropout=True, hidden_positions="prompt"), make_batch()
    distinct, rows = batch["task_ids"].unique(return_inverse=True)
    first, second = (module.teachers.targets(module.backbone, distinct, rows, batch) for _ in range(2))
    assert not torch.equal(first.states["decoder/prompt"][0], second.states["decoder/prompt"][0])


def test_a_tuned_head_or_merged_weights_miss_the_cache(model_folder: Folder, tmp_path: Path) -> None:
    """The outputs of teachers on one model are not reused for another model's student."""
    batch = make_batch()
    for change in ("", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        module = build_source(model_folder("llama"), teacher_cache=str(tmp_path))
        if change:
            torch.nn.init.normal_(module.backbone.model.get_parameter(change))
        with teacher_passes(module) as passes:
            module.losses(batch)
            module.losses(batch)
        assert len(passes) == 1, change  # the second call reads the cache
        module.teachers.forget()


# -- the pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_the_pass_has_no_graph_and_keeps_only_compared_tensors(
    kind: str, dtype: str, layers: str, model_folder: Folder
) -> None:
    module, batch = build_source(model_folder(kind), backbone_dtype=dtype, hidden_layers=layers), make_batch()
    outputs: list[weakref.ref] = []
    saved_for_backward = []

    def note(layer: torch.nn.Module, _: object, output: Any) -> None:
        found = output if isinstance(output, tuple | list) else [output]
        tensors = [value for value in found if isinstance(value, torch.Tensor) and value.is_floating_point()]
        assert not torch.is_grad_enabled()
        assert not any(value.requires_grad for value in tensors)
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            assert tensors[0].dtype == getattr(torch, dtype)
        outputs.extend(weakref.ref(value.untyped_storage()) for value in tensors)

    hooks = [layer.register_forward_hook(note) for layer in module.backbone.model.modules()]
    distinct, rows = batch["task_ids"].unique(return_inverse=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved_for_backward.append(value), lambda value: value):
        targets = module.teachers.targets(module.backbone, distinct, rows, batch)
    for hook in hooks:
        hook.remove()
    assert outputs
    assert not saved_for_backward
    # Only the logits, the compared states and the encoded prompts remain of all activations.
    wanted = [targets.logits, *(state for states in targets.states.values() for state in states)]
    encoded = module.teachers._encoded
    if kind != "t5":
        wanted += [*encoded.hidden, *(part for pair in encoded.layers for part in pair)]
    places = {value.untyped_storage().data_ptr() for value in wanted}
    alive = {storage.data_ptr() for storage in (ref() for ref in outputs) if storage is not None}
    assert alive <= places
    assert len(alive) < len(outputs) / 2


def test_the_teachers_pass_ends_before_the_students_begins(model_folder: Folder) -> None:
    module, order = build_source(model_folder("t5")), []
    hook = module.backbone.register_forward_hook(lambda *_: order.append(torch.is_grad_enabled()))
    module.losses(make_batch())
    hook.remove()
    assert order == [False, True]


# -- every n-th step ------------------------------------------------------------------------------------------------


@pytest.fixture
def teachers(model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path: Path) -> str:
    L.seed_everything(1)
    run = trainer(max_epochs=2)
    run.fit(PromptTuning(model_folder("t5"), prompt_length=4), datamodule=data)
    run.save_checkpoint(tmp_path / "teachers.ckpt")
    return str(tmp_path / "teachers.ckpt")


class Record(L.Callback):
    """Records the optimizer step of each batch, and whether the teachers ran."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: MPTSource, *_: object) -> None:
        self.step, self.scope = trainer.global_step + 1, teacher_passes(module)
        self.seen = self.scope.__enter__()

    def on_train_batch_end(self, *_: object) -> None:
        self.scope.__exit__(None, None, None)
        self.batches.append((self.step, bool(self.seen)))


@pytest.mark.parametrize(
    ("accumulate", "every", "expected"),
    [
        (1, 1, [(1, True), (2, True), (3, True), (4, True), (5, True), (6, True)]),
        (1, 2, [(1, False), (2, True), (3, False), (4, True), (5, False), (6, True)]),
        # Three batches per epoch: Lightning also ends a step at the end of an epoch.
        (2, 2, [(1, False), (1, False), (2, True), (3, False), (3, False), (4, True)]),
        (3, 2, [(1, False), (1, False), (1, False), (2, True), (2, True), (2, True)]),
    ],
)
def test_every_nth_optimizer_step_distils(
    accumulate: int, every: int, expected: list[tuple[int, bool]], model_folder: Folder, data: AnyData,
    trainer: MakeTrainer, teachers: str,
) -> None:  # fmt: skip
    record = Record()
    module = MPTSource(model_folder("t5"), teachers, prompt_length=4, teacher_every=every)
    trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[record]).fit(module, datamodule=data)
    assert record.batches == expected


def test_terms_weigh_n_times_and_are_logged_when_computed(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers: str, tmp_path: Path
) -> None:
    def logged(every: int, interval: int = 1) -> list[dict[str, float | None]]:
        L.seed_everything(0)
        logger = CSVLogger(tmp_path, name=f"{every}-{interval}")
        module = MPTSource(
            model_folder("t5"), teachers, prompt_length=4, teacher_every=every, logits_weight=0.5, hidden_weight=2.0,
            shared_lr=0.0, task_lr=0.0,
        )  # fmt: skip
        trainer(max_epochs=2, logger=logger, log_every_n_steps=interval).fit(module, datamodule=data)
        with Path(logger.log_dir, "metrics.csv").open() as file:
            return [
                {name.removeprefix("train/"): float(value) if value else None for name, value in row.items()}
                for row in csv.DictReader(file)
            ]

    always, second = logged(1), logged(2)
    assert [row["step"] for row in second] == [0, 1, 2, 3, 4, 5]
    for number, (full, row) in enumerate(zip(always, second, strict=True), start=1):
        assert row["task_loss"] == pytest.approx(full["task_loss"], rel=1e-5)
        distillation = full["loss"] - full["task_loss"]
        assert distillation == pytest.approx(0.5 * full["logits_loss"] + 2.0 * full["hidden_loss"], rel=1e-5)
        if number % 2:
            assert row["logits_loss"] is row["hidden_loss"] is None
            assert row["loss"] == row["task_loss"]
        else:
            assert row["logits_loss"] == pytest.approx(full["logits_loss"], rel=1e-5)
            assert row["loss"] - row["task_loss"] == pytest.approx(2 * distillation, rel=1e-5)
    # Lightning logs every second step here, and these steps have distillation terms.
    assert [row["logits_loss"] is not None for row in logged(2, interval=2)] == [True] * 3


@pytest.mark.parametrize("cached", [False, True])
def test_resuming_between_two_distilled_steps_is_exact(
    cached: bool, model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers: str, tmp_path: Path
) -> None:
    record = Record()

    def run(cache: str, ckpt_path: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
        L.seed_everything(3)
        module = MPTSource(
            model_folder("t5"), teachers, prompt_length=4, teacher_every=2,
            teacher_cache=str(tmp_path / cache) if cached else None,
        )  # fmt: skip
        fit = trainer(max_epochs=4, **options)
        fit.fit(module, datamodule=data, ckpt_path=ckpt_path)
        if "half" in cache and ckpt_path is None:
            fit.save_checkpoint(tmp_path / "half.ckpt")
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    whole = run("whole")
    run("half", callbacks=[StopAfter(3)])
    L.seed_everything(99)
    resumed = run("half", str(tmp_path / "half.ckpt"), callbacks=[record])
    assert record.batches[0][0] == 4
    if not cached:
        assert [ran for _, ran in record.batches] == [True, False] * 4 + [True]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


# -- the cache ------------------------------------------------------------------------------------------------------

HIDDEN = [{}, {"hidden_layers": "all", "hidden_positions": "all"}, {"hidden_positions": "prompt"}]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_cached_rows_give_the_teachers_losses(
    kind: str, hidden: dict[str, str], model_folder: Folder, tmp_path: Path
) -> None:
    batch = make_batch()
    options = {"temperature": 1.7, **hidden}
    expected = terms(build_source(model_folder(kind), **options), batch)
    module = build_source(model_folder(kind), teacher_cache=str(tmp_path), teacher_top_k=VOCABULARY, **options)
    with teacher_passes(module) as passes:
        missed, hit = terms(module, batch), terms(module, batch)
    assert len(passes) == 1
    assert missed == hit
    assert hit["logits_loss"] == pytest.approx(expected["logits_loss"], rel=1e-5)
    assert hit["hidden_loss"] == pytest.approx(expected["hidden_loss"], rel=1e-2)  # bfloat16
    assert hit["task_loss"] == expected["task_loss"]
    short = build_source(model_folder(kind), teacher_cache=str(tmp_path), teacher_top_k=5, **options)
    assert 0 < terms(short, batch)["logits_loss"] < expected["logits_loss"]


@pytest.mark.parametrize("weight", ["logits_weight", "hidden_weight"])
def test_a_term_without_weight_is_not_stored(weight: str, model_folder: Folder, tmp_path: Path) -> None:
    sizes = []
    for number, value in enumerate((1.0, 0.0)):
        options = {weight: value, "teacher_cache": str(tmp_path / str(number)), "hidden_positions": "all"}
        module = build_source(model_folder("llama"), **options)
        missed, hit = terms(module, make_batch()), terms(module, make_batch())
        assert missed == hit
        assert (weight.replace("weight", "loss") in hit) == (value > 0)
        module.teardown("fit")
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(number)).iterdir()))
    assert sizes[1] < sizes[0]


def test_prompt_states_are_computed_once_for_all_batches(model_folder: Folder, tmp_path: Path) -> None:
    """A decoder-only model's prompts do not attend to the rows, so they are encoded once per run."""
    options = {"hidden_positions": "prompt", "logits_weight": 0.0}
    module = build_source(model_folder("llama"), teacher_cache=str(tmp_path), **options)
    first = terms(module, make_batch())
    again = build_source(model_folder("llama"), teacher_cache=str(tmp_path), **options)
    with teacher_passes(again) as passes:
        assert terms(again, make_batch()) == first
    assert not passes
    plain = terms(build_source(model_folder("llama"), **options), make_batch())
    assert first["hidden_loss"] == pytest.approx(plain["hidden_loss"])


def test_later_epochs_and_other_runs_run_no_teacher(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers: str, tmp_path: Path
) -> None:
    def run(epochs: int, **options: Any) -> tuple[list[bool], dict[str, torch.Tensor]]:
        L.seed_everything(0)
        record = Record()
        module = MPTSource(model_folder("t5"), teachers, prompt_length=4, shared_lr=0.01, task_lr=0.01, **options)
        trainer(max_epochs=epochs, callbacks=[record]).fit(module, datamodule=data)
        return [ran for _, ran in record.batches], module.state_dict()

    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": VOCABULARY}
    first, trained = run(2, **cache)
    assert first == [True] * 3 + [False] * 3
    again, same = run(2, **cache)
    assert again == [False] * 6
    _, plain = run(2)
    for name, value in trained.items():
        torch.testing.assert_close(same[name], value, rtol=0, atol=0)
        torch.testing.assert_close(plain[name], value, rtol=1e-2, atol=1e-3)


def test_only_missing_rows_are_run_and_equal_rows_once(model_folder: Folder, tmp_path: Path) -> None:
    module, batch = build_source(model_folder("t5"), teacher_cache=str(tmp_path)), make_batch()
    module.losses({name: value[:2] for name, value in batch.items()})
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    with teacher_passes(module) as passes:
        doubled = terms(module, twice)
    assert sorted(row.tolist() for row in passes[0]) == sorted(row.tolist() for row in batch["input_ids"][2:])
    assert doubled == pytest.approx(terms(module, batch), rel=1e-5)


def other_padding(batch: Batch, left: bool) -> Batch:
    """Return the same rows in another order, with more padding, on either side and of another token id."""
    rows = torch.tensor([3, 1, 4, 0, 2])
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    wide_ids, wide_mask = torch.full((5, 12), 7), torch.zeros(5, 12, dtype=torch.long)
    for row in range(5):
        tokens = ids[row][mask[row] == 1]
        place = slice(12 - len(tokens), None) if left else slice(0, len(tokens))
        wide_ids[row, place], wide_mask[row, place] = tokens, 1
    labels = torch.nn.functional.pad(batch["labels"][rows], (0, 2), value=-100)
    return {"input_ids": wide_ids, "attention_mask": wide_mask, "labels": labels, "task_ids": batch["task_ids"][rows]}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_order_and_padding_do_not_matter(
    kind: str, left: bool, hidden: dict[str, str], model_folder: Folder, tmp_path: Path
) -> None:
    batch = make_batch()
    other = other_padding(batch, left)
    module = build_source(model_folder(kind), teacher_cache=str(tmp_path), **hidden)
    before = terms(module, batch)
    with teacher_passes(module) as passes:
        after = terms(module, other)
    assert not passes
    assert after == pytest.approx(before, rel=1e-4)


def test_changes_of_a_teachers_output_change_the_key(model_folder: Folder, tmp_path: Path) -> None:
    batch = make_batch()

    def misses(changed: Batch | None = None, kind: str = "t5", **options: Any) -> int:
        module = build_source(model_folder(kind), teacher_cache=str(tmp_path), **options)
        with teacher_passes(module) as passes:
            module.losses(changed or batch)
        return sum(len(ids) for ids in passes)

    assert misses() == 5
    assert misses() == 0
    assert misses(shared_lr=0.1, logits_weight=0.3) == 0
    assert misses(seed=2) == 5  # other teachers
    assert misses(kind="llama") == 5
    assert misses(temperature=2.0) == misses(teacher_top_k=3) == misses(hidden_layers="all") == 5
    assert misses(hidden_positions="all") == misses(hidden_weight=0.0) == misses(backbone_dtype="bfloat16") == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert misses() == 5
    for name in ("labels", "input_ids", "task_ids"):
        changed = copy.deepcopy(batch)
        changed[name].view(-1)[0] = 2 if name == "task_ids" else 9
        assert misses(changed) == 1, name
    assert misses() == 0


def test_dropout_and_a_cache_exclude_each_other(model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone_dropout=True .* Set --model.backbone_dropout to false"):
        MPTSource(model_folder("t5"), teacher_cache=str(tmp_path), backbone_dropout=True)


@pytest.mark.parametrize("option", ["teacher_every", "teacher_top_k"])
def test_counts_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: got 0, expected a whole number at least 1"):
        MPTSource("any", **{option: 0})


def test_copies_of_a_module_open_the_cache_again(model_folder: Folder, tmp_path: Path) -> None:
    module, batch = build_source(model_folder("llama"), teacher_cache=str(tmp_path)), make_batch()
    expected = terms(module, batch)
    cache = module.teachers._cache
    for teachers in (copy.deepcopy(module).teachers, pickle.loads(pickle.dumps(module.teachers))):
        assert teachers._cache is None
        module.teachers = teachers
        with teacher_passes(module) as passes:
            assert terms(module, batch) == expected
        assert not passes
    reopened = pickle.loads(pickle.dumps(cache))
    assert reopened._connection is None
    assert "teachers" not in "".join(module.state_dict())


# -- the file -------------------------------------------------------------------------------------------------------


def row(number: int, size: int = 50) -> tuple[bytes, dict[str, torch.Tensor]]:
    values = torch.full((size, 20), float(number))
    return number.to_bytes(16, "big"), {"log_probs": values, "ids": values.int(), "encoder/text": values.bfloat16()}


def write_and_die(folder: str, inserts: int) -> None:
    """Write batches of ten rows, and kill the process at the given insert."""
    cache, seen = TeacherCache(Path(folder), {"a": 1}), 0

    def count(statement: str) -> None:
        nonlocal seen
        seen += statement.startswith("INSERT OR")
        if seen == inserts:
            os.kill(os.getpid(), signal.SIGKILL)

    cache._open().set_trace_callback(count)
    for batch in range(10):
        cache.put(dict(row(10 * batch + number) for number in range(10)))


@pytest.mark.parametrize("inserts", [1, 37])
def test_a_kill_during_a_write_leaves_whole_batches(inserts: int, tmp_path: Path) -> None:
    process, _ = start(write_and_die, str(tmp_path), inserts)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = TeacherCache(tmp_path, {"a": 1})
    found = cache.get([row(number)[0] for number in range(100)])
    assert sorted(found) == [row(number)[0] for number in range(inserts // 10 * 10)]
    for number in range(inserts // 10 * 10):
        assert all(torch.equal(found[row(number)[0]][name], value) for name, value in row(number)[1].items())
    cache.put(dict(row(number) for number in range(100)))
    assert len(cache.get([row(number)[0] for number in range(100)])) == 100
    cache.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    cache = TeacherCache(tmp_path, {"a": 1})
    cache.put(dict(row(number) for number in range(20)))
    cache.close()
    assert not cache.path.with_name(f"{cache.path.name}-wal").exists()
    return cache.path


def truncate(file: Path, size: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * size)])


def flip(file: Path) -> None:
    """Change one bit of a row's values."""
    content = bytearray(file.read_bytes())
    place = content.rindex(torch.full((200,), 7.0).numpy().tobytes())
    content[place + 100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda file: truncate(file, 0.9), "malformed"),
        (lambda file: truncate(file, 0.5), "malformed"),
        (lambda file: truncate(file, 0.0005), "malformed"),
        (lambda file: file.write_text("some text" * 3), "not a database"),
        (flip, "a row's checksum does not fit"),
    ],
)
def test_a_damaged_or_foreign_file_raises(damage: Callable[[Path], None], cause: str, file: Path) -> None:
    damage(file)
    cache = TeacherCache(file.parent, {"a": 1})
    assert cache.path == file
    with pytest.raises(ValueError, match=rf"(?s)The teachers' cache {file} is damaged.*{cause}.*Remove the file"):
        cache.get([row(number)[0] for number in range(20)])
    cache.close()


def test_a_full_disk_raises_and_keeps_stored_rows(file: Path) -> None:
    cache = TeacherCache(file.parent, {"a": 1})
    pages = cache._open().execute("PRAGMA page_count").fetchone()[0]
    cache._open().execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(ValueError, match=r"cannot be used: database or disk is full. Make room .*teacher_cache"):
        cache.put(dict(row(number) for number in range(100, 120)))
    assert len(cache.get([row(number)[0] for number in range(120)])) == 20
    cache.close()


def test_a_file_in_place_of_the_folder_raises(tmp_path: Path, model_folder: Folder) -> None:
    (tmp_path / "cache").touch()
    module = build_source(model_folder("t5"), teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"set --model.teacher_cache to another folder"):
        module.losses(make_batch())


# -- several ranks --------------------------------------------------------------------------------------------------


def both_write(folder: Path) -> None:
    """Write and read rows in each rank; both ranks have every second row."""
    rank, cache = int(os.environ["RANK"]), TeacherCache(folder, {"a": 1})
    for number in range(60):
        key, written = row(2 * number)
        cache.put(dict([(key, written), row(1000 + 2 * number + rank)]))
        assert torch.equal(cache.get([key])[key]["log_probs"], written["log_probs"])
    cache.close()


class RankRows(AnyData):
    """Rows split over `halves` ranks; one process with `halves=2` has the first rank's rows only."""

    def __init__(self, halves: int) -> None:
        super().__init__()
        self.halves = halves

    def train_dataloader(self) -> DataLoader:
        rows, rank = super().train_dataloader().dataset, self.trainer.global_rank
        mine = [place for place in range(len(rows)) if place % self.halves == rank]
        return DataLoader(torch.utils.data.Subset(rows, mine), batch_size=self.batch_size // self.halves)


def train(source: list[str], cache: Path, halves: int, epochs: int = 1, **options: Any) -> tuple[dict, list[bool]]:
    """Train with a cache; return the weights, and for each batch whether the teachers ran."""
    L.seed_everything(0)
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False, callbacks=[record], **options,
    )  # fmt: skip
    module = MPTSource(
        *source, prompt_length=4, shared_lr=0.01, task_lr=0.01, optimizer="adafactor", teacher_cache=str(cache)
    )
    trainer.fit(module, datamodule=RankRows(halves))
    return module.state_dict(), [ran for _, ran in record.batches]


def on_two_ranks(source: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    root, rank = Path(folder), int(os.environ["RANK"])
    both_write(root)
    ddp = {"devices": 2, "strategy": "ddp"}
    weights, ran = train(source, root / "ddp", 2, epochs=2, **ddp)
    assert ran == [True] * 3 + [False] * 3
    if rank == 0:
        torch.save(weights, root / "weights.pt")
    # This cache has the first rank's rows only. With a sharded backbone, both ranks run the pass nevertheless.
    _, ran = train(source, root / "half", 2, devices=2, strategy=ShardedStrategy())
    assert ran == [True] * 3
    _, ran = train(source, root / "half", 2, devices=2, strategy=ShardedStrategy())
    assert ran == [False] * 3


def test_ranks_share_a_cache(model_folder: Folder, teachers: str, tmp_path: Path) -> None:
    source = [model_folder("t5"), teachers]
    expected, _ = train(source, tmp_path / "one", 1, epochs=2)
    train(source, tmp_path / "half", 2)
    launch(on_two_ranks, source, str(tmp_path))
    for name, value in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    written = TeacherCache(tmp_path, {"a": 1})
    assert len(written.get([row(number)[0] for number in range(2000)])) == 60 + 2 * 60
    written.close()
    for folder in ("one", "ddp", "half"):
        (path,) = (tmp_path / folder).glob("*.sqlite")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*) FROM rows").fetchone() == (24,)
