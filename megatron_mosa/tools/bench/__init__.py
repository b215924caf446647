"""``mosa bench``: how fast a configuration trains on the devices at hand."""
