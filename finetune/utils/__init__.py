"""Helpers without torch: errors, quoting, paths, JSON objects, file types, the cache directory."""
