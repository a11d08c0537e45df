"""Heads on features that do not fit in memory: fitted by passes over blocks of stored rows."""
