# SPDX-License-Identifier: MIT
"""The daemon's socket, from the client's side."""
