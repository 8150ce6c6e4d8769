# SPDX-License-Identifier: Apache-2.0
"""``python -m sockgw``: the same as ``sockgw``."""

from __future__ import annotations

import sys

from sockgw.cli import main

if __name__ == "__main__":
    sys.exit(main())
