"""Converts the weights of other programs to ours, and back."""

from xlformer.convert.awd_lstm import from_awd_lstm, to_awd_lstm
from xlformer.convert.hugging_face import from_hf, to_hf
from xlformer.convert.nvidia import from_nvidia
from xlformer.convert.sha_rnn import from_sha_rnn, to_sha_rnn
from xlformer.convert.tensorflow import from_tf, to_tf
from xlformer.convert.transformer_xl import from_original, to_original

__all__ = [
    "from_awd_lstm",
    "from_hf",
    "from_nvidia",
    "from_original",
    "from_sha_rnn",
    "from_tf",
    "to_awd_lstm",
    "to_hf",
    "to_original",
    "to_sha_rnn",
    "to_tf",
]
