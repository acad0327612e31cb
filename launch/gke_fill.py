"""Prints launch/gke.yaml with its placeholders filled in; called by gke.sh.

    python3 launch/gke_fill.py name=... image=... [...] -- TRAIN ARGUMENTS

Values become JSON, so nothing in them can end a line of YAML or begin another. A
placeholder without a value is an error. Standard library only.
"""

import json
import math
import pathlib
import string
import sys

SPOT = "cloud.google.com/gke-spot"


def fill(template: str, values: dict[str, str], arguments: list[str]) -> str:
    chips = math.prod(map(int, values["topology"].split("x")))
    per_host = min(int(values["chips_per_host"]), chips)
    if chips % per_host:
        raise SystemExit(
            f"error: --chips_per_host={per_host} does not divide the {chips} chips of "
            f"--topology={values['topology']}"
        )
    selector = {
        "cloud.google.com/gke-tpu-accelerator": values["accelerator"],
        "cloud.google.com/gke-tpu-topology": values["topology"],
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists"}]
    if values["spot"]:
        selector[SPOT] = "true"
        tolerations.append({"key": SPOT, "operator": "Exists"})
    filled = {
        "NAME": values["name"],
        "IMAGE": values["image"],
        "SERVICE_ACCOUNT": values["service_account"],
        "HOSTS": chips // per_host,
        "CHIPS": per_host,
        "MAX_RESTARTS": int(values["max_restarts"]),
        "GRACE_SECONDS": int(values["grace_seconds"]),
        "NODE_SELECTOR": selector,
        "TOLERATIONS": tolerations,
        # Kubernetes fills in $(NAME) itself; for it $$ is one $.
        "ARGUMENTS": [argument.replace("$", "$$") for argument in arguments],
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
