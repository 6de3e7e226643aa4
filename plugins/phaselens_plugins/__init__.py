"""Built-in metrics of PhaseLens, one module per metric, written against the public plugin API."""
