"""Shards of tokens, written and read: light to import, since every process that packs a corpus starts with it."""
