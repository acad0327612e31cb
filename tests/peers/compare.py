"""xlformer against the PyTorch programs of its models, in one run and in turns.

    PYTHONPATH=. python tests/peers/compare.py --settings=cpu_train,cpu_eval --rounds=7

Each program is a process of its own (thread pools and allocators do not meet). All
build and warm up; then one at a time runs a round of about --seconds, again and again,
so a machine that becomes slower does so for all. A program that is not here or fails is
a row with the reason. The peers lie in `peers/` (`bash launch/gpu.sh --prepare`).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import settings

from xlformer import command
from xlformer.errors import UserError

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = "xlformer"
BASELINES = (
    "one device",
    "plain",
    "naive",
)  # forms of ours.py that are no implementation
ROUND_LIMIT_S = 60.0  # beyond what was asked for


@dataclasses.dataclass
class Program:
    """One program in one form: its command, its process, what it measured.

    Attributes:
      why_not: the reason why there are no figures, else ''.
      seconds: of each round; tokens likewise.
    """

    name: str
    form: str
    command: list[str]
    process: subprocess.Popen | None = None
    log: pathlib.Path | None = None
    facts: dict = dataclasses.field(default_factory=dict)
    why_not: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def start(self, environment: dict, log: pathlib.Path) -> None:
        self.log = log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,  # torch.compile has children of its own
            )

    def ask(self) -> None:
        """Tells it to run one round."""
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # its answer will say so

    def answer(self, limit_s: float) -> dict | None:
        """Its next line; None and a reason if there is none."""
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, limit_s))
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.why_not = f"no answer in {limit_s:.0f} s"
        if ready:
            code = self.process.wait()
            lines = self.log.read_text(errors="replace").split("\n")
            last = next((x.strip() for x in reversed(lines) if x.strip()), "")
            self.why_not = f"exit code {code}: {last}"[:200]
        self.end()
        return None

    def end(self) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


def programs(name: str, implementations, *, seconds: float, tiny: bool):
    """Every program and form of a setting, ours first."""
    setting = settings.SETTINGS[name]
    forms = [(OURS, "ours", form) for form in implementations]
    if isinstance(setting, settings.Linear):  # no other way to do it
        forms = [(OURS, "ours", "auto")]
    elif not isinstance(setting, settings.Setting):
        forms = [(OURS, "ours", "auto"), (OURS, "ours", "one device")]
    elif not setting.gpu:
        forms += [(OURS, "ours", form) for form in BASELINES]
    if setting.train:
        forms = [f for f in forms if f[2] != "plain"]
    peer = setting.peer
    if peer == "nvidia":
        kinds = ["eager", "compile"] + ["torchscript"] * (not setting.train)
    elif setting.half:  # the last is the likeliest to be late, and the least missed
        kinds = ["eager-f32", "eager-bf16", "compile-bf16", "compile-f32"]
    else:
        kinds = ["eager-f32", "compile-f32"]
    forms += [(peer, peer, kind) for kind in kinds]
    options = [f"--setting={name}", f"--seconds={seconds}"] + ["--tiny"] * tiny
    return [
        Program(
            program,
            form,
            [sys.executable, str(HERE / f"{script}.py"), f"--form={form}", *options],
        )
        for program, script, form in forms
    ]


def measure(found: list[Program], *, rounds: int, build_limit_s: float, gpu: bool):
    """Builds all, then times them in turns; ends them all."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the card is shared by all
        # Large pages, as launch/environment.sh has them; for the peers too.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }
    if not gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as logs:
        if gpu:  # one at a time warms up: the card has not memory for all
            environment["PEERS_LOCK"] = f"{logs}/lock"
        try:
            for k, program in enumerate(found):
                program.start(environment, pathlib.Path(logs) / f"{k}.log")
            end = time.monotonic() + build_limit_s
            for program in found:
                program.facts = program.answer(end - time.monotonic()) or {}
            for turn in range(rounds + 1):
                for program in found:
                    if program.why_not:
                        continue
                    program.ask()
                    result = program.answer(ROUND_LIMIT_S)
                    if result and turn:  # the first finds out how much is a round
                        program.tokens.append(result["tokens"])
                        program.seconds.append(result["seconds"])
        finally:
            for program in found:
                program.end()


