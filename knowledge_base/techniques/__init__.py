"""One file for each technique; see knowledge_base/registry.py."""
