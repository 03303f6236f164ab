"""How one model is spread over several devices: the plan (tp, ep, pp, dp), process groups, collectives,
expert dispatch.

Level 1: imports level 0 only. The only room that may import torch.distributed. Empty for now: Firebox runs on
one device.
"""
