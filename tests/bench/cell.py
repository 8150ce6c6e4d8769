# SPDX-License-Identifier: Apache-2.0
"""One measurement: a backend, an opponent and a load, all fresh, from start to end.

The load tool's own figures are taken over its whole run. What the machine
spent is taken over the steady part of it: from when all connections are open
to shortly before the end, or to the end of a load that ends sooner. Every
process that takes part has its clock then: one that has ended keeps it until it
is waited for.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import accounting
from .accounting import Spender
from .network import NETWORKS
from .processes import BenchError, Program, Programs
from .results import Measurement
from .workloads import GRACE_S

if TYPE_CHECKING:
    from .opponents import Opponent, Setting
    from .workloads import Server, Timing, Workload

_MARGIN_S = 0.2  # before the load's end
_SAMPLE_EVERY_S = 0.1
_RAMP_SHARE = 0.5  # of the load's time, at most, for opening connections


def measure(
    workload: Workload, opponent: Opponent, setting: Setting, timing: Timing, number: int
) -> Measurement:
    """Measure `opponent` under `workload` once, in round `number`.

    Raises BenchError when it does not work. Leaves no process or namespace behind.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sockgw-bench-") as directory,
        NETWORKS[setting.network]() as network,
        Programs(Path(directory), network.backend) as at_backend,
        Programs(Path(directory), network.gateway) as at_gateway,
        Programs(Path(directory), network.client) as at_client,
    ):
        memory_before = accounting.kernel_memory()
        server = workload.start_server(at_backend, setting.workers, setting.nofile)
        running = opponent.start(at_gateway, server.address, setting)
        holder = workload.hold_idle(at_client, running.address, server)
        load = workload.start_load(at_client, running.address, server, timing)
        spenders = {
            load.pid: Spender.LOAD,
            **({holder.pid: Spender.LOAD} if holder else {}),
            server.program.pid: Spender.BACKEND,
            **{program.pid: Spender.GATEWAY for program in running.programs},
        }
        end_s = load.started_at_s + workload.length_s(timing) - _MARGIN_S
        time.sleep(workload.lead_s(timing))
        _await_connections(server, load, workload, timing)
        served = server.status()[1] if server.status else 0
        before = accounting.snapshot(spenders)
        memory_peak = memory_before
        left_s = end_s - time.monotonic()
        while left_s > 0 and not load.ends_within(min(left_s, _SAMPLE_EVERY_S)):
            memory_peak = memory_peak.peak(accounting.kernel_memory())
            left_s = end_s - time.monotonic()
        if server.status:
            served = server.status()[1] - served
        spent = accounting.spent(before, accounting.snapshot(spenders))
        resident_bytes = accounting.resident_bytes(program.pid for program in running.programs)

        found = workload.parse(load.output_of_end(within_s=GRACE_S))
        facts = running.facts()
        if holder and holder.has_ended:
            raise BenchError(f"idle sessions: {holder.complaint()}")
    operations = served or found.throughput * workload.operations_per_unit * spent.window_s
    if operations <= 0:
        raise BenchError("nothing came through")
    return Measurement(
        round=number,
        workload=workload.name,
        opponent=opponent.name,
        throughput=found.throughput,
        latency_us=found.latency_us,
        errors=found.errors,
        operations=operations,
        is_counted=bool(served),
        spent=spent,
        tcp_memory_bytes=memory_peak.tcp_bytes - memory_before.tcp_bytes,
        slab_bytes=memory_peak.slab_bytes - memory_before.slab_bytes,
        resident_bytes=resident_bytes,
        detail=found.detail,
        facts=facts,
    )


def _await_connections(server: Server, load: Program, workload: Workload, timing: Timing) -> None:
    """Wait until the backend sees all connections, for half of the load's time at most."""
    until_s = load.started_at_s + workload.length_s(timing) * _RAMP_SHARE
    while server.status and time.monotonic() < until_s and not load.has_ended:
        if server.status()[0] >= server.open_connections:
            break
        time.sleep(_SAMPLE_EVERY_S)
