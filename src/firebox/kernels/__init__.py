"""The kernels, one file each, with `base.py` (launch, check, compile), `plan.py` (the launch plan) and
`select.py` (who runs).

Level 2: imports level 0 and `formats.base`. A format's `decode` reaches a kernel as an argument. Kernels
never import tuning.
"""
