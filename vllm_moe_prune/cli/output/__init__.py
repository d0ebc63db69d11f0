"""Everything that the command line prints or draws."""
