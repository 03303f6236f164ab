"""Finding kernel configurations: compile, drop what does not fit, check the output, time it, write `tuned/`.

Level 10: imports kernels, formats and `bench.timer`. Nothing imports tuning; kernels read the files it
writes. Empty for now.
"""
