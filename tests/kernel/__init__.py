# SPDX-License-Identifier: Apache-2.0
"""Tests of the data path on the running kernel."""
