"""The tiny form of every model as a run, and a host that saves their states again.

python tests/all_models.py FOLDER --coordinator=HOST:PORT ...
"""

import argparse
import functools
import pathlib
import sys

import jax

from xlformer import config as config_lib
from xlformer import hosts, models, sharding
from xlformer.data.preparing import prepare
from xlformer.data.stream import Stream
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training.compiling import TrainingStep

STEPS, SAVED = 3, 1  # of a run, and where others go on with it
TEXT = "she sells sea shells; by the sea shore, 17 boxers quickly jump (over) a vow\n"


def folder(path):
    """Makes what the runs read."""
    (path / "text.txt").write_text(TEXT * 31, encoding="utf-8")
    return path


@functools.cache
def config_name(model):
    """A config of this model that comes with the package.

    The first one that carries something from step to step, if any does.
    """
    found = [n for n in config_lib.names() if _model(n) == model]
    return next(filter(_carries, found), found[0])


def _carries(name):
    model = models.build(config_lib.load(f"{name}:debug").model, len(set(TEXT)))
    return bool(jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1))))


@functools.cache
def _model(name):
    return config_lib.load(name).model.name


def make_config(model, path):
    """Rows for any mesh of eight, and all that a run can carry from step to step."""
    config = config_lib.load(f"{config_name(model)}:debug")
    own = config_lib.load(f"text:path={path / 'text.txt'},unit=chars")
    config.data.update(own.data, directory=str(path / "prepared"))
    if "scan_layers" in config.model:
        config.model.scan_layers = True  # compiles faster
    config.train.update(batch_size=8, steps=STEPS, ema_decay=0.5, keep=STEPS)
    config.train.update(save_every=SAVED, eval_every=0, log_every=0)
    config.optimizer.update(config_lib.default_config(model).optimizer)
    config.optimizer.update(learning_rate=0.01, schedule="constant")
    config.optimizer.epsilon = 1e-3  # or Adam divides one rounding error by another
    config.eval.update(batch_size=8, max_tokens=163)
    return config


class Resumed:
    """A run that goes on from SAVED on a mesh of this process or of several.

    Attributes:
      step: compiled when it is first called.
      state: as it was restored.
    """

    def __init__(self, config, model, checkpoints, sizes):
        self.mesh = sharding.make_mesh(sizes)
        model = model.for_training(config.train.steps)
        self.made = TrainingStep(config, model, self.mesh)
        self.config, self.model = config, model
        with Checkpoints(checkpoints, read_only=True) as found:
            abstract = sharding.with_shardings(self.made.abstract, self.made.placed)
            self.at, self.state, self.sealed = found.restore(abstract, step=SAVED)

    def finish(self):
        """The state after STEPS, and the metrics of the last step."""
        prepared, train = prepare(self.config.data), self.config.train
        stream = Stream(
            prepared.tokens["train"],
            batch_size=train.batch_size,
            segment_length=train.segment_length,
            extended_length=self.model.extended_length,
            variable_length=train.variable_length,
            seed=self.config.seed,
        )
        step = self.made.compile(stream.at(0))
        for k in range(SAVED, STEPS):
            self.state, metrics = step(self.state, stream.at(k))
            metrics["train/loss_nats"].block_until_ready()
        return jax.device_get((self.state, metrics))


def main(argv):
    """Restores each run on all hosts together, and saves it into the folder `hosts`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    hosts.add_flags(parser)
    args = parser.parse_args(argv)
    hosts.join(args, workdir=None, start_limit=60.0, heartbeat=20.0)
    for model in models.MODELS:
        config = make_config(model, args.folder)
        built = models.build(config.model, len(set(TEXT)))
        stored = args.folder / model / "checkpoints"
        run = Resumed(config, built, stored, {"data": 1, "fsdp": 2})
        with Checkpoints(args.folder / "hosts" / model) as checkpoints:
            checkpoints.save(run.at, run.state, config=run.sealed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
