# SPDX-License-Identifier: MIT
"""Many machines: each host sends its flows to one place, which is asked like one host."""
