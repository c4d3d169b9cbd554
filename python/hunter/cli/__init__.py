# SPDX-License-Identifier: MIT
"""The command line: words, signals, standard input and output."""
