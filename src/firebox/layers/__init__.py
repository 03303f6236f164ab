"""What models are made of. A layer owns its weights, lists the checkpoint tensors that fill them, and runs on
a Step."""
