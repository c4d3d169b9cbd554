# SPDX-License-Identifier: MIT
"""Sources of packets: the daemon, an engine in this process, a saved file."""
