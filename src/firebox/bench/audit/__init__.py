"""Judging a table that somebody published: which of its rows cannot be true.

table.py      a file, in whatever format, into rows of named cells
columns.py    column names into fields of a Claim, with units
rows.py       cells into claims: units, wide tables, llama-bench's and llama-benchy's tests
judge.py      laws and neighbours into verdicts
"""
