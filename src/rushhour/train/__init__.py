"""Training on one machine."""

from rushhour.train.loop import TrainSettings, train

__all__ = ["TrainSettings", "train"]
