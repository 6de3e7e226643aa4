"""Tools that build the documentation site."""
