# SPDX-License-Identifier: MIT
"""hunter who: what is asked, of the daemon or the kernel, and how the answer is shown."""
