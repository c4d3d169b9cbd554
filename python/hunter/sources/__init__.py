# SPDX-License-Identifier: MIT
"""Where packets come from: the daemon, an engine here, a saved file."""
