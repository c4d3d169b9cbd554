# SPDX-License-Identifier: MIT
"""Many machines: flows of each host go to one place, and are asked there as on one host."""
