"""What will run and whether it fits, answered without the GPU and without the weights: launch plan, memory
ledger, roof.

    fit        a model on GPUs: composes the three below
    launches   expert layers only, so far
    memory     where a GPU's bytes go
    roof       the speed that memory bandwidth allows
    foreign    tuning files of other servers

Level 8: imports models, the layers it counts and plans, cache.specs, kernels, formats, parallel,
weights.cuts, `engine.memory` and config.
"""
