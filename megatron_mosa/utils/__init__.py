"""Helpers without a subject of their own: files, versions, error texts."""
