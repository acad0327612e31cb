"""Digests of what lies over several hosts: those of one, whichever host has what."""

import subprocess
import sys

from cluster import environment, free_port

HOST = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from xlformer.runs import leaves

port, host = int(sys.argv[1]), int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, host)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("host", "device"))
local = Mesh(np.array(jax.local_devices()), ("device",))
whole = np.random.default_rng(3).random((4, 6), np.float32)
expected = leaves.numpy_digest(whole)
over_both = P("host", "device"), P(("device", "host")), P(None, "host")
specs = P(), P("device"), P(None, "device"), *over_both


def spread(spec, flipped=None, mesh=mesh):
    sharding, parts = NamedSharding(mesh, spec), []
    for device, index in sharding.addressable_devices_indices_map(whole.shape).items():
        parts.append(whole[index].copy())
        if flipped == host:
            parts[-1].view(np.uint32)[0, 0] ^= 1
        parts[-1] = jax.device_put(parts[-1], device)
    return jax.make_array_from_single_device_arrays(whole.shape, sharding, parts)


mixed = {str(spec): spread(spec) for spec in specs}
mixed |= {"numpy": whole, "local": spread(P("device"), mesh=local)}
for found in mixed, *({"alone": spread(spec)} for spec in specs):
    assert leaves.digests(found) == dict.fromkeys(found, expected), found
for spec in specs:
    for flipped in range(2):
        seen = leaves.digests({"x": spread(spec, flipped)})["x"] != expected
        # Of a part that one host alone has, the other sees it, too.
        assert seen == (flipped == host or spec in over_both), (spec, flipped)
"""


def test_every_host_answers_for_its_own_copy_and_all_for_what_they_share():
    command, port = [sys.executable, "-c", HOST], str(free_port())
    pipes = {"stderr": subprocess.PIPE, "text": True, "env": environment(2)}
    hosts = [subprocess.Popen([*command, port, str(h)], **pipes) for h in range(2)]
    try:
        said = [process.communicate(timeout=60)[1] for process in hosts]
    finally:
        for process in hosts:
            process.kill()
            process.wait()
    assert [process.returncode for process in hosts] == [0, 0], "\n".join(said)
