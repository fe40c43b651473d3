"""The command line: one module per command or two; `options` has what they share, `app` puts them together."""
