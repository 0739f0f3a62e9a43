"""Shipped cards load real data in the Hub's layout (MPT_DATA_ROOT) without a network."""

from itertools import pairwise

import pytest

from mpt_lightning.data import MultitaskDataModule, load_task


@pytest.fixture
def options(data_root, backbones, tmp_path):
    return {
        "data_root": str(data_root),
        "backbone": backbones["causal"],
        "cache_dir": str(tmp_path / "cache"),
        "max_input_length": 128,
    }


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("glue/rte", (2490, 138, 139)),
        ("glue/stsb", (5749, 750, 750)),
        ("rotten_tomatoes", (8529, 1066, 1067)),
        ("super_glue/wic", (5292, 319, 319)),
    ],
)
def test_split_sizes(options, name, sizes):
    module = load_task(name, **options)
    module.setup("fit")
    module.setup("test")
    loaded = (module._rows(split)[0] for split in ("train", "validation", "test"))
    assert tuple(len(rows) for rows in loaded) == sizes


def test_multirc_questions_stay_together(options):
    module = load_task("super_glue/multirc", **{**options, "max_input_length": 400})
    module.setup("validate")
    module.setup("test")
    first, second = (set(module._rows(split)[0]["group"]) for split in ("validation", "test"))
    assert first
    assert second
    assert not first & second


def test_few_shot_mixture(options):
    names = ["glue/rte", "sick", "super_glue/wic"]
    module = MultitaskDataModule(names, k_shot=16, sampling="all", batch_size=12, **options)
    module.setup("fit")
    assert module.num_train_rows == 16 * (2 + 3 + 2)
    for batch in module.train_dataloader():
        assert batch["task_ids"].bincount(minlength=3).tolist() == [4, 4, 4]


def test_seeds_draw_different_rows(options):
    drawn = []
    for seed in range(3):
        module = load_task("sick", k_shot=16, seed=seed, **options)
        module.setup("fit")
        drawn.append(module._rows("train")[0]["row_id"][:])
    assert all(first != second for first, second in pairwise(drawn))
