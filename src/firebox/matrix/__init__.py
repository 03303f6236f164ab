"""A resumable grid of server configurations: cells, their runs as processes, the verdict on each, the report.

Level 10: imports bench, planning and config; starts the command line as processes. Empty for now.
"""
