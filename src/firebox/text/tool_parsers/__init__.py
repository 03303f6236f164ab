"""How models write tool calls, one file per notation; the file's name is the value of `--tool-call-parser`.

Level 1, part of text: imports text and level 0. A parser turns streamed text into calls and passes the rest
through.
"""
