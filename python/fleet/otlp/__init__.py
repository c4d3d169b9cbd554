# SPDX-License-Identifier: MIT
"""Flows as OpenTelemetry logs, for sites that have a pipeline of their own."""
