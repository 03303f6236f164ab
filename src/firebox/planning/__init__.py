"""What will run and whether it fits, answered without the GPU and without the weights: launch plan, memory
ledger, roof.

Level 8: imports models, kernels, formats, parallel, `engine.memory` and config. So far: `foreign`, tuning
files of other servers.
"""
