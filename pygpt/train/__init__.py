"""Training: one loop (`Trainer`) and what it is given."""

from pygpt.train.checkpoint import resolve_checkpoint
from pygpt.train.classify import ClassifyConfig, finetune_classify
from pygpt.train.evaluate import EvaluateConfig, evaluate
from pygpt.train.instruct import InstructConfig, finetune_instruct
from pygpt.train.pretrain import PretrainConfig, pretrain
from pygpt.train.trainer import TrainConfig, Trainer

__all__ = [
    "ClassifyConfig",
    "EvaluateConfig",
    "InstructConfig",
    "PretrainConfig",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "finetune_classify",
    "finetune_instruct",
    "pretrain",
    "resolve_checkpoint",
]
