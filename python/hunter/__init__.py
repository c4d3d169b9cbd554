# SPDX-License-Identifier: MIT
"""The command line: shows packets with their processes, filters, saves, asks the daemon."""
