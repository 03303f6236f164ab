"""Attention backends, one file each: how queries meet the paged keys and values."""
