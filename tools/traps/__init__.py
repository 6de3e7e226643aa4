"""Traps of published scripts: a wrong implementation of each beside measured, and the size of its error on a model.

python -m tools.traps                print the table for the bundled pair
python -m tools.traps smollm2        for other models
python -m tools.traps --write        rewrite the tables of docs/traps.md, for the pair and for smollm2 if installed
python -m tools.traps --check        exit with 1 if a number on the page differs from what is measured
"""
