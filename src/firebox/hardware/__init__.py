"""The machines: numbers and named facts, one file a machine; `probe` asks the driver which one is here."""
