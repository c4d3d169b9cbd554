# SPDX-License-Identifier: MIT
"""hunter who: the question to the daemon or the kernel, and how the answer is shown."""
