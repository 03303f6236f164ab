"""How models mark their reasoning, one file per notation; the file's name is the value of
`--reasoning-parser`.

Level 1, part of text: imports text and level 0. A parser splits streamed text into reasoning and answer.
"""
