"""What a person or a machine is shown of a run. rich is imported with the first thing that is shown."""
