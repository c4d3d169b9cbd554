# SPDX-License-Identifier: MIT
"""What Linux says without the module: /proc, sock_diag, namespaces."""
