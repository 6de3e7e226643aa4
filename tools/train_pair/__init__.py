"""The recipe of the bundled model pair: data, training, branch, recalibration, export and figures."""
