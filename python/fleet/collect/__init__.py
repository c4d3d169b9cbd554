# SPDX-License-Identifier: MIT
"""Collectors: from the fleet's server into the folder that questions read."""
