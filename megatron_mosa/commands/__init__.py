"""The commands of ``mosa`` that are not a tool of their own. Nothing is imported here: every start would wait."""
