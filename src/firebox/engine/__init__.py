"""The engine: token ids in, token ids out. Scheduler, runner, sampler, memory, and the process they run
in."""
