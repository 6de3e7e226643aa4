"""`phaselens repl`: activation patching in IPython. A face of `phaselens.patching`: it reads, calls and prints."""
