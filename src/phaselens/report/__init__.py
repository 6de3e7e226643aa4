"""Rendering of runs for people and programs.

A metric's result becomes display tables (`table`), built by `builders` and `condition_tables` and collected into
sections by `document`. Output formats write them: one class each, listed in `formats`. `figures` and `forest` draw the
same tables. Numbers of runs become text in `numbers`, those of `phaselens.patching` in its `wording.number_text`. rich
and matplotlib are imported when something is printed or drawn.
"""
