# SPDX-License-Identifier: MIT
"""Facts that the host gives beside the records: names of far ends, and translations by NAT."""
