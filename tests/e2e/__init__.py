# SPDX-License-Identifier: Apache-2.0
"""`sockgw run` as a subprocess, real sockets and real programs on both sides."""
