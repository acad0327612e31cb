"""Weights of Hugging Face's TransfoXL, to and fro.

    config, params = from_hf(directory)
    settings, arrays = to_hf(config, params)

Its names are those of the PyTorch original, after `transformer.` but for the softmax's.
It reads the tail bins from the head forwards, its memory begins as zeros that are
attended, and each layer may have a u and a v of its own (untie_r).
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np

from xlformer.convert import hparams as hparams_lib
from xlformer.convert import transformer_xl
from xlformer.convert.files import read_json, read_sharded, read_state
from xlformer.errors import Argument, UserError, about
from xlformer.models import TransformerXLConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# In the order in which Hugging Face's own reader looks for them.
FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin")
FILES += (f"{FILES[-1]}.index.json",)
PROGRAM = "Hugging Face's TransfoXL"
PREFIX, SOFTMAX = "transformer.", "crit."
# What a config.json that lacks a name means by it: what TransfoXLConfig has.
DEFAULTS = {
    "cutoffs": [20000, 40000, 200000],
    "d_model": 1024,
    "d_embed": 1024,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "div_val": 4,
    "n_layer": 18,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "untie_r": True,
    "dropout": 0.1,
}
ALIASES = {
    "n_token": "vocab_size",
    "hidden_size": "d_model",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
INITIAL = ("init", "init_range", "init_std", "proj_init_std")  # named alike in ours
# Where all layers share u and v, each has them under a name of its own besides.
SHARED = ("r_w_bias", "r_r_bias")
LAYERS = re.compile(rf"layers\.\d{{1,9}}\.dec_attn\.({'|'.join(SHARED)})")


def from_hf(directory: str | pathlib.Path) -> tuple[TransformerXLConfig, dict]:
    """Reads a directory that Hugging Face's TransfoXL wrote with save_pretrained.

    Weights are in one file or in several with their index, in float16, float32 or
    float64; bfloat16 becomes float32. Names that config.json lacks have the program's
    default. The memory starts as zeros that are attended. Raises UserError.
    """
    return read(directory)[:2]


def read(directory: str | pathlib.Path) -> tuple[TransformerXLConfig, dict, dict]:
    """What from_hf returns, then the original's arguments as `settings` has them."""
    directory = pathlib.Path(directory)
    hparams = settings(directory)
    state = _weights(directory)
    # The model with a head has the prefix, the bare model has not.
    state = {name.removeprefix(PREFIX): x for name, x in state.items()}
    with about(str(directory)):
        config = config_of(hparams)
        if not config.untie_r:
            state = _once(state)
        params = transformer_xl.read(config, state, reverse_clusters=False)
        return config, params, hparams


def config_of(hparams: dict[str, Any]) -> TransformerXLConfig:
    """Our configuration for what `settings` returns."""
    fields = {name: hparams[name] for name in INITIAL if name in hparams}
    return hparams_lib.to_config(
        hparams,
        # Hugging Face's memory starts as zeros and has no mask: they are attended.
        attend_zero_memory=True,
        norm_epsilon=hparams.get("layer_norm_epsilon", 1e-5),
        **fields,
    )


def settings(directory: pathlib.Path) -> dict[str, Any]:
    """config.json with the original's names and without gaps."""
    path = directory / CONFIG
    found = {ALIASES.get(name, name): x for name, x in read_json(path).items()}
    if "vocab_size" not in found or found.get("model_type") != "transfo-xl":
        raise UserError(f"{path}: model_type is not 'transfo-xl'")
    if type(found["vocab_size"]) is not int:
        raise UserError(f"{path}: vocab_size is not a whole number")
    found = DEFAULTS | found
    shares = bool(found.get("proj_share_all_but_first", True))
    cutoffs = found["cutoffs"] if isinstance(found["cutoffs"], list) else []
    projections = [False] + [shares] * len(cutoffs)
    return (
        {"tie_projs": projections}
        | found
        | {
            "n_token": found["vocab_size"],
            "tie_weight": found.get("tie_word_embeddings", True),
        }
    )


def to_hf(
    config: TransformerXLConfig, tree, *, eos_token_id: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What save_pretrained writes: config.json, and the arrays of model.safetensors.

    Args:
      config, tree: of from_hf, or any that Hugging Face's model can express.
      eos_token_id: an entry of config.json.

    Returns:
      The JSON object, and arrays by name in the dtypes of `tree`; tied ones once.

    Raises:
      UserError: the model computes what Hugging Face's cannot.
    """
    found = hparams_lib.shared(config, PROGRAM)
    if config.memory_length and not config.attend_zero_memory:
        raise UserError(
            f"config.model.attend_zero_memory=False: the memory of {PROGRAM} begins as "
            "zeros that are attended; xlformer.convert makes such a run of this one, "
            "from the format xlformer, with ",
            Argument("config.model.attend_zero_memory", True),
        )
    hparams_lib.require(config, PROGRAM, attn_type=0, extended_length=0)
    arrays = {}
    # To the end before anything is returned: the names' own refusals are among them.
    for entry in transformer_xl.entries(config, reverse_clusters=False):
        if entry.tied:
            continue
        own = entry.name.startswith(SOFTMAX)
        arrays[entry.name if own else f"{PREFIX}{entry.name}"] = entry.of(tree)
    # All layers of its model have the one u and v, each under a name of its own: that
    # from_pretrained may miss none there are copies, as in what torch.save makes of it.
    for name in () if config.untie_r else SHARED:
        for layer in range(config.n_layer):
            copy = f"{PREFIX}layers.{layer}.dec_attn.{name}"
            arrays[copy] = arrays[f"{PREFIX}{name}"]
    dtype = np.result_type(*arrays.values())
    frequencies = transformer_xl.frequencies(config.d_model, dtype)
    arrays[f"{PREFIX}pos_emb.inv_freq"] = frequencies
    initial = {name: getattr(config, name) for name in INITIAL}
    untied = {} if config.tie_weights else {"tie_word_embeddings": False}
    return {
        "adaptive": True,
        "architectures": ["TransfoXLLMHeadModel"],
        "eos_token_id": eos_token_id,
        "layer_norm_epsilon": config.norm_epsilon,
        "model_type": "transfo-xl",
        "sample_softmax": -1,
        "torch_dtype": dtype.name,
        "untie_r": config.untie_r,
        "vocab_size": config.vocab_size,
        **found,
        **initial,
        **untied,
    }, dict(sorted(arrays.items()))


def _weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    found = next((name for name in FILES if (directory / name).is_file()), None)
    if found is None:
        raise UserError(f"{directory} has no {FILES[0]} and no {FILES[2]}")
    if found.endswith(".json"):
        return read_sharded(directory / found)
    return read_state(directory / found)[0]


def _once(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with one u and one v, of which layers may have copies."""
    found: dict[str, np.ndarray] = {}
    for name, x in state.items():
        layer = LAYERS.fullmatch(name)
        short = layer[1] if layer else name
        if short in found and not np.array_equal(found[short], x):
            raise UserError(f"{name} differs between layers, but untie_r is false")
        found.setdefault(short, x)
    return found
