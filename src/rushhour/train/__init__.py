"""Training: one network, on one worker or many, with exact resume."""

from rushhour.train.loop import train
from rushhour.train.settings import TrainSettings
from rushhour.train.tracking import Tracking

__all__ = ["Tracking", "TrainSettings", "train"]
