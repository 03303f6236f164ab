"""The only stopwatch."""

from __future__ import annotations

import time

now = time.perf_counter
"""Seconds on a monotonic clock with nanoseconds; only differences mean anything."""
