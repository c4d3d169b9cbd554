# SPDX-License-Identifier: MIT
"""From the fleet's server to where it is asked."""
