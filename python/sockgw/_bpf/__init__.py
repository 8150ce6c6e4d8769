# SPDX-License-Identifier: Apache-2.0
"""The compiled half of sockgw: libbpf, the shim and the BPF object.

Nothing outside `sockgw.datapath` and the feature probes imports from here.
"""

from __future__ import annotations

from importlib.util import find_spec

IS_BUILT = find_spec("sockgw._bpf._binding") is not None
"""Whether the binding was built; without it only the relay works."""
