"""What a run records."""

from unittest.mock import Mock

import torch

from mpt_lightning.compare.worker import Recorder


def test_the_check_before_training_selects_nothing() -> None:
    recorder = Recorder()
    for checking, step, score in ((True, 0, 0.9), (False, 10, 0.6), (False, 20, 0.7)):
        metrics = {"val/average": torch.tensor(score)}
        recorder.on_validation_end(Mock(sanity_checking=checking, global_step=step, callback_metrics=metrics), Mock())
    assert {step: round(found["val/average"], 6) for step, found in recorder.metrics.items()} == {10: 0.6, 20: 0.7}
