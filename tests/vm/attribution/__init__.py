# SPDX-License-Identifier: MIT
"""Ground-truth suite: real traffic, truth written by its makers, every record compared."""
