"""The command line: a module a command; `options` has what they share, `app` puts them together."""
