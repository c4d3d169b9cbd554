# SPDX-License-Identifier: MIT
"""From this host's daemon to the fleet's server."""
