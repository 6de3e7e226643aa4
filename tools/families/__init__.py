"""A survey of the causal language models in transformers: which the lens serves, and how exactly.

`python -m tools.families` builds a tiny random model of each type, tries it in a child process, and writes
docs/families.md.
"""
