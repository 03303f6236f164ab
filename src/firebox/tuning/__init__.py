"""Finding kernel configurations: compile everything, drop what does not fit, rank by a model, measure what is
left where there is a GPU, and write tuned/<gpu>/.

    base            a task, its candidates, and what an operation says about both
    experts, linear, attention   the operations that are tuned
    problems        which of their problems a model has
    estimate        how long a tile should take, from bytes, waves, occupancy and instruction rates
    clock           CUDA-graph timing, interleaved
    search          tasks to choices: compile, drop, rank, halve
    journal         what is known already, on disk; worker: measuring in a process that may die
    keys            which numbers of tokens are worth an entry
    write           tuned/<gpu>/*.json; servers/: the same for SGLang and vLLM
    prove           the gain where users feel it, in pairs

Level 10: imports kernels, layers, formats, planning and bench; kernels read what it writes.
"""
