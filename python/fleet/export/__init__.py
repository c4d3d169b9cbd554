# SPDX-License-Identifier: MIT
"""Exporters: from this host's daemon to the fleet's server."""
