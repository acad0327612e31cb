"""Models for the tests of check_model that break a property of training, or a dtype."""

import itertools

import jax
import jax.numpy as jnp
from broken_models import Broken

from xlformer.models import Aux

TRACES = itertools.count()


class DropsNothing(Broken):
    def options(self, options):
        return options | dict(train=False)


class DropsTheSame(Broken):
    """Whatever the keys."""

    def options(self, options):
        if options.get("rngs"):
            same_B = jax.random.split(jax.random.key(0), 1)
            rows_B = jnp.broadcast_to(same_B, options["rngs"]["rows"].shape)
            options["rngs"] = {"rows": rows_B}
        return options


class DropsInSecret(Broken):
    needs_rngs = False


class IgnoresResetsInTraining(Broken):
    def options(self, options):
        return options | (dict(resets_BT=None) if options.get("train") else {})


class ScoresPaddingInTraining(Broken):
    def options(self, options):
        return options | (dict(lengths_B=None) if options.get("train") else {})


class ReadsPaddingInTraining(Broken):
    """Into the memory; the nll is masked."""

    def apply(self, *arrays, train=False, **options):
        nll_BT, after, aux = super().apply(*arrays, train=train, **options)
        if train:
            options = options | dict(lengths_B=None)
            _, after, _ = super().apply(*arrays, train=train, **options)
        return nll_BT, after, aux


class DropsByOneKey(Broken):
    """As a mask of the whole batch would."""

    def options(self, options):
        if options.get("rngs"):
            key = options["rngs"]["dropout"]
            rows_B = jax.random.split(key, len(options["rngs"]["rows"]))
            options["rngs"] = {"rows": rows_B}
        return options


class DropsByTheFirstKey(Broken):
    def options(self, options):
        if options.get("rngs"):
            rows_B = options["rngs"]["rows"]
            rows_B = jnp.broadcast_to(rows_B[:1], rows_B.shape)
            options["rngs"] = {"rows": rows_B}
        return options


class DrawsWhenTraced(Broken):
    """Other numbers in each program, whatever the keys."""

    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * next(TRACES), after


class CountsItsRows(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * len(nll_BT), after


class SumsItsAux(Broken):
    def apply(self, *arrays, **options):
        nll_BT, after, _ = super().apply(*arrays, **options)
        return nll_BT, after, Aux(nll_BT.mean(1).sum(), {})


class LogsItsFirstRow(Broken):
    def apply(self, *arrays, **options):
        nll_BT, after, _ = super().apply(*arrays, **options)
        return nll_BT, after, Aux(0.0, {"nats": nll_BT[0].mean()})


class KnowsItsMesh(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        size = jax.sharding.get_abstract_mesh().size
        return nll_BT + 1e-7 * (size > 1), after


class AddsUpOverItsMesh(Broken):
    """An aux that is computed where nobody else looks."""

    def apply(self, *arrays, **options):
        nll_BT, after, _ = super().apply(*arrays, **options)
        size = jax.sharding.get_abstract_mesh().size
        return nll_BT, after, Aux(nll_BT.mean() * max(size, 1), {})


class RoundsItsTable(Broken):
    """To float32, and goes on in float64."""

    rounded = jnp.float32

    def _forward(self, params, *arrays):
        table_VD = params["table_VD"]
        rounded_VD = table_VD.astype(self.rounded).astype(table_VD.dtype)
        return super()._forward(params | {"table_VD": rounded_VD}, *arrays)


class RoundsItsTableToLess(RoundsItsTable):
    """So float32 and float64 give nearly the same."""

    rounded = jnp.bfloat16


class DiffersInFloat32(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT * (1.01 if nll_BT.dtype == jnp.float32 else 1), after


BROKEN = {
    DropsNothing: "train: needs_rngs is True, but scoring gives the same",
    DropsTheSame: "train: needs_rngs is True, but another key gives the same",
    DropsInSecret: "train: needs_rngs is False, and another key: differs by",
    IgnoresResetsInTraining: "hidden: resets .* nll: differs by",
    ScoresPaddingInTraining: "hidden: padding: nll, 0 where padded: diff",
    ReadsPaddingInTraining: "hidden: what padding says: differs by",
    DropsByOneKey: "train: rows in another order: differs by",
    DropsByTheFirstKey: "train: others, when row 0 changes: differs by",
    DrawsWhenTraced: "groups: two rows alone: differs by",
    CountsItsRows: "groups: two rows alone: differs by",
    SumsItsAux: "groups: aux of five equal rows, and of two: differs by",
    LogsItsFirstRow: "groups: aux of two rows, and the mean of each alone: differs",
    KnowsItsMesh: "mesh: of two devices, and one: differs by",
    AddsUpOverItsMesh: "mesh: of two devices, and one: differs by",
    RoundsItsTable: "float64: rounded on its way: .* differs by",
    RoundsItsTableToLess: "float64: rounded on its way: .* differs by",
    DiffersInFloat32: "float64: nll, and that of float32: differs by",
}
