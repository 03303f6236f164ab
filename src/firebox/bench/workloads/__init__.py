"""What a server is loaded with. One file a workload, found by its name; `base.py` is the contract."""
