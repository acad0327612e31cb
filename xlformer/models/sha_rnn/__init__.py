"""SHA-RNN: its configuration, its blocks, the model."""

from xlformer.models.sha_rnn.config import SHARNNConfig
from xlformer.models.sha_rnn.model import SHARNN, collapse

__all__ = ["SHARNN", "SHARNNConfig", "collapse"]
