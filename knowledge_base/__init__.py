"""What is known: resources, metrics, techniques, engines, composition rules, and the nouns everyone shares.

`knowledge_base` knows, `cost_models` predicts, `search` chooses, `planner` acts. Imports point down that
list only. Nothing here imports torch or another heavy library at module top.
"""
