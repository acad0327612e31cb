"""What is measured: the shapes of each setting, the same for every program."""

from __future__ import annotations

import dataclasses

WT103 = {"vocab_size": 267_735, "cutoffs": (19_997, 39_997, 199_997)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of step of one model; which, say the classes below.

    Attributes:
      train: forward, backward, clip and optimizer; else scoring, memory carried on.
      peer: the program to compare with: original, nvidia, awd_lstm, sha_rnn, performer.
      half: 16 bits where the program has them (bf16, NVIDIA's fp16), else float32.
    """

    train: bool
    peer: str
    batch_size: int
    segment_length: int
    vocab_size: int = 256
    cutoffs: tuple[int, ...] = ()
    dropout: float = 0.1
    optimizer: str = "adam"
    half: bool = True
    gpu: bool = True

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch_size * self.segment_length

    def tiny(self):
        """The same in seconds on any machine: what a rehearsal measures."""
        bins = {"vocab_size": 503, "cutoffs": (97, 199, 401)} if self.cutoffs else {}
        sizes = {"batch_size": min(2, self.batch_size), "segment_length": 16}
        return dataclasses.replace(self, **sizes, **self.tiny_sizes(), **bins)

    def __str__(self) -> str:
        kind = "training" if self.train else "scoring"
        rows = f"{self.batch_size} rows, segment {self.segment_length}"
        return f"{kind}, {self.shape()}, {rows}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting(Step):
    """Transformer-XL."""

    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    memory_length: int
    div_val: int = 1
    attention_dropout: float = 0.0
    clamp_length: int = 0
    same_length: bool = False

    def tiny_sizes(self) -> dict:
        sizes = {"n_layer": 2, "d_model": 64, "n_head": 2, "d_head": 32, "d_inner": 64}
        sizes |= {"clamp_length": min(24, self.clamp_length)}
        return sizes | {"memory_length": 32 if self.same_length else 16}

    def shape(self) -> str:
        layers = f"{self.n_layer} layers of {self.d_model}, {self.n_head} heads"
        return f"{layers}, memory {self.memory_length}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent(Step):
    """AWD-LSTM, with all that its program adds to a step."""

    d_model: int
    d_hidden: int
    n_layer: int = 3
    hidden_dropout: float
    input_dropout: float
    word_dropout: float
    weight_dropout: float
    activation_penalty: float = 0.0
    temporal_penalty: float = 0.0
    weight_decay: float = 1.2e-6

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, units) of each; the last has as many units as the embeddings."""
        inner = [self.d_hidden] * (self.n_layer - 1)
        return list(zip([self.d_model, *inner], [*inner, self.d_model], strict=True))

    def tiny_sizes(self) -> dict:
        return {"d_model": 16, "d_hidden": 24}

    def shape(self) -> str:
        return f"{self.n_layer} layers of {self.d_model} and {self.d_hidden:,}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleHead(Step):
    """SHA-RNN, with its three rates of dropout."""

    d_model: int
    d_inner: int
    n_layer: int = 4
    memory_length: int

    def tiny_sizes(self) -> dict:
        return {"d_model": 16, "d_inner": 32, "memory_length": 48}

    def shape(self) -> str:
        return f"{self.n_layer} blocks of {self.d_model}, memory {self.memory_length:,}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Step):
    """The attention operation of the Performer alone, of random q, k and v."""

    causal: bool
    relu: bool = False
    n_head: int = 8
    d_head: int = 64
    n_features: int = 256

    def tiny_sizes(self) -> dict:
        return {"n_head": 2, "d_head": 8, "n_features": 16}

    def shape(self) -> str:
        kind = "causal" if self.causal else "bidirectional"
        features = f"{self.n_features} {'relu' if self.relu else 'softmax'} features"
        return f"{kind}, {self.n_head} heads of {self.d_head}, {features}"


def _cpu(**fields) -> Setting:
    sizes = {"n_layer": 6, "d_model": 256, "n_head": 8, "d_head": 32, "d_inner": 1024}
    rest = {"peer": "original", "batch_size": 8, "half": False, "gpu": False}
    return Setting(**sizes, **rest, **fields)


# NVIDIA's wt103_base.yaml and wt103_large.yaml.
BASE = {"n_layer": 16, "d_model": 512, "n_head": 8, "d_head": 64, "d_inner": 2048}
LARGE = {"n_layer": 18, "d_model": 1024, "n_head": 16, "d_head": 64, "d_inner": 4096}
LARGE |= {"div_val": 4, "dropout": 0.2, "attention_dropout": 0.2}
# The original's run_enwik8_base.sh and run_enwik8_large.sh.
E12 = {"n_layer": 12, "d_model": 512, "n_head": 8, "d_head": 64, "d_inner": 2048}
E24 = {"n_layer": 24, "d_model": 1024, "n_head": 8, "d_head": 128, "d_inner": 3072}
E24 |= {"dropout": 0.15, "attention_dropout": 0.15}


def _awd_lstm(**fields) -> Recurrent:
    return Recurrent(train=True, peer="awd_lstm", half=False, gpu=False, **fields)


def _nvidia(sizes, segment_length, memory_length, batch_size, **fields) -> Setting:
    return Setting(
        peer="nvidia",
        **(sizes | WT103),
        segment_length=segment_length,
        memory_length=memory_length,
        batch_size=batch_size,
        **fields,
    )


def _enwik8(sizes, length, batch_size) -> Setting:
    return Setting(
        train=True,
        peer="original",
        **sizes,
        vocab_size=204,  # bytes in use, without the newline
        segment_length=length,
        memory_length=length,
        batch_size=batch_size,
    )


_TRAIN = {"train": True, "optimizer": "lamb"}
_INFER = {"train": False, "same_length": True}

# The larger batches first: where time runs out, the rest is left out.
SETTINGS = {
    "cpu_train": _cpu(train=True, segment_length=128, memory_length=128),
    "cpu_eval": _cpu(train=False, segment_length=128, memory_length=128),
    "cpu_eval_long": _cpu(
        train=False, segment_length=80, memory_length=640, same_length=True
    ),
    # The commands in the README of salesforce/awd-lstm-lm for Penn's words, and for
    # enwik8, whose 128 rows of 200 tokens would take two cores a minute.
    "awd_penn": _awd_lstm(
        d_model=400,
        d_hidden=1150,
        vocab_size=10_000,
        batch_size=20,
        segment_length=70,
        dropout=0.4,
        hidden_dropout=0.25,
        input_dropout=0.4,
        word_dropout=0.1,
        weight_dropout=0.5,
        activation_penalty=2.0,
        temporal_penalty=1.0,
        optimizer="sgd",
    ),
    "awd_enwik8": _awd_lstm(
        d_model=400,
        d_hidden=1840,
        vocab_size=205,
        batch_size=16,
        segment_length=50,
        dropout=0.4,
        hidden_dropout=0.1,
        input_dropout=0.1,
        word_dropout=0.0,
        weight_dropout=0.2,
    ),
    # Its command for enwik8, at a quarter of its width, batch, segment and memory.
    "sha_enwik8": SingleHead(
        train=True,
        peer="sha_rnn",
        half=False,
        gpu=False,
        d_model=256,
        d_inner=1024,
        vocab_size=205,
        batch_size=4,
        segment_length=256,
        memory_length=1280,
    ),
    **{
        f"performer_{kind}_{'train' if train else 'infer'}": Linear(
            train=train,
            peer="performer",
            batch_size=1,
            segment_length=4096,
            half=False,
            gpu=False,
            **fields,
        )
        for kind, fields in {
            "softmax": {"causal": False},
            "relu": {"causal": False, "relu": True},
            "causal": {"causal": True},
        }.items()
        for train in (True, False)
    },
    "wt103_base_train_64": _nvidia(BASE, 192, 192, 64, **_TRAIN),
    "wt103_large_train_16": _nvidia(LARGE, 384, 384, 16, **_TRAIN),
    "wt103_base_train_32": _nvidia(BASE, 192, 192, 32, **_TRAIN),
    "wt103_large_train_8": _nvidia(LARGE, 384, 384, 8, **_TRAIN),
    **{
        f"wt103_base_infer_{b}": _nvidia(BASE, 64, 640, b, clamp_length=400, **_INFER)
        for b in (32, 16, 1)
    },
    **{
        f"wt103_large_infer_{b}": _nvidia(
            LARGE, 128, 1600, b, clamp_length=1000, **_INFER
        )
        for b in (32, 16, 1)
    },
    "enwik8_12L_train": _enwik8(E12, 512, 22),
    "enwik8_24L_train": _enwik8(E24, 768, 16),
}


def find(text: str) -> list[str]:
    """The settings that begin with any of 'a,b': wt103_base_train is two.

    Raises KeyError with the text that none begins with.
    """
    found = []
    for part in text.split(","):
        names = [part] if part in SETTINGS else []
        names = names or [n for n in SETTINGS if part and n.startswith(f"{part}_")]
        if not names:
            raise KeyError(part)
        found += [n for n in names if n not in found]
    return found
