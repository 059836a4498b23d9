"""What `orchestra bench` measures: ours with the peers beside it, in one run on one machine."""
