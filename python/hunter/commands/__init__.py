# SPDX-License-Identifier: MIT
"""One module for each subcommand, and what only they need."""
