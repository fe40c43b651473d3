"""The command line: a module a command; `given` has what they share, `app` puts them together."""
