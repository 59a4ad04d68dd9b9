"""One file for each engine; see knowledge_base/registry.py."""
