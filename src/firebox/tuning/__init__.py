"""Finding kernel configurations: compile everything, drop what does not fit, rank by a model, measure what is
left where there is a GPU, and write tuned/<gpu>/.

    base            a task, its candidates, and what an operation says about both
    experts, linear, attention   the operations that are tuned
    problems        which of their problems a model has
    estimate        how long a tile should take, from bytes, waves, occupancy and instruction rates
    clock           CUDA-graph timing, interleaved
    surrogate       how far off that is, learned from what was measured
    search          one problem's entries: compile, drop, rank, measure, weigh
    journal         what is known already, on disk; worker: measuring in a process that may die
    run, spread     a model's problems, one after the other or over a cluster
    write           tuned/nvidia_<gpu>/*.json; servers/: files for SGLang and vLLM
    prove           the gain where users feel it, in pairs

Level 10: docs/architecture.md says what it imports; kernels read what it writes and import none of it.
"""
