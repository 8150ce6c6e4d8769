# SPDX-License-Identifier: Apache-2.0
"""The benchmark: sockgw beside what its users would pick instead, in one run.

`make bench` and `make bench-quick` run it; `python -m tests.bench --help` from
the checkout's root says what it can be asked. In data-flow order: `__main__`
reads the command line, `plan` says who is measured under which load, where and
how often, `cell` makes one measurement, with `network` (loopback, or a namespace
for each of client, gateway and backend), `workloads` (the load tools and their
backends), `opponents` (what stands between them), `accounting` (CPU, switches,
memory) and `processes` (started, and always ended); `results` is what was
measured, `targets` what it should have been, `report` and `plots` say it.
"""
