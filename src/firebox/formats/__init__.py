"""Weight formats, one file each: how a checkpoint names and stores a linear layer's weight, and what it means
in fp32."""
