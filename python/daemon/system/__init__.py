# SPDX-License-Identifier: MIT
"""What the daemon has to do with its machine: configuration, log, peers."""
