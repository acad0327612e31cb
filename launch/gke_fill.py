"""Prints launch/gke.yaml with its placeholders filled in; called by gke.sh.

    python3 launch/gke_fill.py name=... image=... [...] -- COMMAND ARGUMENTS

Values become JSON, so nothing in them can end a line of YAML or begin another. A
placeholder without a value is an error. Standard library only.
"""

import json
import math
import pathlib
import string
import sys

SPOT = "cloud.google.com/gke-spot"
PORT = 8476  # of jax.distributed, on host 0


def tpu_slice(values: dict[str, str]) -> dict:
    """What is said of a TPU slice; libtpu finds the hosts by GKE's own variables."""
    chips = math.prod(map(int, values["topology"].split("x")))
    per_host = min(int(values["chips_per_host"]), chips)
    if chips % per_host:
        raise SystemExit(
            f"error: --chips_per_host={per_host} does not divide the {chips} chips of "
            f"--topology={values['topology']}"
        )
    pool = "cloud.google.com/gke-nodepool"
    return {
        "HOSTS": chips // per_host,
        "DEVICES": {"google.com/tpu": per_host},
        "NODE_SELECTOR": {
            "cloud.google.com/gke-tpu-accelerator": values["accelerator"],
            "cloud.google.com/gke-tpu-topology": values["topology"],
        },
        "TOLERATIONS": [{"key": "google.com/tpu", "operator": "Exists"}],
        # A slice is one node pool, and no other slice will do for some of the hosts.
        "ANNOTATIONS": {"alpha.jobset.sigs.k8s.io/exclusive-topology": pool},
        "ARGUMENTS": [],
    }


def gpu_hosts(values: dict[str, str]) -> dict:
    """What is said of machines with GPUs; the hosts are told where host 0 is."""
    hosts, name = int(values["hosts"]), values["name"]
    together = [
        # JobSet's names of its pods: JOBSET-JOB-INDEX-POD.JOBSET.
        f"--coordinator={name}-host-0-0.{name}:{PORT}",
        f"--num_processes={hosts}",
        "--process_id=$(HOST_INDEX)",
    ]
    return {
        "HOSTS": hosts,
        "DEVICES": {"nvidia.com/gpu": int(values["gpus_per_host"])},
        "NODE_SELECTOR": {"cloud.google.com/gke-accelerator": values["accelerator"]},
        "TOLERATIONS": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "ANNOTATIONS": {},
        "ARGUMENTS": together if hosts > 1 else [],
    }


def fill(template: str, values: dict[str, str], arguments: list[str]) -> str:
    machines = gpu_hosts(values) if values["gpus_per_host"] else tpu_slice(values)
    if values["spot"]:
        machines["NODE_SELECTOR"][SPOT] = "true"
        machines["TOLERATIONS"].append({"key": SPOT, "operator": "Exists"})
    # Kubernetes fills in $(NAME) itself; for it $$ is one $.
    arguments = [argument.replace("$", "$$") for argument in arguments]
    filled = {
        **machines,
        "NAME": values["name"],
        "IMAGE": values["image"],
        "SERVICE_ACCOUNT": values["service_account"],
        "MAX_RESTARTS": int(values["max_restarts"]),
        "GRACE_SECONDS": int(values["grace_seconds"]),
        "BAD_INPUT": int(values["bad_input"]),
        "ARGUMENTS": [*arguments, *machines["ARGUMENTS"]],
    }
    lines = template.splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#"))
    try:
        return string.Template(text).substitute(
            {name: json.dumps(value) for name, value in filled.items()}
        )
    except (KeyError, ValueError) as error:
        raise SystemExit(f"error: launch/gke.yaml: no value for {error}") from None


if __name__ == "__main__":
    split = sys.argv.index("--")
    given = dict(item.split("=", 1) for item in sys.argv[1:split])
    path = pathlib.Path(__file__).with_name("gke.yaml")
    sys.stdout.write(fill(path.read_text(), given, sys.argv[split + 1 :]))
