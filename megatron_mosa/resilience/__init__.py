"""What keeps a run going on machines that fail: nodes are looked at before it starts."""
