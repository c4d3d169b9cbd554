# SPDX-License-Identifier: MIT
"""What the module says: Generic Netlink, and how the module gets there."""
