"""The training system: data, schedules, checkpoints and the loop that puts them together.

The loop is :class:`fastadv.training.trainer.Trainer`, what a config file may hold :class:`fastadv.training.config.Config`.
"""

from .trainer import Trainer, TrainingAlarm, descents

__all__ = ["Trainer", "TrainingAlarm", "descents"]
