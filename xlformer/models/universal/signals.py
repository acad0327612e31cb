"""What is added to every token in every step: where it stands, and which step it is."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from xlformer.errors import UserError
from xlformer.layers import positions
from xlformer.models.universal.config import UniversalConfig
from xlformer.sharding import constrain

# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {"signals/step": (None, "embed"), "signals/position": (None, "embed")}


class Signals(nn.Module):
    """The signals of all positions and of all steps; each is learned or a sinusoid.

    A row of a table is N(0, 1/D) times sqrt(D), as in tensor2tensor: as large as a
    sinusoid.
    """

    config: UniversalConfig
    dtype: Any

    @nn.compact
    def __call__(self, T: int, start_BT):
        """(of the positions [1 or B, T, D], of the steps [N, 1, 1, D]); None without.

        start_BT: the first position that each one may see, which is position 0; None
          is the first of the segment.
        """
        return self._positions(T, start_BT), self._steps()

    def _positions(self, T: int, start_BT):
        config = self.config
        if not config.absolute:
            return None
        index_BT = np.arange(T)[None]
        # Counted from the row's last reset on; a constant of the program where it can.
        if start_BT is not None:
            index_BT = index_BT - start_BT
        if config.positions == "sinusoid":
            return positions.timing_signal(index_BT, config.d_model, self.dtype)
        N = config.table_length
        if T > N:
            raise UserError(
                f"a segment of {T} tokens, but config.model.table_length={N}: learned "
                "positions end there"
            )
        # Beyond its end, after many segments, the last row goes on.
        return self._table("position", N)[jnp.clip(index_BT, 0, N - 1)]

    def _steps(self):
        config = self.config
        if config.step_signal == "none":
            return None
        if config.step_signal == "learned":
            table_ND = self._table("step", config.steps)
        else:
            steps_N = np.arange(config.steps)
            table_ND = positions.timing_signal(steps_N, config.d_model, self.dtype)
        return table_ND[:, None, None]

    def _table(self, name: str, rows: int):
        D = self.config.d_model
        table_ND = self.param(name, nn.initializers.normal(D**-0.5), (rows, D))
        # Whole on every device: rows of a batch that is split look it up, which XLA's
        # partitioner (jax 0.10.2) cannot do in a table that is split another way.
        table_ND = constrain(table_ND.astype(self.dtype), None, None)
        return table_ND * D**0.5
