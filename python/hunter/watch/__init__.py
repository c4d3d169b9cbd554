# SPDX-License-Identifier: MIT
"""hunter watch: what was not seen before, told to people, programs and the journal."""
