"""The architectures, one file each, found by the checkpoint's `model_type`."""
