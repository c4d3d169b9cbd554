# SPDX-License-Identifier: MIT
"""hunter watch: reports what was not seen before, to people, programs and the journal."""
