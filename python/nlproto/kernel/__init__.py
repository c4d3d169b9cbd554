# SPDX-License-Identifier: MIT
"""What the module says, by Generic Netlink; and how the module gets into the kernel."""
