"""Several hosts on this machine: one process each, a log file each, one deadline."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from quick import xla_flags

HERE = pathlib.Path(__file__).parent
DEADLINE = 120  # seconds that one cluster may live: far more than it needs
WORKER = """
import importlib, json, resource, sys, threading, time
sys.path.insert(0, sys.argv.pop(1))
from training_runs import bag, everything, text_config
from xlformer import config, hosts, models, train
from xlformer.data.stream import Stream
spec = json.loads(sys.argv.pop(1))
hosts.job.SLOW_VIEW_S = 1
real_at = Stream.at
def at(self, step):
    if step == spec["hang_at"]:
        print("hanging", flush=True)
        threading.Event().wait()
    if step == spec["full_at"]:  # Python ignores the signal: writing fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    time.sleep(spec["pace_s"])
    return real_at(self, step)
Stream.at = at
made = text_config(spec["text"], **spec["train"])
made.data.directory = spec["text"] + "-prepared"
made.mesh.update(spec["mesh"])
made.hosts.update(start_limit=60.0, heartbeat=20.0)
made.hosts.update(spec["hosts"])
if spec["bag"]:
    models.build = lambda *_, **__: bag(vocab_size=9, dropout=0.1)
config.load = lambda *_: made
code = train.main(["--config=made", *sys.argv[1:]])
for name, *flags in spec["then"]:
    print("--", name, flush=True)
    command = importlib.import_module("xlformer." + name)
    code = code or command.main(flags + sys.argv[1:])
sys.exit(code)
"""
# What would make a child of the tests something else than a host of its own.
STRIPPED = re.compile("XLA_|JAX_(?!COMPILATION|PERSISTENT)|TPU_|SLURM_")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices):
    """Of a process with so many devices, on CPU."""
    found = {k: v for k, v in os.environ.items() if not STRIPPED.match(k)}
    found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices), "NPROC": "16"}
    return found | {"PYTHONPATH": str(HERE.parent)}


def worker(text, workdir, *, train=(), hosts=(), mesh=(), bag=True, **more):
    """The command of one host; without its coordinator. more: see WORKER."""
    spec = {"text": str(text), "bag": bag, "pace_s": 0}
    spec |= {"hang_at": None, "full_at": None, "then": [], **more}
    spec |= {"train": dict(train), "hosts": dict(hosts)}
    spec["mesh"] = {"data": -1, **dict(mesh)}
    command = [sys.executable, "-c", WORKER, str(HERE), json.dumps(spec)]
    return [*command, f"--workdir={workdir}"]


class Cluster:
    """Hosts that train `text`; leaves nothing running.

    workdirs: one for all, or one for each host. train, hosts, mesh: fields of these
    sections of the config, a dict, or one dict for each host. only: start these hosts
    alone. then: commands that the same processes run after it, each with its flags.
    late, of all but the first: hang_at, the step whose data never come, or
    full_at, the one from which on their disk is full.
    """

    def __init__(
        self,
        text,
        workdirs,
        *,
        count=2,
        devices=1,
        bag=True,
        train=(),
        hosts=(),
        mesh=(),
        only=None,
        port=None,
        then=(),
        **late,
    ):
        workdirs = workdirs if isinstance(workdirs, list) else [workdirs] * count
        trains = train if isinstance(train, list) else [train] * count
        port = port or free_port()
        self.logs, self.processes, self._cats = [], [], []
        self._end = time.monotonic() + DEADLINE
        for host in range(count) if only is None else only:
            log = pathlib.Path(f"{text}-{time.time_ns()}-{host}.log")
            self.logs.append(log)
            several = [
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={host}",
            ]
            command = worker(
                text,
                workdirs[host],
                train=trains[host],
                hosts=hosts,
                mesh=mesh,
                bag=bag,
                then=then,
                **(late if host else {}),
            )
            with self._sink(log, "full_at" in late) as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *(several if count > 1 else [])],
                        env=environment(devices),
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                    )
                )

    def _sink(self, log, piped):
        """The file, or a pipe into it: a host whose disk is full can still say so."""
        file = log.open("w")
        if not piped:
            return file
        with file:
            cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        self._cats.append(cat)
        return cat.stdin

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for cat in self._cats:
            cat.wait()

    def text(self, host=0):
        return self.logs[host].read_text()

    def everything(self):
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in self.logs)

    def wait_for(self, pattern, host=0):
        while not (found := re.search(pattern, self.text(host))):
            assert time.monotonic() < self._end, self.everything()
            assert self.processes[host].poll() is None, self.everything()
            time.sleep(0.01)
        return found

    def found(self, pattern, host=0):
        """The match in the log of a host that has ended."""
        match = re.search(pattern, self.text(host))
        assert match, self.everything()
        return match

    def signal(self, number, host):
        os.killpg(self.processes[host].pid, number)

    def codes(self):
        """Exit codes of all, once all have ended."""
        try:
            return [
                p.wait(max(0.1, self._end - time.monotonic()))
                for p in [*self.processes, *self._cats]
            ][: len(self.processes)]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hang:\n{self.everything()}") from None

    def finish(self):
        assert set(self.codes()) == {0}, self.everything()
        return json.loads(self.text().splitlines()[-1])