def report(name: str, found: list[Program]) -> list[dict]:
    """Rows of one setting. `of_best_peer` is ours over the fastest form of the peer."""
    rows = []
    for program in found:
        row = {"setting": name, "program": program.name, "form": program.form}
        if program.why_not:
            rows.append({**row, "why_not": program.why_not})
            continue
        rates = [t / s for t, s in zip(program.tokens, program.seconds, strict=True)]
        median = statistics.median(rates)
        row |= {
            "tokens_per_second": median,
            "fastest": max(rates),
            "spread": (max(rates) - min(rates)) / median,
            "rates": rates,
        }
        rows.append(row | program.facts)
    peers = [r for r in rows if r["program"] != OURS and "why_not" not in r]
    best = max((r["tokens_per_second"] for r in peers), default=None)
    for row in rows:
        if best and "why_not" not in row:
            row["of_best_peer"] = row["tokens_per_second"] / best
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        f"{'program':<10}{'form':<14}{'tokens/s':>12}{'fastest':>12}{'spread':>9}"
        f"{'to best peer':>14}"
    ]
    for row in rows:
        start = f"{row['program']:<10}{row['form']:<14}"
        if "why_not" in row:
            lines.append(f"{start}not measured: {row['why_not']}")
            continue
        ratio = f"{row['of_best_peer']:.2f}" if "of_best_peer" in row else "-"
        lines.append(
            f"{start}{row['tokens_per_second']:>12,.0f}{row['fastest']:>12,.0f}"
            f"{row['spread']:>9.0%}{ratio:>14}"
        )
    return "\n".join(lines)


def _main(argv) -> int:
    parser = command.Parser(prog="compare.py", description=__doc__)
    parser.add_argument("--settings", required=True, help="a,b or their beginnings")
    parser.add_argument("--implementations", default="auto", help="of attention: a,b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, about")
    parser.add_argument("--build_limit", type=float, default=300.0, help="seconds")
    parser.add_argument(
        "--limit", type=float, default=1e9, help="seconds; later settings are left out"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal")
    parser.add_argument("--json", help="a file for the same in numbers")
    args = parser.parse(argv)
    if args.rounds < 1 or not args.seconds > 0:
        raise UserError(
            f"--rounds={args.rounds} and --seconds={args.seconds} must be positive"
        )
    names = _names(args.settings)
    gpu = shutil.which("nvidia-smi") is not None
    without = [n for n in names if settings.SETTINGS[n].gpu]
    if without and not gpu and not args.tiny:
        raise UserError(f"--settings={without[0]} needs a GPU; --tiny runs without one")
    load, end = os.getloadavg()[0], time.monotonic() + args.limit
    rows = []
    for name in names:
        found = programs(
            name,
            [i for i in args.implementations.split(",") if i],
            seconds=args.seconds,
            tiny=args.tiny,
        )
        setting = settings.SETTINGS[name]
        setting = setting.tiny() if args.tiny else setting
        left = end - time.monotonic()
        if left > 0:
            measure(
                found,
                rounds=args.rounds,
                build_limit_s=min(args.build_limit, left),
                gpu=setting.gpu and gpu,
            )
        else:
            for program in found:
                program.why_not = f"--limit={args.limit:g} was over"
        rows += report(name, found)
        print(f"\n{name}: {setting}")
        print(table([row for row in rows if row["setting"] == name]), flush=True)
        if args.json:
            pathlib.Path(args.json).write_text(
                json.dumps(about(rows, load), indent=1) + "\n"
            )
    print(f"\n{datetime.date.today()}, {host()}, {versions(rows)}")
    print(f"load before: {load:.1f} (other work slows some programs more than others)")
    return 0


def _names(text: str) -> list[str]:
    try:
        return settings.find(text)
    except KeyError as error:
        known = ", ".join(settings.SETTINGS)
        raise UserError(
            f"--settings={text}: {error.args[0]!r} is none of {known}"
        ) from error


def host() -> str:
    """The processor: its name and how many of its cores may be used."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def versions(rows: list[dict]) -> str:
    found = {"python": platform.python_version()}
    devices = {}
    for row in rows:
        found |= row.get("versions", {})
        devices[row.get("device")] = None
    names = [d for d in devices if d not in (None, "cpu")]
    return ", ".join(names + [f"{name} {version}" for name, version in found.items()])


def about(rows: list[dict], load: float) -> dict:
    return {
        "load_before": load,
        "date": str(datetime.date.today()),
        "host": host(),
        "versions": versions(rows),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "rows": rows,
    }


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and ends the programs
    sys.exit(main())
