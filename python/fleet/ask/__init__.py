# SPDX-License-Identifier: MIT
"""Questions to the fleet's flows: a folder of Parquet, or one machine's own history."""
