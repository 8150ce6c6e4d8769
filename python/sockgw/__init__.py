# SPDX-License-Identifier: Apache-2.0
"""A TCP gateway in Python whose bytes never enter Python."""

from __future__ import annotations

__version__ = "0.1.0"
