"""Check the nodes of a job before it trains."""
