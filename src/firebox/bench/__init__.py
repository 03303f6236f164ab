"""Measuring: the one stopwatch, workloads, output guards, audits of published tables, the roofline, and the
report.

Level 9: imports kernels, formats, llm and `engine.client`; knows no model. Empty for now.
"""
