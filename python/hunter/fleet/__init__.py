# SPDX-License-Identifier: MIT
"""hunter fleet: questions to many machines."""
