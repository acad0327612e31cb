"""What the Performer's configuration refuses, and what it takes."""

import pytest

from xlformer import models
from xlformer.errors import UserError
from xlformer.fields import REFUSED
from xlformer.models import PerformerConfig

SIZES = dict(vocab_size=19, d_model=8, n_head=2, context_length=7)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(mechanism="linformer", causal=True), "'linformer' with .*causal=True"),
        (dict(features="tanh"), "features='tanh' can be negative.* choose one of pos"),
        (dict(features="identity", projected=False), "'identity' can be negative"),
        (dict(features="positiv"), "did you mean 'positive'"),
        (dict(projected=False), "projected=False with .*features='positive'"),
        (dict(mechanism="softmax", features="relu"), "features=relu with .*'softmax'"),
        (dict(mechanism="softmax", n_features=5), "n_features=5 with .*'softmax'"),
        (dict(attention_dropout=0.1), "attention_dropout=0.1 with .*'favor'"),
        (dict(rounds=2), "rounds=2 with .*mechanism='favor'"),
        (dict(maxima="constant"), "maxima=constant with .*stabiliser='running'"),
        (dict(renormaliser=0.1), "renormaliser=0.1 with .*stabiliser='running'"),
        (
            dict(features="tanh", stabiliser="original", maxima="constant"),
            "maxima=constant with .*features='tanh'.*: leave it differentiated",
        ),
        (
            dict(features="relu", projected=False, n_features=5),
            "n_features=5 with .*projected=False",
        ),
        (dict(features="hyperbolic", stabiliser="original"), "no program"),
        (dict(mechanism="lsh", discount_duplicates=True), "same_bucket_only=False"),
        (dict(mechanism="lsh", buckets=5), "buckets=5 must be even"),
        (dict(extended_length=3), "extended_length=3 with .*sums have it"),
        (dict(mechanism="lsh", extended_length=3), "=3 with .*mechanism='lsh'.*hidden"),
        (
            dict(mechanism="softmax", causal=False, extended_length=3),
            "extended_length=3 with .*causal=False.*hidden",
        ),
        (
            dict(positions="learned", extended_length=7),
            "extended_length=7 must be below config.model.context_length=7",
        ),
        (dict(d_head=3), "rotary.* width 3"),
        (dict(n_head=3), "n_head=3 does not divide config.model.d_model=8"),
        (dict(feature_seed=-1), "feature_seed=-1 must be at least 0"),
    ],
)
def test_refuses_in_one_line(fields, line):
    with pytest.raises(UserError, match=line):
        models.build(PerformerConfig(**SIZES | fields))


def test_what_is_published_may_be_had():
    for features in ("tanh", "cos"):
        PerformerConfig(features=features, stabiliser="original")
    PerformerConfig(features="trigonometric", stabiliser="original", maxima="constant")
    assert PerformerConfig(features="trigonometric").carries
    assert not PerformerConfig(stabiliser="original").carries


def test_other_features_are_another_model():
    rules = models.rules("performer")
    for field in ("features", "n_features", "feature_seed", "mechanism", "orthogonal"):
        assert rules[field].resume == REFUSED
