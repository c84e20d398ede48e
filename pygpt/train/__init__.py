"""Training: one loop (`Trainer`) and what it is given."""

from pygpt.train.checkpoint import resolve_checkpoint
from pygpt.train.classify import ClassifyConfig, finetune_classify
from pygpt.train.evaluate import EvaluateConfig, evaluate
from pygpt.train.pretrain import PretrainConfig, pretrain
from pygpt.train.trainer import TrainConfig, Trainer

__all__ = [
    "ClassifyConfig",
    "EvaluateConfig",
    "PretrainConfig",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "finetune_classify",
    "pretrain",
    "resolve_checkpoint",
]
