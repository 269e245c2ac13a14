"""Several ranks as one run: the process group, FSDP2, and what the leader tells the others."""
