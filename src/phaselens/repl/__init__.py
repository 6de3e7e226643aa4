"""`phaselens repl`: activation patching in IPython, on top of `phaselens.patching`."""
