"""The tiny form of every model as a run, and one of several hosts that train them all.

    python tests/all_models.py FOLDER --coordinator=HOST:PORT ...
"""

import functools
import pathlib
import sys

from xlformer import config as config_lib
from xlformer import models, train

STEPS, SAVED = 3, 2  # of a whole run, and of one that others go on with
SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}
TEXT = "she sells sea shells; by the sea shore, 17 boxers quickly jump (over) a vow\n"


def folder(path):
    """Makes what the runs read."""
    (path / "text.txt").write_text(TEXT * 31, encoding="utf-8")
    return path


@functools.cache
def config_name(model):
    """A config of this model that comes with the package."""
    return next(n for n in config_lib.names() if _model(n) == model)


@functools.cache
def _model(name):
    return config_lib.load(name).model.name


def make_config(model, path, mesh=None, **fields):
    """Rows for any mesh of eight, and all that a run can carry from step to step."""
    config = config_lib.load(f"{config_name(model)}:debug")
    own = config_lib.load(f"text:path={path / 'text.txt'},unit=chars")
    config.data.update(own.data, directory=str(path / "prepared"))
    config.train.update(batch_size=8, steps=STEPS, ema_decay=0.5)
    config.train.update(save_every=SAVED, eval_every=0, log_every=0, **fields)
    config.optimizer.update(learning_rate=0.01, schedule="constant", warmup_steps=0)
    config.optimizer.epsilon = 1e-3  # or Adam divides one rounding error by another
    config.eval.update(batch_size=8, max_tokens=163)
    config.mesh.update(mesh or {})
    return config


def main(path, *flags):
    for model in models.MODELS:
        config = make_config(model, path, {"fsdp": 2}, steps=SAVED)
        config_lib.load = lambda *_, config=config: config
        code = train.main(["--config=it", f"--workdir={path / 'hosts' / model}", *flags])
        config_lib.load = LOAD
        if code:
            return code
    return 0


LOAD = config_lib.load

if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), *sys.argv[2:]))
