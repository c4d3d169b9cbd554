# SPDX-License-Identifier: MIT
"""What the host tells beside the records: names of far ends, and what NAT made of addresses."""
