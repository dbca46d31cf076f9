"""Reusable actors, and the plain torch that they host. Importing this imports torch."""

from .checkpoints import list_checkpoints, newest_checkpoint, newest_step, read_manifest
from .corpus import Corpus, find_texts, make_corpus, read_documents
from .optimizer import OptimizerConfig
from .replica import Replica, StepMetrics
from .spmd import SPMDActor, setup_torch_elastic_env
from .tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from .train_config import TrainConfig
from .trainer import RankInfo, Trainer

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "OptimizerConfig",
    "RankInfo",
    "Replica",
    "SPMDActor",
    "StepMetrics",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "find_texts",
    "list_checkpoints",
    "make_corpus",
    "newest_checkpoint",
    "newest_step",
    "read_documents",
    "read_manifest",
    "setup_torch_elastic_env",
]
